"""What a Swin block does to tokens that belong to no place in the map: prompts that travel beside it."""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.models.swin_transformer_v2 import PatchMerging as PatchMergingV2
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn

from vpt.backbones.attention import OpenAttention
from vpt.backbones.factory import Backbone


def patch_mergings(backbone: Backbone) -> dict[int, nn.Module]:
    """Finds where the map is halved.

    Args:
        backbone: A Swin.

    Returns:
        The merging before a block, by the block's position.
    """
    found, block = {}, 0
    for stage in cast("Any", backbone.model).layers:
        if not isinstance(stage.downsample, nn.Identity):
            found[block] = stage.downsample
        block += len(stage.blocks)
    return found


def merge_tokens(merging: Any, tokens: Tensor) -> Tensor:
    """Passes tokens without place through a patch merging: each counts as all four of its patches.

    Args:
        merging: timm's `PatchMerging` of Swin or Swin V2.
        tokens: (B, n, dim).

    Returns:
        (B, n, 2 · dim).
    """
    four = torch.cat([tokens] * 4, dim=-1)
    if isinstance(merging, PatchMergingV2):
        return cast("Tensor", merging.norm(merging.reduction(four)))
    return cast("Tensor", merging.reduction(merging.norm(four)))


def window_answers(
    attention: OpenAttention, entering: Tensor, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None
) -> Tensor:
    """What tokens of an image gather in each of its windows, averaged over the windows.

    Args:
        attention: The module that asks.
        entering: The tokens as its projection saw them, (B, n, dim).
        queries: (B, heads, n, head_dim).
        keys: All keys of each window, (B · windows, heads, K, head_dim).
        values: Likewise.
        bias: On the logits, broadcastable to (B · windows, heads, n, K), or None.

    Returns:
        (B, n, dim).
    """
    per_window = queries.repeat_interleave(attention.windows, dim=0)
    out = attention.attend(per_window, keys, values, bias)
    averaged = out.unflatten(0, (-1, attention.windows)).mean(dim=1)  # type: ignore[no-untyped-call]
    return attention.finish(entering, averaged.transpose(1, 2).flatten(2))


def rest_of_block(block: Any, tokens: Tensor, answers: Tensor) -> Tensor:
    """Residual connections and MLP of a Swin block.

    Args:
        block: A block of Swin (pre-norm) or Swin V2 (post-norm).
        tokens: (B, n, dim) before the block.
        answers: What its attention gave them, (B, n, dim).

    Returns:
        (B, n, dim) behind the block.
    """
    if isinstance(block, SwinTransformerV2Block):
        tokens = tokens + block.drop_path1(block.norm1(answers))
        return cast("Tensor", tokens + block.drop_path2(block.norm2(block.mlp(tokens))))
    tokens = tokens + block.drop_path1(answers)
    return cast("Tensor", tokens + block.drop_path2(block.mlp(block.norm2(tokens))))


def pool_with(backbone: Backbone, pooled: Tensor, tokens: Tensor) -> Tensor:
    """Averages over the map and over tokens without place, as the reference implementation of VPT does.

    Args:
        backbone: A Swin with average pooling.
        pooled: The average over its final map, (B, dim).
        tokens: (B, n, dim) behind the last block.

    Returns:
        (B, dim).
    """
    rows, columns = backbone.layout.grid
    normed = cast("Any", backbone.model).norm(tokens)
    return cast("Tensor", (pooled * rows * columns + normed.sum(dim=1)) / (rows * columns + tokens.shape[1]))
