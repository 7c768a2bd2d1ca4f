"""Where prompts start: at random, or as tokens of training images.

The latter is Self-Prompt Tuning (Wang et al., "Revisiting the Power of Prompt for Visual Tuning", ICML 2024, section
3.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from vpt.backbones.compilation import eagerly
from vpt.backbones.factory import Backbone
from vpt.deltas.base import TrainingImages
from vpt.errors import ConfigError

INITS = ("uniform", "token", "mean", "max", "frequency")


@torch.no_grad()
def tokens_of_images(
    backbone: Backbone,
    blocks: Sequence[int],
    numbers: Sequence[int],
    init: str,
    training: TrainingImages,
    rng: np.random.Generator,
) -> list[Tensor]:
    """Draws tokens that enter some blocks, without replacement and alike from all images.

    Args:
        backbone: As the images pass through it.
        blocks: The blocks.
        numbers: How many tokens for each block, n.
        init: ``token`` for tokens as they are; ``mean`` or ``max`` over parts of an image's sequence of tokens, which
            is cut into n equal ones.
        training: The images.
        rng: The draw follows from it.

    Returns:
        (n, dim) for each block.

    Raises:
        ConfigError: The images have fewer tokens than are wanted.
    """
    count, first = training.number, [found[0] for found in entering(backbone, blocks, training.images([0]))]
    drawn: dict[int, list[tuple[int, int, int]]] = {}  # by image: place among blocks, of the result, token or part
    for layer, (number, tokens) in enumerate(zip(numbers, first, strict=True)):
        parts = len(tokens) if init == "token" else number
        if number > count * parts:
            raise ConfigError(
                f"init {init} needs as many tokens as prompts: {count} images have {count * parts} of them for block "
                f"{blocks[layer]}, for {number} prompts."
            )
        for place, row in enumerate(rng.choice(count * parts, number, replace=False).tolist()):
            drawn.setdefault(row // parts, []).append((layer, place, row % parts))
    found = [tokens.new_empty(number, tokens.shape[1]) for number, tokens in zip(numbers, first, strict=True)]
    for image, places in sorted(drawn.items()):
        there = [tokens[0] for tokens in entering(backbone, blocks, training.images([image]))]
        for layer, place, row in places:
            found[layer][place] = _pooled(there[layer], init, numbers[layer], row)
    return found


def _pooled(tokens: Tensor, init: str, parts: int, row: int) -> Tensor:
    """One token (dim,) of an image's (N, dim), or what `init` makes of one of their parts."""
    if init == "token":
        return tokens[row]
    part = tokens.tensor_split(parts)[row]
    return part.mean(dim=0) if init == "mean" else part.amax(dim=0)


def entering(backbone: Backbone, blocks: Sequence[int], images: Tensor) -> list[Tensor]:
    """The tokens that enter each of some blocks, (B, N, dim)."""
    found: dict[int, Tensor] = {}

    def keep(block: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found[block] = args[0].flatten(1, -2)

    hooks = [backbone.layout.blocks[block].register_forward_pre_hook(partial(keep, block)) for block in blocks]
    try:
        with eagerly():
            backbone(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [found[block] for block in blocks]


def transformed_prompts(share: float, number: int) -> int:
    """How many of so many prompts a Fourier share transforms: rounded down."""
    return math.floor(share * number + 1e-9)


def transformed(prompts: Tensor, share: int) -> Tensor:
    """Prompts (B, n, dim), the first `share` ≥ 1 as the real part of their Fourier transform over tokens and channels.

    At least in single precision (VFPT; Zeng et al., NeurIPS 2024, section 3.2).
    """
    exact = prompts[:, :share] if prompts.dtype == torch.float64 else prompts[:, :share].float()
    return torch.cat([torch.fft.fft2(exact).real.to(prompts.dtype), prompts[:, share:]], dim=1)
