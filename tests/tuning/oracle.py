"""VPT as the paper writes it, on timm models: concatenate, run the block, drop. Independent of `vpt`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def concatenated_features(
    model: Any, images: Tensor, prompts: Tensor, masks: Tensor | None = None, deep: bool = True
) -> Tensor:
    """Pooled features with prompts in the sequence.

    Args:
        model: A timm ViT.
        images: Normalised, (B, 3, H, W).
        prompts: (layers, n, dim) if deep, else (1, n, dim).
        masks: Multiplied onto the prompts, (layers, B, n, dim).
        deep: Replace the prompts before every block, or let the first ones travel.
    """
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    batch, number = x.shape[0], prompts.shape[1]
    for layer, block in enumerate(model.blocks):
        if deep or layer == 0:
            inserted = prompts[layer].expand(batch, -1, -1)
            if masks is not None:
                inserted = inserted * masks[layer]
            x = torch.cat([inserted, x], dim=1)
        x = plain_block(block, x)
        if deep:
            x = x[:, number:]
    if not deep:
        x = x[:, number:]
    x = model.norm(x)
    if model.attn_pool is not None:
        x = model.attn_pool(x if model.pool_include_prefix else x[:, model.num_prefix_tokens :])
    elif hasattr(model, "dist_token"):
        both: Tensor = (x[:, 0] + x[:, 1]) / 2
        return both
    elif model.global_pool == "avg":
        x = x[:, model.num_prefix_tokens :].mean(dim=1)
    else:
        x = x[:, 0]
    pooled: Tensor = model.fc_norm(x)
    return pooled


def plain_block(block: Any, x: Tensor) -> Tensor:
    """A pre-norm block from its parts, with attention written out."""
    x = x + block.ls1(plain_attention(block.attn, block.norm1(x)))
    out: Tensor = x + block.ls2(block.mlp(block.norm2(x)))
    return out


def plain_attention(attn: Any, x: Tensor) -> Tensor:
    """Softmax attention over all tokens, one head at a time."""
    weight, bias = attn.qkv.weight, attn.qkv.bias
    q, k, v = nn.functional.linear(x, weight, bias).chunk(3, dim=-1)
    heads = []
    for q_h, k_h, v_h in zip(*(t.chunk(attn.num_heads, dim=-1) for t in (q, k, v)), strict=True):
        scores = attn.q_norm(q_h) @ attn.k_norm(k_h).transpose(1, 2) / q_h.shape[-1] ** 0.5
        heads.append(scores.softmax(dim=-1) @ v_h)
    out: Tensor = attn.proj(attn.norm(torch.cat(heads, dim=-1)))
    return out
