"""Prompts that start where training images hold what the backbone recognises them by, in their frequencies.

Modal pre-alignment (PAE; Wang et al., "Visual Prompt-Agnostic Evolution", ICLR 2026, arXiv 2601.20232), equations 2 to
4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.fft import fft2, fftshift, ifft2, ifftshift
from torch.nn.functional import cross_entropy

from vpt.backbones.compilation import eagerly
from vpt.backbones.factory import Backbone
from vpt.deltas.base import TrainingImages
from vpt.deltas.prompts.initialization import entering
from vpt.errors import ConfigError

WINDOW, STRIDE = 16, 8
"""Side and step of the square windows of frequencies, w and r of the paper."""
IMAGES = 32
"""At most so many training images are looked at."""

Window = tuple[int, int]
"""Row and column of its first frequency, in a spectrum whose middle is frequency 0."""


def windows(size: tuple[int, int]) -> list[Window]:
    """All windows of frequencies of images (height, width)."""
    height, width = (range(0, side - WINDOW + 1, STRIDE) for side in size)
    return list(product(height, width))


def filtered(images: Tensor, window: Window) -> Tensor:
    """Images (B, C, H, W) that keep one window of frequencies, the real part; at least in single precision."""
    exact = images if images.dtype == torch.float64 else images.float()
    spectrum = fftshift(fft2(exact), dim=(-2, -1))
    kept = torch.zeros_like(spectrum)
    rows, columns = (slice(start, start + WINDOW) for start in window)
    kept[..., rows, columns] = spectrum[..., rows, columns]
    return cast("Tensor", ifft2(ifftshift(kept, dim=(-2, -1))).real.to(images.dtype))


def pooled(patches: Tensor) -> Tensor:
    """The mean (dim,) of patches (B, N, dim) of all images, weighted by their squared norms (equations 3 and 4)."""
    energies = patches.square().sum(dim=-1)
    return (patches * (energies / energies.sum()).unsqueeze(-1)).sum(dim=(0, 1))


@torch.no_grad()
def prompts_of_frequencies(
    backbone: Backbone,
    blocks: Sequence[int],
    numbers: Sequence[int],
    training: TrainingImages,
    rng: np.random.Generator,
) -> list[Tensor]:
    """Ranks windows of frequencies by the loss of the model on images that hold nothing else, lowest first.

    A prompt of the first block is what the best windows leave of the patches that enter it, `pooled`; those of later
    blocks are what the blocks before make of these prompts alone.

    Args:
        backbone: As the images pass through it.
        blocks: Those that have prompts.
        numbers: How many, n, for each.
        training: Some of its images are looked at, with their classes and the head that training starts with.
        rng: Which ones follows from it.

    Returns:
        (n, dim) for each block.

    Raises:
        ConfigError: Images have fewer windows than there are prompts.
    """
    if training.labels is None or training.logits is None:
        raise ConfigError("init frequency ranks frequencies by a loss: it needs images with one class each.")
    size = (backbone.input_shape[1], backbone.input_shape[2])
    known, wanted = windows(size), max(numbers)
    check_windows(size, wanted)
    rows = rng.choice(training.number, min(IMAGES, training.number), replace=False).tolist()
    images, labels = training.images(rows), training.labels[rows]
    losses = []
    with eagerly():
        for window in training.shown(known, "Frequencies"):
            with keeping(backbone, window):
                logits = training.logits(images)
            losses.append(cross_entropy(logits.double(), labels.to(logits.device)))
    best = torch.stack(losses).argsort(stable=True)[:wanted].tolist()
    patches = slice(backbone.layout.num_prefix, None)
    prompts = torch.stack([pooled(_first(backbone, images, known[place])[:, patches]) for place in best])
    found: dict[int, Tensor] = {}
    for block in range(max(blocks) + 1):
        found[block] = prompts
        with backbone.computing():
            prompts = backbone.layout.blocks[block](prompts.unsqueeze(0))[0].to(backbone.mean.dtype)
    return [found[block][:number] for block, number in zip(blocks, numbers, strict=True)]


def check_windows(size: tuple[int, int], prompts: int) -> None:
    """Refuses, by a ConfigError, more prompts than images (height, width) have windows."""
    if prompts > (most := len(windows(size))):
        raise ConfigError(
            f"init frequency gives a window of frequencies to each prompt: images of {size[0]} x {size[1]} pixels have "
            f"{most} of them, for {prompts} prompts."
        )


@contextmanager
def keeping(backbone: Backbone, window: Window) -> Iterator[None]:
    """The backbone sees, of each normalised image, one window of frequencies."""
    hook = backbone.entry.register_forward_hook(lambda module, args, images: filtered(images, window))
    try:
        yield
    finally:
        hook.remove()


def _first(backbone: Backbone, images: Tensor, window: Window) -> Tensor:
    with keeping(backbone, window):
        return entering(backbone, [0], images)[0]
