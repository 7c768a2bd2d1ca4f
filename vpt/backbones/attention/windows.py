"""What a Swin block does to tokens that belong to no place in the map: prompts that travel beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from timm.models.swin_transformer_v2 import PatchMerging as PatchMergingV2
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn
from torch.nn.functional import pad

from vpt.backbones.attention.base import OpenAttention

Pair = tuple[int, int]


@dataclass(frozen=True)
class Places:
    """A map of patches, cut into windows as timm's Swin cuts it; or whole, as one window.

    `grid` is (rows, columns) of patches in the map, `window` in a window (those at the right and lower edge may hold
    padding), `shift` by how many the map is rolled up and left before it is cut.
    """

    grid: Pair
    window: Pair
    shift: Pair = (0, 0)

    @property
    def area(self) -> int:
        """Patches of a window, padding included."""
        return math.prod(self.window)

    @property
    def across(self) -> Pair:
        """Windows (down, across)."""
        return math.ceil(self.grid[0] / self.window[0]), math.ceil(self.grid[1] / self.window[1])

    @property
    def windows(self) -> int:
        """Windows of a map."""
        return math.prod(self.across)

    def stitch(self, values: Tensor) -> Tensor:
        """Puts the patches of windows into their places: (B · windows, ..., area) to (B, ..., rows, columns)."""
        (down, across), (height, width) = self.across, self.window
        images = values.shape[0] // self.windows  # not `len`, which would fix their number in an exported file
        split = values.reshape(images, down, across, *values.shape[1:-1], height, width)
        maps = split.movedim((1, 2), (-4, -2)).flatten(-4, -3).flatten(-2, -1)
        whole = maps[..., : self.grid[0], : self.grid[1]]
        return whole.roll(self.shift, dims=(-2, -1)) if any(self.shift) else whole

    def cut(self, maps: Tensor) -> Tensor:
        """Undoes `stitch`, maps (B, ..., rows, columns) to windows; padding gets 0."""
        (down, across), (height, width) = self.across, self.window
        missing = (0, across * width - self.grid[1], 0, down * height - self.grid[0])
        if any(self.shift):
            maps = maps.roll((-self.shift[0], -self.shift[1]), dims=(-2, -1))
        padded = pad(maps, missing) if any(missing) else maps
        split = padded.unflatten(-1, (across, width)).unflatten(-3, (down, height))  # type: ignore[no-untyped-call]
        windows: Tensor = split.movedim((-4, -2), (1, 2)).flatten(-2).flatten(0, 2)
        return windows


def window_places(block: Any) -> Places:
    """Reads how a block of Swin or Swin V2 cuts its map."""
    return Places(tuple(block.input_resolution), tuple(block.window_size), tuple(block.shift_size))


def patch_mergings(model: Any) -> dict[int, nn.Module]:
    """Finds where Swin or Swin V2 halves the map: the merging before a block, by the block's position."""
    found, block = {}, 0
    for stage in model.layers:
        if not isinstance(stage.downsample, nn.Identity):
            found[block] = stage.downsample
        block += len(stage.blocks)
    return found


@dataclass(eq=False)
class Beside:
    """Tokens of one call that run beside the map through one block, (B, n, dim), by whom they belong to.

    `onward` are those whose tokens are needed behind the block, `asking` what its attention made of them, as they enter
    its projection, (B, n, dim), and as queries; `answers` what they gathered, (B, n, dim).
    """

    tokens: Mapping[Any, Tensor]
    onward: Collection[Any]
    asking: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)
    answers: dict[Any, Tensor] = field(default_factory=dict)

    def add(self, change: Callable[[Tensor], Tensor]) -> None:
        """Adds to the answers of an attention what `change` makes of tokens as they entered it, (B, n, dim)."""
        for owner, answers in self.answers.items():
            self.answers[owner] = answers + change(self.asking[owner][0])


BESIDE: ContextVar[Beside | None] = ContextVar("tokens beside the map", default=None)
"""Set while a block runs, by `block_beside`, so that a block that is run again for activation checkpointing, or in
another thread, finds the tokens of its own call."""

WITHOUT_PLACE: ContextVar[bool] = ContextVar("tokens without a place pass an MLP", default=False)
"""Set while tokens from beside the map pass the MLP of a block, as the patches of the map do before them."""


def block_beside(
    block: nn.Module, x: Tensor, tokens: Mapping[Any, Tensor], onward: Collection[Any]
) -> tuple[Tensor, dict[Any, Tensor]]:
    """Runs a Swin block with tokens (B, n, dim), by whom they belong to, beside its map x (B, H, W, dim).

    The edits of its attention read `BESIDE`. Returns the map behind it, and there the tokens of those in `onward`.
    """
    beside = Beside(tokens, onward)
    before = BESIDE.set(beside)
    try:
        x = block(x)
    finally:
        BESIDE.reset(before)
    return x, {owner: rest_of_block(block, tokens[owner], answers) for owner, answers in beside.answers.items()}


def merge_tokens(merging: Any, tokens: Tensor) -> Tensor:
    """Passes tokens without place through a patch merging, each as four patches: (B, n, dim) to (B, n, 2 · dim)."""
    four = torch.cat([tokens] * 4, dim=-1)
    if isinstance(merging, PatchMergingV2):
        return cast("Tensor", merging.norm(merging.reduction(four)))
    return cast("Tensor", merging.reduction(merging.norm(four)))


def window_answers(
    attention: OpenAttention, entering: Tensor, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None
) -> Tensor:
    """What tokens of an image gather in each of its windows, averaged over the windows, (B, n, dim).

    `entering`, (B, n, dim), is what the attention's projection saw; queries are (B, heads, n, head_dim), keys and
    values all of each window, (B · windows, heads, K, head_dim), and so is the bias on the logits.
    """
    windows = attention.windows
    out = attention.attend(queries.repeat_interleave(windows, dim=0), keys, values, bias)
    # Projected in each window and then averaged: behind the projection an adapter may stand, which is not linear.
    answers = attention.finish(entering.repeat_interleave(windows, dim=0), out.transpose(1, 2).flatten(2))
    averaged: Tensor = answers.unflatten(0, (-1, windows)).mean(dim=1)  # type: ignore[no-untyped-call]
    return averaged


def rest_of_block(block: Any, tokens: Tensor, answers: Tensor) -> Tensor:
    """Residual connections and MLP of a block of Swin (pre-norm) or Swin V2 (post-norm), all (B, n, dim).

    `tokens` are those before the block, `answers` what its attention gave them.
    """
    before = WITHOUT_PLACE.set(True)
    try:
        if isinstance(block, SwinTransformerV2Block):
            tokens = tokens + block.drop_path1(block.norm1(answers))
            return cast("Tensor", tokens + block.drop_path2(block.norm2(block.mlp(tokens))))
        tokens = tokens + block.drop_path1(answers)
        return cast("Tensor", tokens + block.drop_path2(block.mlp(block.norm2(tokens))))
    finally:
        WITHOUT_PLACE.reset(before)
