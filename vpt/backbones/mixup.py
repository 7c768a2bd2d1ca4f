"""Mixup and CutMix of training images by timm, of draws that follow from a seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor

from vpt.errors import check_number

LARGEST = 1000.0
"""Alpha up to which Beta(alpha, alpha) is drawn."""


def check_alpha(name: str, alpha: float) -> None:
    """Refuses, by a ConfigError, what is neither 0 nor from 0.001 to 1000."""
    check_number(name, alpha, 1e-3 if 0 < alpha < 1 else 0, LARGEST)


def mix(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    mixup: float,
    cutmix: float,
    seed: Sequence[int] | None,
    raw: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mixes each image of a batch with its partner from the other end, by `timm.data.Mixup` in its mode ``batch``.

    Mixup (Zhang et al., ICLR 2018) takes λ of an image and 1 - λ of its partner, CutMix (Yun et al., ICCV 2019) a box
    of 1 - λ of the area, with one λ from Beta(α, α) a batch; where both α are positive, each is drawn half the time.
    timm takes even batches: of an odd one the last image stays as it is, and so does a single one.

    Args:
        images: (B, 3, H, W), uint8 or float in [0, 1]; `raw` ones (B, C, H, W), of any numbers; not changed.
        labels: int64 (B,).
        num_classes: Length of a row of the targets.
        mixup: α of mixup; 0 for none.
        cutmix: α of CutMix; 0 for none.
        seed: What the draws follow from; None for NumPy's global random numbers, which are otherwise left as they were.
        raw: Whether images are in a unit of their own.

    Returns:
        Images, float in [0, 1] or in their own unit, and targets, float (B, num_classes), whose rows sum to 1.
    """
    mixed = images.clone() if images.is_floating_point() else images / (1 if raw else 255)
    targets = torch.nn.functional.one_hot(labels, num_classes).to(mixed.dtype)
    if (even := len(images) // 2 * 2) == 0:
        return mixed, targets
    draw = Mixup(mixup, cutmix, label_smoothing=0.0, num_classes=num_classes)
    # timm draws from NumPy's global random numbers.
    before = np.random.get_state()  # noqa: NPY002
    try:
        if seed is not None:
            np.random.seed(np.random.SeedSequence(seed).generate_state(4))  # noqa: NPY002
        mixed[:even], targets[:even] = draw(mixed[:even], labels[:even])
    finally:
        if seed is not None:
            np.random.set_state(before)  # noqa: NPY002
    return mixed if raw else mixed.clamp_(0, 1), targets  # λ and 1 - λ of white may round to more than 1
