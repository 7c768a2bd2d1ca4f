"""Linear adapters before attention and MLP (Luo et al., "RepAdapter", arXiv 2302.08106, 2023): they merge exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from vpt.backbones.factory import Backbone
from vpt.backbones.strength import Place
from vpt.backbones.target_modules import linear_targets
from vpt.deltas.base import Handle, MergeablePart, MergedWeight, chosen_blocks
from vpt.deltas.registry import register_delta
from vpt.errors import ConfigError, UnknownNameError

BEFORE: dict[str, tuple[str, ...]] = {"both": ("attn", "mlp"), "attn": ("attn",)}
_READ_BY = {"attn": ("q", "k", "v"), "mlp": ("fc1", "fc1_g", "fc1_x")}


@register_delta("rep_adapter")
class RepAdapter(MergeablePart):
    """Gives the first linear layers of attention and MLP x + factor · (B (A x + a) + b) in place of x.

    Without an activation it is a change of their weights and biases, W + factor · W B A and factor · W (B a + b) more.
    Its strength scales the factor. B is block-diagonal, of as many `groups`.

    Attributes:
        down: A by ``block_sublayer``, (rank, dim).
        down_shift: Its biases a, (rank,); zero at first.
        up: The blocks of B, (groups, dim / groups, rank / groups); zero at first: training starts from the backbone.
        up_shift: Its biases b, (dim,); zero at first.
    """

    def __init__(
        self,
        backbone: Backbone,
        rank: int = 8,
        groups: int = 2,
        before: Literal["both", "attn"] = "both",
        factor: float = 1.0,
        layers: Sequence[int] | None = None,
    ) -> None:
        """Draws A by Xavier's rule and sets all else to zero, as the released code.

        Args:
            backbone: The backbone that the adapters are for.
            rank: Width of the bottleneck, at least 1, at most the width of a block, and a multiple of the groups.
            groups: Of the second layer, which divide the width of every block; 1 for a dense one.
            before: Whether attention and MLP have one, or attention alone.
            factor: Multiplies what is added, s in the paper, which chooses it for each task; not 0.
            layers: Only in blocks ``[first, last + 1]``, counted from 0; None for all.
        """
        super().__init__(backbone)
        if factor == 0:
            raise ConfigError("The factor of a RepAdapter is 0, with which it adds nothing: give another.")
        if before not in BEFORE:
            raise UnknownNameError("before", before, BEFORE)
        blocks, dims = linear_targets(backbone), backbone.layout.dims
        chosen = chosen_blocks(len(blocks), layers)
        widths = [dims[index] for index in chosen]
        if not 1 <= rank <= min(widths):
            raise ConfigError(f"The rank of a RepAdapter on {backbone.name} is 1 to {min(widths)}, got {rank}.")
        if groups < 1 or any(each % groups for each in (rank, *widths)):
            raise ConfigError(
                f"The groups of a RepAdapter divide its rank, {rank}, and the widths of the blocks, "
                f"{', '.join(map(str, sorted(set(widths))))}, got {groups}: give 1 or another divisor."
            )
        self.first_block, self.rank, self.groups, self.factor = chosen[0], rank, groups, factor
        self._readers: dict[str, list[nn.Linear]] = {}
        like = backbone.mean
        self.down, self.down_shift = nn.ParameterDict(), nn.ParameterDict()
        self.up, self.up_shift = nn.ParameterDict(), nn.ParameterDict()
        for index in chosen:
            for name in BEFORE[before]:
                key, maps = f"{index}_{name}", blocks[index]
                self._readers[key] = list(dict.fromkeys(maps[each].module for each in _READ_BY[name] if each in maps))
                dim = dims[index]
                self.down[key] = nn.Parameter(nn.init.xavier_uniform_(like.new_empty(rank, dim)))
                self.down_shift[key] = nn.Parameter(like.new_zeros(rank))
                self.up[key] = nn.Parameter(like.new_zeros(groups, dim // groups, rank // groups))
                self.up_shift[key] = nn.Parameter(like.new_zeros(dim))

    def hooks(self) -> Iterator[Handle]:
        """An adapter before every layer that reads what it changes."""
        for key, layers in self._readers.items():
            for layer in layers:
                yield layer.register_forward_pre_hook(partial(self._change, key))

    def places(self) -> Mapping[Any, Place]:
        """See `DeltaPart`."""
        return {key: layers[0] for key, layers in self._readers.items()}

    def expected_parameters(self) -> int:
        """Rank · dim · (1 + 1/groups) + rank + dim for each adapter."""
        dims = [len(shift) for shift in self.up_shift.values()]
        return sum(self.rank * dim + self.rank * dim // self.groups + self.rank + dim for dim in dims)

    def _merged_weights(self) -> Iterator[MergedWeight]:
        """See `MergeablePart`."""
        for key, layers in self._readers.items():
            for layer in layers:
                yield MergedWeight(layer, "weight", partial(self._weight, key))
                yield MergedWeight(layer, "bias", partial(self._bias, key, layer))

    def _weight(self, key: str, weight: Tensor) -> Tensor:
        return torch.addmm(weight, weight @ self._map(key)[0], self.down[key])

    def _bias(self, key: str, layer: nn.Linear, bias: Tensor | None) -> Tensor:
        up, shift = self._map(key)
        change = torch.mv(cast("Tensor", layer._parameters["weight"]), torch.addmv(shift, up, self.down_shift[key]))
        return change if bias is None else bias + change

    def _map(self, key: str) -> tuple[Tensor, Tensor]:
        """B, (dim, rank), and b, (dim,), at their strength."""
        share = self.factor * self.at(key)
        dense: Tensor = torch.block_diag(*self.up[key])  # type: ignore[no-untyped-call]
        return dense * share, self.up_shift[key] * share

    def _change(self, key: str, layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self.at(key) == 0.0 or self.merged:
            return None
        return (args[0] + linear(linear(args[0], self.down[key], self.down_shift[key]), *self._map(key)), *args[1:])
