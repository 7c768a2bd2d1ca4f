"""Parameters of the backbone itself that are trained: biases, norms, the last blocks, or all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vpt.backbones.factory import Backbone
from vpt.backbones.frozen_weights import wide_weights
from vpt.backbones.strength import Place
from vpt.backbones.target_modules import bias_spans, parameter_names, stages
from vpt.deltas.base import DeltaPart, Parametrization
from vpt.deltas.registry import register_delta
from vpt.errors import ConfigError


class Subset(DeltaPart):
    """Trains copies of chosen parameters, which stand in for the backbone's own while attached.

    The originals stay where they are, so that strength interpolates between both (`torch.lerp`, with a gradient) and
    `detach` leaves no trace. The copies are `values`, by timm's name with ``/`` for ``.``.
    """

    role: ClassVar[str] = "all"

    def __init__(self, backbone: Backbone) -> None:
        """Copies the parameters; a ConfigError where the backbone has none of that kind."""
        super().__init__(backbone)
        self._copy(parameter_names(backbone, self.role))

    def _claim(self, names: list[str]) -> dict[str, nn.Parameter]:
        """Those of the backbone's parameters, by name, which it changes from now on; a ConfigError where it cannot."""
        own = dict(self.backbone.model.named_parameters())
        if not names:
            raise ConfigError(f"{self.backbone.name} has no parameter of the kind that {type(self).__name__} trains.")
        if self.backbone.narrow and (kept := [name for name in names if name in wide_weights(self.backbone.model)]):
            raise ConfigError(f"frozen_dtype is of what stays frozen, and {kept[0]} is to be trained: leave it out.")
        self._names = names
        return {name: own[name] for name in names}

    def _copy(self, names: list[str]) -> None:
        own = self._claim(names)
        taken = {to_key(name): self._taken(to_key(name), each.detach()) for name, each in own.items()}
        self.values = nn.ParameterDict({key: nn.Parameter(value.clone()) for key, value in taken.items()})
        self.replaced = sum(value.numel() for value in taken.values())

    def _taken(self, key: str, original: Tensor) -> Tensor:
        """What of a parameter trains: all of it."""
        return original

    def hooks(self) -> Iterator[Parametrization]:
        """A computation in place of each original; a ConfigError where another delta trains it."""
        for name in self._names:
            path, _, last = name.rpartition(".")
            owner = self.backbone.model.get_submodule(path)
            try:
                yield Parametrization(owner, last, partial(self._value, to_key(name)))
            except ConfigError as error:
                raise ConfigError(f"Two deltas train {name}: keep one of them.") from error

    def places(self) -> Mapping[Any, Place]:
        """See `DeltaPart`."""
        return {to_key(name): name for name in self._names}

    def _value(self, key: str, original: Tensor) -> Tensor:
        if (strength := self.at(key)) == 0.0:
            return original
        tuned = self.values[key]
        return tuned if strength == 1.0 else torch.lerp(original, tuned, strength)

    @torch.no_grad()
    def keep(self) -> None:
        """Detaches for good: the values, at the present strength, stay behind in the backbone's own parameters."""
        own = dict(self.backbone.model.named_parameters())
        used = {name: self._value(to_key(name), own[name]).clone() for name in self._names}
        self.detach()
        for name, value in used.items():
            own[name].copy_(value)

    def expected_parameters(self) -> int:
        """As many as the originals have."""
        return self.replaced


@register_delta("bias")
class Bias(Subset):
    """Every bias (Ben Zaken et al., "BitFit", ACL 2022), or those of some linear maps.

    Of a bias that several maps share, such as that of queries, keys and values, the entries of these maps are in
    `values`, one behind the other.
    """

    def __init__(self, backbone: Backbone, targets: Sequence[str] | None = None) -> None:
        """Copies the parameters.

        Args:
            backbone: The backbone whose biases are trained.
            targets: Only those of these maps of every block of a vision transformer: any of ``q``, ``k``, ``v``,
                ``proj``, ``fc1``, ``fc2``; None for all biases.
        """
        DeltaPart.__init__(self, backbone)
        if targets is not None and (not targets or len(set(targets)) < len(targets)):
            raise ConfigError(f"targets of bias are one or more different maps, such as k and v, got {[*targets]}.")
        spans = {} if targets is None else bias_spans(backbone, targets)
        self._spans = {to_key(name): where for name, where in spans.items()}
        self._copy(parameter_names(backbone, "bias") if targets is None else [*spans])

    def _taken(self, key: str, original: Tensor) -> Tensor:
        spans = self._spans.get(key)
        return original if spans is None else torch.cat([original[start:stop] for start, stop in spans])

    def _value(self, key: str, original: Tensor) -> Tensor:
        if key not in self._spans or self.at(key) == 0.0:
            return super()._value(key, original)
        tuned = super()._value(key, self._taken(key, original))
        pieces, end = list[Tensor](), 0
        for start, stop in self._spans[key]:
            pieces += [original[end:start], tuned[: stop - start]]
            tuned, end = tuned[stop - start :], stop
        return torch.cat([*pieces, original[end:]])


@register_delta("norm")
class Norm(Subset):
    """Scale and shift of every normalisation layer."""

    def __init__(self, backbone: Backbone, bias: bool = True) -> None:
        """Copies the parameters; without `bias` the scales alone, so that it goes together with the delta `bias`."""
        DeltaPart.__init__(self, backbone)
        self._copy(parameter_names(backbone, "norm" if bias else "scale"))


@register_delta("full")
class Full(Subset):
    """Every parameter of the backbone, which stays in eval mode."""


@register_delta("partial")
class Partial(Subset):
    """The last blocks, or stages, and the norm behind them (Jia et al., ECCV 2022, section 4.1, "Partial-k")."""

    def __init__(self, backbone: Backbone, blocks: int = 1) -> None:
        """Copies the parameters of so many blocks, counted from the last; or stages, of no known transformer."""
        DeltaPart.__init__(self, backbone)
        known = backbone.has_layout
        depth = len(backbone.layout.blocks if known else stages(backbone))
        if not 1 <= blocks <= depth:
            parts = "blocks" if known else "stages"
            raise ConfigError(f"{backbone.name} has {depth} {parts}: partial takes 1 to {depth}, got {blocks}.")
        self.first_block = depth - blocks if known else 0
        self._copy(parameter_names(backbone, "last", blocks))


def to_key(name: str) -> str:
    """The name of a parameter as a key of a `ParameterDict`."""
    return name.replace(".", "/")
