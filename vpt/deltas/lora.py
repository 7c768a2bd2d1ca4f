"""Low-rank adaptation of linear maps (Hu et al., "LoRA", ICLR 2022, section 4.1): W + (scale/rank) · B A."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vpt.backbones.factory import Backbone
from vpt.backbones.target_modules import LinearTarget, linear_targets
from vpt.deltas.base import Handle, MergeablePart, MergedWeight, chosen_blocks
from vpt.deltas.registry import register_delta
from vpt.errors import ConfigError, UnknownNameError


@register_delta("lora")
class Lora(MergeablePart):
    """Low-rank changes to chosen linear maps of every block.

    The change is computed beside the frozen map, so that a fused query-key-value layer can be changed in part. Its
    strength scales the change: at 0 the frozen map runs alone. By ``block_name``, `targets` are the maps, `down` their
    A, (rank, inputs), and `up` their B, (outputs, rank), zero at first: training starts from the backbone.
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
            targets: Any of ``q``, ``k``, ``v``, ``proj``, ``fc1``, ``fc2`` (`vpt.backbones.target_modules`).
            layers: Only in blocks ``[first, last + 1]``, counted from 0; None for all.
        """
        super().__init__(backbone)
        if rank < 1:
            raise ConfigError(f"The rank of LoRA must be at least 1, got {rank}.")
        blocks = linear_targets(backbone)
        known = list(blocks[0])
        if not targets:
            raise ConfigError(f"LoRA needs at least one target of {', '.join(known)}.")
        if len(set(targets)) < len(targets) or scale == 0:
            raise ConfigError(f"LoRA needs different targets and a scale that is not 0, got {[*targets]} and {scale}.")
        for name in targets:
            if name not in known:
                raise UnknownNameError(f"LoRA target of {backbone.name}", name, known)
        chosen = chosen_blocks(len(blocks), layers)
        self.first_block = chosen[0]
        self.factor = 1.0 if scale is None else scale / rank
        self.targets: dict[str, LinearTarget] = {
            f"{index}_{name}": blocks[index][name] for index in chosen for name in targets
        }
        self._by_module: dict[nn.Linear, list[str]] = {}
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for key, target in self.targets.items():
            self._by_module.setdefault(target.module, []).append(key)
            down = backbone.mean.new_empty(rank, target.module.in_features)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            self.down[key] = nn.Parameter(down)
            self.up[key] = nn.Parameter(backbone.mean.new_zeros(target.stop - target.start, rank))

    def hooks(self) -> Iterator[Handle]:
        """The low-rank path beside every module that computes one of the maps or several."""
        for module, keys in self._by_module.items():
            yield module.register_forward_hook(partial(self._add, keys))

    def expected_parameters(self) -> int:
        """Σ rank · (inputs + outputs) over the maps."""
        rank = next(iter(self.down.values())).shape[0]
        return sum(rank * (t.module.in_features + t.stop - t.start) for t in self.targets.values())

    def _merged_weights(self) -> Iterator[MergedWeight]:
        """See `MergeablePart`."""
        for module, keys in self._by_module.items():
            yield MergedWeight(module, "weight", partial(self._changed, keys))

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
        return down, assembled * (self.factor * self._strength)

    def _add(self, keys: Sequence[str], module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if self._strength == 0.0 or self.merged:
            return out
        down, up = self._stacked(keys)
        # One product that adds: a sum into a third of a fused layer's output would copy all of it.
        added = torch.addmm(out.flatten(0, -2), args[0].flatten(0, -2) @ down.T, up.T)
        return added.view_as(out)
