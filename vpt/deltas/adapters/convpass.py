"""Convolutional bypasses beside attention and MLP (Jie & Deng, "Convpass", arXiv 2207.07039, 2022)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from vpt.backbones.attention.windows import BESIDE, WITHOUT_PLACE, Places, window_places
from vpt.backbones.factory import Backbone
from vpt.backbones.strength import Place
from vpt.deltas.adapters.adapter import quick_gelu
from vpt.deltas.base import DeltaPart, Handle, chosen_blocks
from vpt.deltas.registry import register_delta
from vpt.errors import ConfigError, UnknownNameError

SUBLAYERS: dict[str, tuple[str, ...]] = {"both": ("attn", "mlp"), "attn": ("attn",)}


@register_delta("convpass")
class Convpass(DeltaPart):
    """Adds factor · up(σ(conv(σ(down(x))))) to the output of a sublayer whose input is x; σ(h) = h · sigmoid(1.702 h).

    The convolution, 3 × 3 with zeros around, sees patches at their places, on a Swin those of the whole map, whatever
    its windows; and each other token, such as the class token or a prompt, as an image of its own. Its strength scales
    what is added.

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
            backbone: The backbone that the bypasses are for.
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
        if beside not in SUBLAYERS:
            raise UnknownNameError("beside", beside, SUBLAYERS)
        chosen = chosen_blocks(len(backbone.layout.blocks), layers)
        self.first_block, self.rank, self.factor = chosen[0], rank, factor
        self._sublayers: dict[str, nn.Module] = {}
        self._places: dict[str, Places] = {}
        self.down, self.conv, self.up = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for index in chosen:
            for name in SUBLAYERS[beside]:
                self._put(index, name)

    def _put(self, index: int, name: str) -> None:
        layout, like, key = self.backbone.layout, self.backbone.mean, f"{index}_{name}"
        block, dim = layout.blocks[index], layout.dims[index]
        self._sublayers[key] = cast("nn.Module", getattr(block, name))
        cut = window_places(block) if layout.windowed else Places(layout.grid, layout.grid)
        self._places[key] = cut if name == "attn" else Places(cut.grid, cut.grid)
        down = nn.Linear(dim, self.rank, device=like.device, dtype=like.dtype)
        conv = nn.Conv2d(self.rank, self.rank, 3, padding=1, device=like.device, dtype=like.dtype)
        up = nn.Linear(self.rank, dim, device=like.device, dtype=like.dtype)
        nn.init.xavier_uniform_(down.weight)
        nn.init.dirac_(conv.weight)
        for zero in (down.bias, conv.bias, up.weight, up.bias):
            nn.init.zeros_(cast("Tensor", zero))
        self.down[key], self.conv[key], self.up[key] = down, conv, up

    def hooks(self) -> Iterator[Handle]:
        """A bypass around every chosen sublayer."""
        for key, layer in self._sublayers.items():
            yield layer.register_forward_hook(partial(self._add, key))
            if self.backbone.layout.windowed and key.endswith("_attn"):
                yield layer.register_forward_hook(partial(self._add_beside_map, key))

    def places(self) -> Mapping[Any, Place]:
        """See `DeltaPart`."""
        return dict(self._sublayers)

    def adds_to(self) -> list[nn.Module]:
        """See `DeltaPart`."""
        return list(self._sublayers.values())

    def expected_parameters(self) -> int:
        """2 · rank · dim + 9 · rank² + 2 · rank + dim for each bypass."""
        dims = [len(cast("Tensor", layer.bias)) for layer in self.up.values()]
        return sum(2 * self.rank * dim + 9 * self.rank**2 + 2 * self.rank + dim for dim in dims)

    def _add(self, key: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if self.at(key) == 0.0:
            return out
        tokens, prefix = args[0], self.backbone.layout.num_prefix
        # The last block may have kept nothing but what is pooled.
        alone = WITHOUT_PLACE.get() or tokens.shape[1] <= prefix
        return out + self._bypass(key, tokens, tokens.shape[1] if alone else None, out.shape[1])

    def _add_beside_map(self, key: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        """Prompts beside the map of a Swin, which its attention as a module does not see."""
        beside = BESIDE.get()
        if beside is not None and self.at(key) != 0.0:
            beside.add(lambda tokens: self._bypass(key, tokens, tokens.shape[1]))

    def _bypass(self, key: str, tokens: Tensor, alone: int | None = None, keep: int | None = None) -> Tensor:
        """What is added for tokens (B, N, dim), of which the first `alone` have no place; None for all but patches."""
        hidden = self._convolved(key, quick_gelu(self.down[key](tokens)), alone)[:, :keep]
        change: Tensor = self.up[key](quick_gelu(hidden)) * (self.factor * self.at(key))
        return change

    def _convolved(self, key: str, tokens: Tensor, alone: int | None) -> Tensor:
        """Convolves tokens (B, N, rank): the patches, the last of them, as a map, and all others alone."""
        conv, places, number = cast("nn.Conv2d", self.conv[key]), self._places[key], tokens.shape[1]
        alone = number - places.area if alone is None else alone
        # Of a token without neighbours the convolution sees the middle alone.
        others = linear(tokens[:, :alone], conv.weight[:, :, 1, 1], conv.bias)
        if alone == number:
            return others
        patches = places.cut(conv(places.stitch(tokens[:, alone:].transpose(1, 2)))).transpose(1, 2)
        return torch.cat([others, patches], dim=1)
