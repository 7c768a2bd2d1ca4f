"""Optimiser and schedule of every task."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn


def build_optimizer(
    parameters: Sequence[nn.Parameter], name: str, rate: float, weight_decay: float, momentum: float
) -> torch.optim.Optimizer:
    """Builds an optimiser that decays tensors of two or more dimensions only.

    Args:
        parameters: What is trained.
        name: ``sgd`` or ``adamw``.
        rate: Learning rate, positive.
        weight_decay: Of prompts and weights; biases and norms get none.
        momentum: Of SGD.

    Returns:
        The optimiser, with two groups: decayed and not.
    """
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=momentum)
    return torch.optim.AdamW(groups, lr=rate)


def warmup_cosine(step: int, steps: int, warmup: float) -> float:
    """The factor on the learning rate: linear warm-up, then a cosine to zero.

    Args:
        step: Steps done so far, from 0.
        steps: All steps, at least 1.
        warmup: Share of them that warm up, in [0, 1).

    Returns:
        A factor in (0, 1]; the first step of a warm-up of w steps gets 1/w, not 0.
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, steps - rising))))
