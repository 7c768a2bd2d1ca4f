"""Losses of single labels that training makes smaller: weighted by class, smoothed, focal, of mixed images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vpt.backbones.mixup import check_alpha
from vpt.errors import ConfigError, UnknownNameError, check_number

LOSSES = ("cross_entropy", "focal")
RULES = ("balanced", "inv", "inv_sqrt")
PLAIN = {"loss": "cross_entropy", "label_smoothing": 0.0, "class_weights": None, "mixup": 0.0, "cutmix": 0.0}
"""The options that change the training loss, at what leaves it the plain cross-entropy."""


def check_loss(options: Mapping[str, Any]) -> None:
    """Checks `PLAIN`'s options and ``focal_gamma``.

    A ConfigError for numbers out of range and for what does not go together; an UnknownNameError where a loss or a rule
    of weights does not exist.
    """
    if options["loss"] not in LOSSES:
        raise UnknownNameError("loss", options["loss"], LOSSES)
    check_number("focal_gamma", options["focal_gamma"], 0, 100)
    check_number("label_smoothing", smoothing := options["label_smoothing"], 0, 1)
    if smoothing == 1:
        raise ConfigError("label_smoothing is 1, which leaves nothing of the labels: give less.")
    if smoothing and options["loss"] == "focal":
        raise ConfigError("label_smoothing has no part in the focal loss: drop one of both.")
    for name in ("mixup", "cutmix"):
        check_alpha(name, options[name])
    weights = options["class_weights"]
    if isinstance(weights, str) and weights not in RULES:
        raise UnknownNameError("class_weights", weights, RULES)
    for name, weight in weights.items() if isinstance(weights, Mapping) else ():
        check_number(f"The class weight of {name!r}", weight, 1e-6, 1e6)


def class_weights(rule: str | Mapping[str, float], names: Sequence[str], counts: NDArray[np.int64]) -> Tensor:
    """The weight of each class in the loss, float64 (C,).

    ``balanced`` is N / (C · n_c), as scikit-learn's, of N images in C classes, n_c of them in class c. ``inv`` is
    1 / n_c and ``inv_sqrt`` is 1 / √n_c, both scaled to a mean of 1 as by `get_class_weights` in the code of VPT, which
    counts each class once, so that its own are all 1. In a weighted mean the scale cancels: ``balanced`` trains as
    ``inv`` does.

    Args:
        rule: One of these, or weights by class name; a class that is not named has weight 1.
        names: Of the C classes.
        counts: Training images of each class, (C,).

    Raises:
        ConfigError: A class that a rule weighs has no training image.
        UnknownNameError: A name is not that of a class.
    """
    if isinstance(rule, Mapping):
        for name in rule:
            if name not in names:
                raise UnknownNameError("class in class_weights", name, names)
        return torch.tensor([float(rule.get(name, 1.0)) for name in names], dtype=torch.float64)
    if not counts.all():
        name = names[int(counts.argmin())]
        raise ConfigError(
            f"class_weights {rule!r} has no weight for class {name!r}, of which there are no training images: give "
            "weights by class name."
        )
    weights = counts ** (-0.5 if rule == "inv_sqrt" else -1.0)
    return torch.from_numpy(counts.sum() / len(counts) * weights if rule == "balanced" else weights / weights.mean())


def weighted_loss(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, smoothing: float = 0.0, gamma: float = 0.0
) -> Tensor:
    """The weighted mean over a batch, a scalar, of cross-entropy or focal loss.

    The mean is Σ w_y · loss / Σ w_y over the images, as that of torch's `cross_entropy`, to which it is equal where
    gamma is 0. The focal loss of an image is -(1 - p_y)^γ · log p_y (Lin et al., ICCV 2017, eq. 4; with weights eq. 5).
    That of a mixed image is the mean, by its target, of those of its classes.

    Args:
        logits: (B, C).
        target: Labels, int64 (B,), or shares of the classes, (B, C), whose rows sum to 1.
        weight: (C,); None for equal weights.
        smoothing: Share of the target that is given to all classes alike, in [0, 1), without gamma.
        gamma: γ of the focal loss, ≥ 0.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weight = None if weight is None else weight.to(logits.dtype).to(logits.device)
    if target.ndim == 1 and not gamma:
        return nn.functional.cross_entropy(logits, target, weight, label_smoothing=smoothing)
    shares = (nn.functional.one_hot(target, logits.shape[1]) if target.ndim == 1 else target).to(logits.dtype)
    log_p = logits.log_softmax(dim=1)
    weighed = torch.ones_like(log_p) if weight is None else weight.expand_as(log_p)
    loss = -(shares * (1 - smoothing) + smoothing / logits.shape[1]) * log_p
    if gamma:  # the slope of x^γ is infinite at 0 for γ < 1
        loss = loss * (-log_p.expm1()).clamp(min=torch.finfo(log_p.dtype).tiny) ** gamma
    return (weighed * loss).sum() / (weighed * shares).sum()


def weight_of(target: Tensor, weight: Tensor) -> Tensor:
    """What a batch weighs in a weighted mean, a scalar: Σ w_y over labels (B,), or Σ w · shares over (B, C)."""
    weight = weight.to(target.device)
    return (weight[target] if target.ndim == 1 else weight * target).sum()
