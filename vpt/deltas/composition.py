"""`Delta`: what is trained on top of a frozen backbone, as a composition of named parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from vpt.argument_types import argument
from vpt.backbones.factory import Backbone
from vpt.backbones.strength import Strength, checked_strength
from vpt.deltas.base import DeltaPart
from vpt.deltas.registry import DeltaSpec, Specs, read_specs
from vpt.errors import ConfigError


class Delta(nn.Module):
    """An ordered composition of deltas on one backbone: its `parts`, and their `specs` in `DeltaSpec`'s form."""

    def __init__(self, backbone: Backbone, specs: Specs) -> None:
        """Builds the parts that `read_specs` reads; `attach` puts them on."""
        argument("a delta", "backbone", backbone, Backbone)
        super().__init__()
        read = read_specs(specs)
        self.specs = [spec.plain() for spec in read]
        self.parts = nn.ModuleList(spec.build(backbone) for spec in read)

    def _all(self) -> list[DeltaPart]:
        return [cast("DeltaPart", part) for part in self.parts]

    def attach(self) -> None:
        """Puts every part on, or none if one is refused; a ConfigError where two train the same parameter."""
        try:
            for part in self._all():
                part.attach()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Takes every part off again; the backbone is bit for bit what it was."""
        for part in reversed(self._all()):
            part.detach()

    def folded(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """What a delta file keeps: the specs of an equal delta in their canonical form, and its tensors."""
        specs: list[dict[str, Any]] = []
        tensors: dict[str, Tensor] = {}
        for index, (spec, part) in enumerate(zip(self.specs, self._all(), strict=True)):
            changes, own = part.folded()
            specs.append(DeltaSpec.read(spec | changes).plain())
            tensors |= {f"parts.{index}.{key}": tensor for key, tensor in own.items()}
        return specs, tensors

    def unfolded(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `folded`, as an equal delta's state; a ConfigError where nothing gives these tensors."""
        found: dict[str, Tensor] = {}
        for index, part in enumerate(self._all()):
            prefix = f"parts.{index}."
            own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            found |= {prefix + key: tensor for key, tensor in part.unfolded(own).items()}
        return found

    @property
    def strength(self) -> Strength:
        """α in [0, 1] of all parts: 1 tuned, 0 the frozen backbone, exactly; or that of each layer.

        A ConfigError where the parts differ.
        """
        found = {part.strength for part in self._all()}
        if len(found) > 1:
            raise ConfigError(
                f"The parts of this delta have different strengths, {', '.join(sorted(map(str, found)))}: "
                "set one for all with set_strength, or read those of its parts."
            )
        return found.pop() if found else 1.0

    def set_strength(self, alpha: float | Sequence[float]) -> None:
        """Sets the strength of every part: 1 for the tuned model, 0 for the backbone; of all layers, or of each.

        Between them log α is added to the attention logits of prompt keys (scaling the prompts themselves would do
        nothing: the norm removes it), trained parameters of the backbone are interpolated, and the changes of all other
        deltas are scaled. Layers and errors are as `vpt.backbones.strength.checked_strength` says; after an error no
        part has changed. Shallow prompts have the strength of the first block.
        """
        for part in self._all():
            checked_strength(alpha, part.backbone)
        for part in self._all():
            part.strength = alpha


def attach(backbone: Backbone, specs: Specs) -> Delta:
    """Puts a delta on a backbone, in the mode that the backbone is in: of training or of evaluation.

    Args:
        backbone: A backbone from `create_backbone`.
        specs: One dict per part, e.g. ``[{"name": "prompt", "num_tokens": 10, "deep": True}]``, or the name alone of a
            part that needs no arguments, e.g. ``"lora"``; of a single part also without the list.

    Returns:
        The handle: its parameters are the trained ones, `detach()` restores the backbone bit for bit.

    Raises:
        UnknownNameError: A name or an argument does not exist.
        ConfigError: `backbone` is none, `specs` say no parts, or an argument is missing or out of range.
        UnsupportedBackboneError: The backbone cannot take one of the parts.
    """
    if isinstance(specs, Sequence) and not specs:
        raise ConfigError('An empty delta changes nothing: give at least one part, e.g. {"name": "prompt"}.')
    delta = Delta(backbone, specs).train(backbone.training)
    delta.attach()
    return delta
