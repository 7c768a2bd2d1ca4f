"""What the summarising token attends to, layer by layer, computed beside the fused path without changing it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vpt.backbones.factory import Backbone
from vpt.backbones.recording import AttentionCall, recording


@dataclass(frozen=True)
class LayerAttention:
    """Attention of one block, from the class token, or averaged over all patches where there is none.

    The three parts are shares of the same softmax: over their last dimensions they sum to 1, less what goes to the
    padding of a Swin whose windows do not fit its map.

    Attributes:
        prefix: To class, distillation and register tokens, (B, heads, prefix tokens).
        patches: To patches of the block's own map in row-major order, (B, heads, rows · columns).
        prompts: To prompts, (B, heads, n); n is 0 without prompts or at strength 0.
        keys: How many keys a query sees, prompts included.
    """

    prefix: Tensor
    patches: Tensor
    prompts: Tensor
    keys: int


@torch.no_grad()
def class_attention(backbone: Backbone, images: Tensor) -> list[LayerAttention]:
    """Records the attention of every block in one forward pass.

    Args:
        backbone: With or without prompts attached.
        images: (B, 3, H, W), uint8 in [0, 255] or float in [0, 1].

    Returns:
        One entry per block, first to last.

    Raises:
        UnsupportedBackboneError: The backbone's attention cannot be read.
    """
    with recording(backbone) as calls:
        backbone(images)
    queries = 1 if backbone.layout.has_class_token else None
    return [summarise(call, call.weights(queries), queries is not None) for call in calls]


def summarise(call: AttentionCall, weights: Tensor, by_token: bool) -> LayerAttention:
    """Reads the summarising token's attention from weights.

    Args:
        call: What they are of.
        weights: (rows, heads, queries, keys), of the first token at least if `by_token`, else of all.
        by_token: Whether token 0 summarises the image; else the mean over its patches is taken.

    Returns:
        Its attention.
    """
    start, tokens, places = call.first_patch, call.tokens, call.places
    if by_token:
        weights = weights[:, :, 0]
    else:
        # Padding asks too, but nobody hears the answer.
        real = places.cut(weights.new_ones(1, *places.grid)).repeat(len(weights) // places.windows, 1)
        weights = torch.einsum("rhqk,rq->rhk", weights[:, :, start:tokens], real) / real[: places.windows].sum()
    whole = weights.unflatten(0, (-1, places.windows)).sum(dim=1)  # type: ignore[no-untyped-call]
    return LayerAttention(
        prefix=whole[..., : call.num_prefix],
        patches=places.stitch(weights[..., start:tokens]).flatten(-2),
        prompts=torch.cat([whole[..., call.num_prefix : start], whole[..., tokens:]], dim=-1),
        keys=weights.shape[-1],
    )
