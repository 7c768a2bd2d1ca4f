"""What the summarising token attends to, layer by layer, computed beside the fused path without changing it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from vpt.backbones.attention import OpenAttention
from vpt.backbones.factory import Backbone


@dataclass(frozen=True)
class LayerAttention:
    """Attention of one block, from the class token, or averaged over all patches where there is none.

    The three parts are shares of the same softmax: over their last dimensions they sum to 1.

    Attributes:
        prefix: To class, distillation and register tokens, (B, heads, prefix tokens).
        patches: To patches in row-major order, (B, heads, rows · columns).
        prompts: To prompts, (B, heads, n); n is 0 without prompts or at strength 0.
    """

    prefix: Tensor
    patches: Tensor
    prompts: Tensor


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
    layout = backbone.layout
    queries = 1 if layout.has_class_token else None
    inputs: list[Tensor] = []

    def keep(attention: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0])

    hooks = [attention.register_forward_pre_hook(keep) for attention in layout.attentions]
    try:
        backbone(images)
    finally:
        for hook in hooks:
            hook.remove()
    split = partial(_split, num_prefix=layout.num_prefix, num_patches=layout.grid[0] * layout.grid[1])
    return [split(attention, x, queries) for attention, x in zip(layout.attentions, inputs, strict=True)]


def _split(
    attention: OpenAttention, x: Tensor, queries: int | None, num_prefix: int, num_patches: int
) -> LayerAttention:
    """Prompts in the sequence follow the prefix; prompts as keys follow the sequence."""
    weights = attention.weights(x, queries)
    start = x.shape[1] - num_patches
    if queries is None:
        weights = weights[:, :, start : x.shape[1]]
    weights = weights.mean(dim=2)
    inside, extra = weights[..., num_prefix:start], weights[..., x.shape[1] :]
    return LayerAttention(
        prefix=weights[..., :num_prefix],
        patches=weights[..., start : x.shape[1]],
        prompts=torch.cat([inside, extra], dim=-1),
    )
