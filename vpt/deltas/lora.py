"""Low-rank adaptation of linear maps (Hu et al., "LoRA", ICLR 2022, section 4.1): W + (scale/rank) · B A.

The weight of a convolution, (outputs, inputs, rows, columns), is such a map of inputs · rows · columns values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vpt.backbones.factory import Backbone
from vpt.backbones.strength import Place
from vpt.backbones.target_modules import LinearTarget, linear_targets, named_layers
from vpt.deltas.base import Handle, MergeablePart, MergedWeight, Parametrization, chosen_blocks
from vpt.deltas.registry import register_delta
from vpt.errors import ConfigError, UnknownNameError


@register_delta("lora")
class Lora(MergeablePart):
    """Low-rank changes to chosen linear maps of every block, or to layers by name.

    The change of a linear map is computed beside the frozen one, so that a fused query-key-value layer can be changed
    in part; that of a convolution in its weight, whatever the layer does with that. Its strength scales the change: at
    0 the frozen map runs alone. By ``block_name``, or the layer's name with ``/`` for ``.``, `targets` are linear maps,
    `convolutions` the others, `down` their A, (rank, inputs) or (rank, inputs, rows, columns), and `up` their B,
    (outputs, rank), zero at first: training starts from the backbone.
    """

    def __init__(
        self,
        backbone: Backbone,
        rank: int = 8,
        scale: float | None = None,
        targets: Sequence[str] = ("q", "v"),
        layers: Sequence[int] | None = None,
    ) -> None:
        """Draws A as PyTorch draws a linear layer and sets B to zero.

        Args:
            backbone: The backbone that the change is for.
            rank: Of each change, at least 1.
            scale: Numerator of the factor scale/rank; None for the rank itself, a factor of 1.
            targets: Any of ``q``, ``k``, ``v``, ``proj``, ``fc1``, ``fc2`` of a vision transformer's blocks; and linear
                layers and convolutions of any backbone by name (`vpt.backbones.target_modules.named_layers`).
            layers: Of a vision transformer's maps, only in blocks ``[first, last + 1]``, counted from 0; None for all.
        """
        super().__init__(backbone)
        if rank < 1:
            raise ConfigError(f"The rank of LoRA must be at least 1, got {rank}.")
        blocks = linear_targets(backbone) if backbone.has_layout else []
        known = list(blocks[0]) if blocks else []
        if not targets:
            raise ConfigError(f"LoRA needs at least one target{' of ' if known else ''}{', '.join(known)}.")
        if len(set(targets)) < len(targets) or scale == 0:
            raise ConfigError(f"LoRA needs different targets and a scale that is not 0, got {[*targets]} and {scale}.")
        if not known and list(targets) == ["q", "v"]:
            raise ConfigError(
                f"The blocks of {backbone.name} are not known, and so no q and v: name layers in LoRA's targets, such "
                "as all-linear or all-conv."
            )
        by_name = self._by_name(known, targets)
        if by_name and layers is not None:
            raise ConfigError(f"layers are of a block's {', '.join(known) or 'maps'}, not of layers by name.")
        chosen = [] if len(by_name) == len(targets) else chosen_blocks(len(blocks), layers)
        self.first_block = 0 if by_name else chosen[0]
        self.factor = 1.0 if scale is None else scale / rank
        self.targets: dict[str, LinearTarget] = {
            f"{index}_{name}": blocks[index][name] for index in chosen for name in targets if name in known
        }
        self.convolutions: dict[str, nn.Conv2d] = {}
        for name, layer in (named_layers(backbone, by_name) if by_name else {}).items():
            if isinstance(layer, nn.Conv2d):
                self.convolutions[name.replace(".", "/")] = layer
            elif any(layer is target.module for target in self.targets.values()):
                raise ConfigError(f"{name} would be changed twice: by its name, and as one of {', '.join(known)}.")
            else:
                self.targets[name.replace(".", "/")] = LinearTarget(layer, 0, layer.out_features)
        self._by_module: dict[nn.Linear, list[str]] = {}
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for key, target in self.targets.items():
            self._by_module.setdefault(target.module, []).append(key)
            down = backbone.mean.new_empty(rank, target.module.in_features)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            self.down[key] = nn.Parameter(down)
            self.up[key] = nn.Parameter(backbone.mean.new_zeros(target.stop - target.start, rank))
        for key, layer in self.convolutions.items():
            down = backbone.mean.new_empty(rank, *layer.weight.shape[1:])
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            self.down[key] = nn.Parameter(down)
            self.up[key] = nn.Parameter(backbone.mean.new_zeros(layer.out_channels, rank))

    def _by_name(self, known: Sequence[str], targets: Sequence[str]) -> list[str]:
        """The targets that are layers by name; an UnknownNameError, which names maps too, where one is none."""
        found = [name for name in targets if name not in known]
        for name in found:
            try:
                named_layers(self.backbone, [name])
            except UnknownNameError as error:
                kind = f"LoRA target of {self.backbone.name}"
                raise UnknownNameError(kind, name, dict.fromkeys([*known, *error.known])) from error
        return found

    def hooks(self) -> Iterator[Handle]:
        """The low-rank path beside every module that computes one of the maps or several."""
        for module, keys in self._by_module.items():
            yield module.register_forward_hook(partial(self._add, keys))
        for key, layer in self.convolutions.items():
            try:
                yield Parametrization(layer, "weight", partial(self._convolved, key))
            except ConfigError as error:
                raise ConfigError(f"Two deltas train {key.replace('/', '.')}.weight: keep one of them.") from error

    def places(self) -> Mapping[Any, Place]:
        """See `DeltaPart`."""
        return {**{key: target.module for key, target in self.targets.items()}, **self.convolutions}

    def adds_to(self) -> list[nn.Module]:
        """See `DeltaPart`; the change of a convolution lies in its weight."""
        return [] if self.convolutions else [*self._by_module]

    def expected_parameters(self) -> int:
        """Σ rank · (inputs + outputs) over the maps; the inputs of a convolution are those of one group, times k²."""
        rank = len(next(iter(self.down.values())))
        linear: int = sum(rank * (t.module.in_features + t.stop - t.start) for t in self.targets.values())
        return linear + rank * sum(c.weight[0].numel() + c.out_channels for c in self.convolutions.values())

    def _merged_weights(self) -> Iterator[MergedWeight]:
        """See `MergeablePart`."""
        for module, keys in self._by_module.items():
            yield MergedWeight(module, "weight", partial(self._changed, keys))

    def _convolved(self, key: str, weight: Tensor) -> Tensor:
        if (strength := self.at(key)) == 0.0:
            return weight
        change = (self.up[key] * (self.factor * strength)) @ self.down[key].flatten(1)
        return torch.add(weight, change.view_as(weight))

    @torch.no_grad()
    def merge_for_good(self) -> None:
        """See `MergeablePart`."""
        self.merge()  # which may be refused, before anything is changed
        convolved = [handle for handle in self._handles if isinstance(handle, Parametrization)]
        values = [handle.value.detach().clone() for handle in convolved]
        for handle in convolved:
            handle.remove()
            self._handles.remove(handle)
        super().merge_for_good()
        for handle, value in zip(convolved, values, strict=True):
            handle.module._parameters[handle.name] = nn.Parameter(value, requires_grad=False)

    def _changed(self, keys: Sequence[str], weight: Tensor) -> Tensor:
        down, up = self._stacked(keys)
        return torch.addmm(weight, up, down)

    def _stacked(self, keys: Sequence[str]) -> tuple[Tensor, Tensor]:
        """A and B of all maps of a module as one: (ranks, inputs), and scaled (outputs of the module, ranks)."""
        down = torch.cat([self.down[key] for key in keys])
        rank, columns = len(down) // len(keys), []
        for key in keys:
            target = self.targets[key]
            columns.append(pad(self.up[key], (0, 0, target.start, target.module.out_features - target.stop)))
        assembled = columns[0] if rank == len(down) else torch.cat(columns, dim=1)
        return down, assembled * (self.factor * self.at(keys[0]))

    def _add(self, keys: Sequence[str], module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if self.at(keys[0]) == 0.0 or self.merged:
            return out
        down, up = self._stacked(keys)
        # One product that adds: a sum into a third of a fused layer's output would copy all of it.
        added = torch.addmm(out.flatten(0, -2), args[0].flatten(0, -2) @ down.T, up.T)
        return added.view_as(out)
