"""How a model's attention changes with its prompts, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vpt.backbones import class_attention
from vpt.errors import ConfigError
from vpt.tuning import TunedModel
from vpt.tuning.prompts import Prompt
from vpt.visualize.state import evaluating, strength


@dataclass(frozen=True)
class PromptAttention:
    """Attention of the class token (of the mean patch where there is none) with and without prompts.

    Attributes:
        without: (B, rows, columns), last block at strength 0, mean over heads, relative to uniform: 1 everywhere if
            all patches got the same.
        with_prompts: The same at strength 1.
        share: (layers, B, heads) in [0, 1], the part of each layer's attention that prompts take at strength 1; NaN
            where a layer has fewer heads than another.
        uniform: (layers,), what that part would be if all tokens, prompts included, got the same.
        guesses: Most likely class and its probability at strength 0 and 1 for each image: two lists of (class, p).
    """

    without: NDArray[np.float32]
    with_prompts: NDArray[np.float32]
    share: NDArray[np.float32]
    uniform: NDArray[np.float32]
    guesses: tuple[list[tuple[int, float]], list[tuple[int, float]]]


def has_prompts(model: TunedModel) -> bool:
    """Says whether a model has prompts.

    Args:
        model: Any.

    Returns:
        Whether any part of its delta is a `Prompt`.
    """
    return model.delta is not None and any(isinstance(part, Prompt) for part in model.delta.parts)


@torch.no_grad()
def measure_attention(model: TunedModel, images: Tensor) -> PromptAttention:
    """Runs images through a model at strength 0 and 1; mode and strength are put back afterwards.

    Args:
        model: With prompts.
        images: uint8 (B, 3, H, W).

    Returns:
        Maps, shares and predictions.

    Raises:
        ConfigError: The model has no prompts.
        UnsupportedBackboneError: The backbone's attention cannot be read.
    """
    if not has_prompts(model):
        raise ConfigError("The model has no prompts, so there is nothing to compare.")
    images = images.to(model.head.weight.device)
    layers, guesses = [], []
    for alpha in (0.0, 1.0):
        with evaluating(model), strength(model, alpha):
            layers.append(class_attention(model.backbone, images))
            chances, classes = model(images).softmax(dim=1).max(dim=1)
            guesses.append(list(zip(classes.tolist(), chances.tolist(), strict=True)))
    maps = [_relative(layer[-1].patches, model.backbone.layout.grid) for layer in layers]
    return PromptAttention(
        without=maps[0],
        with_prompts=maps[1],
        share=_side_by_side([layer.prompts.sum(dim=2).float().cpu() for layer in layers[1]]),
        uniform=np.array([layer.prompts.shape[2] / layer.keys for layer in layers[1]], dtype=np.float32),
        guesses=(guesses[0], guesses[1]),
    )


def _side_by_side(shares: Sequence[Tensor]) -> NDArray[np.float32]:
    """(B, heads) for each layer as one table; a Swin's later stages have more heads."""
    width = max(share.shape[1] for share in shares)
    table: NDArray[np.float32] = np.full((len(shares), len(shares[0]), width), np.nan, dtype=np.float32)
    for row, share in zip(table, shares, strict=True):
        row[:, : share.shape[1]] = share.numpy()
    return table


def _relative(patches: Tensor, grid: tuple[int, int]) -> NDArray[np.float32]:
    """Mean over heads, over the mean over patches: (B, heads, N) to (B, rows, columns)."""
    attention = patches.float().mean(dim=1)
    relative = attention / attention.mean(dim=1, keepdim=True)
    maps: NDArray[np.float32] = relative.reshape(-1, *grid).cpu().numpy()
    return maps
