"""Attention rollout (Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020, section 3).

Heads are averaged, the identity is added for the residual connection, rows are normalised, Â = (A + I) / 2, and the
matrices of all blocks are multiplied. Here the product is taken from the left, starting with the row that the pool
reads, so that no matrix over all patches is needed and Swin's windows are exact too.

Prompts are sources only: attention that reaches a prompt in some block ends there, and is counted for that block. What
shallow prompts have gathered from patches before is not followed. Nothing is normalised afterwards: patches, prefix
tokens, prompts and Swin's padding together hold 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vpt.backbones import AttentionCall

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Rollout:
    """Where what the pool reads comes from.

    Attributes:
        patches: From each patch of the first block's map, (B, rows, columns).
        prompts: From the prompts of each block, (layers, B).
    """

    patches: Array
    prompts: Array


def rollout(calls: Sequence[AttentionCall], weights: Sequence[Tensor], pooled: int | None) -> Rollout:
    """Follows attention from the pool to the first block.

    Args:
        calls: Of each block, first to last.
        weights: Of each call, mean over heads, (rows, queries, keys).
        pooled: How many tokens at the head of the sequence the pool reads; None for the mean over the patches, which
            also stands for a pool by attention (SigLIP's).

    Returns:
        The rollout.
    """
    last = calls[-1]
    images = len(weights[-1]) // last.places.windows
    head = weights[-1].new_zeros(images, last.first_patch)
    patches = weights[-1].new_zeros(images, *last.places.grid)
    if pooled is None:
        patches += 1 / patches[0].numel()
    else:
        head[:, :pooled] = 1 / pooled
    ended = []
    for call, own in zip(reversed(calls), reversed(weights), strict=True):
        places, start, tokens = call.places, call.first_patch, call.tokens
        row = torch.cat([head.repeat_interleave(places.windows, dim=0), places.cut(_spread(patches, places.grid))], 1)
        flow = torch.einsum("rq,rqk->rk", row, own) / 2
        flow[:, :tokens] += row / 2
        to_prompts = flow[:, call.num_prefix : start].sum(dim=1) + flow[:, tokens:].sum(dim=1)
        ended.append(to_prompts.view(images, -1).sum(dim=1))
        flow[:, call.num_prefix : start] = 0
        head, patches = flow[:images, :start], places.stitch(flow[:, start:tokens])
    prompts = torch.stack(ended[::-1])
    return Rollout(patches.float().cpu().numpy(), prompts.float().cpu().numpy())


def _spread(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """What four patches were merged into goes to each of them in equal parts."""
    if patches.shape[1:] == grid:
        return patches
    four = patches.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2) / 4
    return four[:, : grid[0], : grid[1]]
