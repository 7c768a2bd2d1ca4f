"""Accuracies of stored logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vpt.errors import ConfigError
from vpt.robustness.intervals import wilson

__all__ = ["correct", "mean_per_class", "top1", "wilson", "worst_group"]


def correct(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Says which images are classified rightly.

    Args:
        logits: (N, classes); of equal logits the first wins.
        labels: (N,).

    Returns:
        bool (N,).
    """
    return np.asarray(logits.argmax(axis=1) == labels)


def top1(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The share of images classified rightly.

    Args:
        logits: (N, classes), N ≥ 1.
        labels: (N,).

    Returns:
        In [0, 1].
    """
    return float(correct(logits, labels).mean())


def mean_per_class(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The mean over classes of the share of a class that is classified rightly.

    Args:
        logits: (N, classes), N ≥ 1.
        labels: (N,); classes without any image do not count.

    Returns:
        In [0, 1].
    """
    images = np.bincount(labels, minlength=logits.shape[1])
    hits = np.bincount(labels, weights=correct(logits, labels), minlength=logits.shape[1])
    present = images > 0
    return float((hits[present] / images[present]).mean())


def worst_group(logits: NDArray[np.float32], labels: NDArray[np.int64], groups: NDArray[np.int64]) -> float:
    """The lowest share of a group that is classified rightly (Sagawa et al., ICLR 2020).

    Args:
        logits: (N, classes), N ≥ 1.
        labels: (N,).
        groups: (N,), group of each image, from 0; numbers without any image do not count.

    Returns:
        In [0, 1].

    Raises:
        ConfigError: Groups are not one a label.
    """
    if groups.shape != labels.shape:
        raise ConfigError(f"Give each of {len(labels)} images one group, got groups of shape {groups.shape}.")
    images, hits = np.bincount(groups), np.bincount(groups, weights=correct(logits, labels))
    present = images > 0
    return float((hits[present] / images[present]).min())
