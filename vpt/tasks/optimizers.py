"""Optimiser and schedule of every task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def scheduled_optimizer(
    parameters: Sequence[nn.Parameter], options: Mapping[str, Any], batch: int, steps: int
) -> OptimizerLRScheduler:
    """Builds an optimiser that decays tensors of two or more dimensions only, and its schedule per step.

    Args:
        parameters: What is trained.
        options: ``optimizer``, ``base_lr``, ``weight_decay``, ``momentum`` and ``warmup``, as of a `TuningTask`.
        batch: Images of a step on all devices; the learning rate is base_lr · batch / 256.
        steps: All steps of the training, at least 1.

    Returns:
        What Lightning expects; the optimiser has two groups: decayed (prompts and weights) and not (biases, norms).
    """
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": options["weight_decay"]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    rate = options["base_lr"] * batch / 256
    optimizer: torch.optim.Optimizer
    if options["optimizer"] == "sgd":
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=options["momentum"])
    else:
        optimizer = torch.optim.AdamW(groups, lr=rate)
    schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, steps, options["warmup"]))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


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
