"""Convolutional bypasses beside attention and MLP (Jie & Deng, "Convpass", arXiv 2207.07039, 2022)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from vpt.backbones.factory import Backbone
from vpt.backbones.strength import Place
from vpt.deltas.adapters.adapter import quick_gelu
from vpt.deltas.base import DeltaPart, Handle, chosen_blocks
from vpt.deltas.registry import register_delta
from vpt.errors import ConfigError, UnknownNameError, UnsupportedBackboneError

BESIDE: dict[str, tuple[str, ...]] = {"both": ("attn", "mlp"), "attn": ("attn",)}


@register_delta("convpass")
class Convpass(DeltaPart):
    """Adds factor · up(σ(conv(σ(down(x))))) to the output of a sublayer whose input is x; σ(h) = h · sigmoid(1.702 h).

    The convolution, 3 × 3 with zeros around, sees patches at their places, and each other token, such as the class
    token or a prompt in the sequence, as an image of its own. Its strength scales what is added.

    Attributes:
        down: Weights and biases of the first layer by ``block_sublayer``, (rank, dim) and (rank,).
        conv: Those of the convolution, (rank, rank, 3, 3) and (rank,), which starts as the identity.
        up: Those of the last layer, (dim, rank) and (dim,); zero at first: training starts from the backbone.
    """

    def __init__(
        self,
        backbone: Backbone,
        rank: int = 8,
        beside: Literal["both", "attn"] = "both",
        factor: float = 1.0,
        layers: Sequence[int] | None = None,
    ) -> None:
        """Draws the first layers by Xavier's rule, as the released code.

        Args:
            backbone: The backbone that the bypasses are for: one whose tokens are one sequence.
            rank: Width of the bypass, at least 1.
            beside: Whether attention and MLP have one, or attention alone (Convpass-attn).
            factor: Multiplies what is added, s in the paper, which chooses it for each task; not 0.
            layers: Only in blocks ``[first, last + 1]``, counted from 0; None for all.
        """
        super().__init__(backbone)
        if rank < 1:
            raise ConfigError(f"The rank of a bypass must be at least 1, got {rank}.")
        if factor == 0:
            raise ConfigError("The factor of a bypass is 0, with which it adds nothing: give another.")
        if beside not in BESIDE:
            raise UnknownNameError("beside", beside, BESIDE)
        layout = backbone.layout
        if layout.windowed:
            raise UnsupportedBackboneError(
                f"convpass needs all tokens in one sequence, and {backbone.name} attends in windows: use adapter there."
            )
        chosen = chosen_blocks(len(layout.blocks), layers)
        self.first_block, self.rank, self.factor = chosen[0], rank, factor
        self._sublayers = {
            f"{index}_{name}": cast("nn.Module", getattr(layout.blocks[index], name))
            for index in chosen
            for name in BESIDE[beside]
        }
        self._dim, like = layout.dims[0], backbone.mean
        self.down, self.conv, self.up = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for key in self._sublayers:
            down = nn.Linear(self._dim, rank, device=like.device, dtype=like.dtype)
            conv = nn.Conv2d(rank, rank, 3, padding=1, device=like.device, dtype=like.dtype)
            up = nn.Linear(rank, self._dim, device=like.device, dtype=like.dtype)
            nn.init.xavier_uniform_(down.weight)
            nn.init.dirac_(conv.weight)
            for zero in (down.bias, conv.bias, up.weight, up.bias):
                nn.init.zeros_(cast("Tensor", zero))
            self.down[key], self.conv[key], self.up[key] = down, conv, up

    def hooks(self) -> Iterator[Handle]:
        """A bypass around every chosen sublayer."""
        for key, layer in self._sublayers.items():
            yield layer.register_forward_hook(partial(self._add, key))

    def places(self) -> Mapping[Any, Place]:
        """See `DeltaPart`."""
        return dict(self._sublayers)

    def adds_to(self) -> list[nn.Module]:
        """See `DeltaPart`."""
        return list(self._sublayers.values())

    def expected_parameters(self) -> int:
        """2 · rank · dim + 9 · rank² + 2 · rank + dim for each bypass."""
        each = 2 * self.rank * self._dim + 9 * self.rank**2 + 2 * self.rank + self._dim
        return len(self._sublayers) * each

    def _add(self, key: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if (strength := self.at(key)) == 0.0:
            return out
        hidden = self._convolved(cast("nn.Conv2d", self.conv[key]), quick_gelu(self.down[key](args[0])))
        change: Tensor = self.up[key](quick_gelu(hidden[:, : out.shape[1]])) * (self.factor * strength)
        return out + change

    def _convolved(self, conv: nn.Conv2d, tokens: Tensor) -> Tensor:
        """Convolves tokens (B, N, rank): the patches, the last of them, as a map, and all others alone."""
        grid, number = self.backbone.layout.grid, tokens.shape[1]
        # The last block may have kept nothing but what is pooled.
        alone = number if number <= self.backbone.layout.num_prefix else number - math.prod(grid)
        # Of a token without neighbours the convolution sees the middle alone.
        others = linear(tokens[:, :alone], conv.weight[:, :, 1, 1], conv.bias)
        if alone == number:
            return others
        maps = tokens[:, alone:].transpose(1, 2).reshape(tokens.shape[0], self.rank, *grid)
        return torch.cat([others, conv(maps).flatten(2).transpose(1, 2)], dim=1)
