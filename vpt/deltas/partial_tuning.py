"""Parameters of the backbone itself that are trained: biases, norms, the last blocks, or all of them."""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from vpt.backbones.factory import Backbone
from vpt.backbones.target_modules import parameter_names
from vpt.deltas.base import DeltaPart
from vpt.deltas.registry import register_delta
from vpt.errors import ConfigError


class Subset(DeltaPart):
    """Trains copies of chosen parameters, which stand in for the backbone's own while attached.

    The originals are kept, so that strength interpolates between both (`torch.lerp`) and `detach` restores them.

    Attributes:
        values: The trained copies, by timm's name with ``/`` for ``.``.
    """

    role: ClassVar[str] = "all"

    def __init__(self, backbone: Backbone) -> None:
        """Copies the parameters.

        Args:
            backbone: The backbone that they are chosen from.

        Raises:
            ConfigError: The backbone has no such parameter.
        """
        super().__init__(backbone)
        self._copy(self.role)

    def _copy(self, role: str, last: int = 0) -> None:
        replaced = [part for part in self.backbone.attached if isinstance(part, Subset)]
        for part in replaced:  # so that the originals are seen and copied
            part._detach()
        names = parameter_names(self.backbone, role, last)
        own = dict(self.backbone.model.named_parameters())
        if not names:
            raise ConfigError(f"{self.backbone.name} has no parameter of the kind that {type(self).__name__} trains.")
        self._names = names
        self.values = nn.ParameterDict({_key(n): nn.Parameter(own[n].detach().clone()) for n in names})
        self._size = sum(own[name].numel() for name in names)
        self._originals: dict[str, nn.Parameter] = {}
        self._seen: list[tuple[int, torch.dtype, torch.device]] = []
        for part in replaced:
            part._attach()

    def _attach(self) -> None:
        """Puts the copies in place of the originals.

        Raises:
            ConfigError: Another delta has put its own copy there.
        """
        for name in self._names:
            owner, last = self._place(name)
            if owner._parameters.get(last) is None:
                self._detach()
                raise ConfigError(f"Two deltas train {name}: keep one of them.")
            self._originals[name] = cast("nn.Parameter", owner._parameters[last])
            owner._parameters[last] = None  # the entry keeps its position; the attribute below is found first
        self._strengthened()

    def _detach(self) -> None:
        """Puts the originals back."""
        for name, original in self._originals.items():
            owner, last = self._place(name)
            owner.__dict__.pop(last, None)
            owner._parameters[last] = self._beside(original, self.values[_key(name)])
        self._originals = {}

    @torch.no_grad()
    def keep(self) -> None:
        """Detaches for good: the values, at the present strength, stay behind in the backbone's own parameters."""
        used = {name: getattr(*self._place(name)).clone() for name in self._names}
        self.detach()
        for name, value in used.items():
            self.backbone.model.get_parameter(name).copy_(value)

    def expected_parameters(self) -> int:
        """As many as the originals have."""
        return self._size

    def refresh(self) -> None:
        """Follows copies that were trained, loaded or moved since they were last interpolated."""
        if self._strength != 1.0 and self._stamps() != self._seen:
            self._strengthened()

    def _stamps(self) -> list[tuple[int, torch.dtype, torch.device]]:
        return [(value._version, value.dtype, value.device) for value in self.values.values()]

    def _strengthened(self) -> None:
        self._seen = self._stamps()
        for name, original in self._originals.items():
            owner, last = self._place(name)
            owner.__dict__[last] = self._between(original, self.values[_key(name)])

    def _between(self, original: nn.Parameter, tuned: nn.Parameter) -> Tensor:
        if self._strength == 1.0:
            return tuned
        if self._strength == 0.0:
            return self._beside(original, tuned)
        with torch.no_grad():
            return torch.lerp(self._beside(original, tuned), tuned, self._strength)

    @staticmethod
    def _beside(original: nn.Parameter, tuned: nn.Parameter) -> nn.Parameter:
        """The original, moved to where the model is now: while it is replaced, `Module.to` does not reach it."""
        if original.device != tuned.device or original.dtype != tuned.dtype:
            original.data = original.data.to(tuned)
        return original

    def _place(self, name: str) -> tuple[nn.Module, str]:
        path, _, last = name.rpartition(".")
        return self.backbone.model.get_submodule(path), last


@register_delta("bias")
class Bias(Subset):
    """Every bias (Ben Zaken et al., "BitFit", ACL 2022)."""

    role = "bias"


@register_delta("norm")
class Norm(Subset):
    """Scale and shift of every normalisation layer."""

    role = "norm"


@register_delta("full")
class Full(Subset):
    """Every parameter of the backbone, which stays in eval mode."""


@register_delta("partial")
class Partial(Subset):
    """The last blocks and the norm behind them (Jia et al., ECCV 2022, section 4.1, "Partial-k")."""

    def __init__(self, backbone: Backbone, blocks: int = 1) -> None:
        """Copies the parameters.

        Args:
            backbone: The backbone that they are chosen from.
            blocks: How many blocks, counted from the last.

        Raises:
            ConfigError: There are not so many blocks.
            UnsupportedBackboneError: The blocks of the backbone are not known.
        """
        DeltaPart.__init__(self, backbone)
        depth = len(backbone.layout.blocks)
        if not 1 <= blocks <= depth:
            raise ConfigError(f"{backbone.name} has {depth} blocks: partial takes 1 to {depth}, got {blocks}.")
        self.first_block = depth - blocks
        self._copy("last", blocks)


def _key(name: str) -> str:
    return name.replace(".", "/")
