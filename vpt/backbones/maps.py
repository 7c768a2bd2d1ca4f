"""What the summarising token attends to, layer by layer, computed beside the fused path without changing it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vpt.backbones.factory import Backbone
from vpt.errors import UnsupportedBackboneError


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
    if layout.windowed:
        raise UnsupportedBackboneError(f"{backbone.name} attends within windows: it has no map of one token per block.")
    queries = 1 if layout.has_class_token else None
    calls: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = []

    def keep(attention: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    hooks = [attention.register_forward_pre_hook(keep, with_kwargs=True) for attention in layout.attentions]
    try:
        backbone(images)
    finally:
        for hook in hooks:
            hook.remove()
    patches = layout.grid[0] * layout.grid[1]
    return [
        _split(attention.weights(queries, *args, **kwargs), args[0].shape[1], queries, layout.num_prefix, patches)
        for attention, (args, kwargs) in zip(layout.attentions, calls, strict=True)
    ]


def _split(weights: Tensor, tokens: int, queries: int | None, num_prefix: int, num_patches: int) -> LayerAttention:
    """Prompts in the sequence follow the prefix; prompts as keys follow the sequence."""
    start = tokens - num_patches
    if queries is None:
        weights = weights[:, :, start:tokens]
    weights = weights.mean(dim=2)
    inside, extra = weights[..., num_prefix:start], weights[..., tokens:]
    return LayerAttention(
        prefix=weights[..., :num_prefix],
        patches=weights[..., start:tokens],
        prompts=torch.cat([inside, extra], dim=-1),
    )
