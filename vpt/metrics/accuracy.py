"""Accuracies of stored logits."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from vpt.errors import ConfigError

_Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson, "Probable inference", JASA 22, 1927).

    Unlike the normal approximation it stays inside [0, 1] and does not shrink to a point at 0 and 1.

    Args:
        hits: Images classified rightly.
        n: Images, at least 1.

    Returns:
        Lower and upper bound.

    Raises:
        ConfigError: There are no images, or more hits than images.
    """
    _check(hits, n)
    share, z2 = hits / n, _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def clopper_pearson(hits: int, n: int) -> tuple[float, float]:
    """The exact 95 % interval of a share, wider than `wilson` (Clopper & Pearson, Biometrika 26, 1934).

    It contains the true share in at least 95 % of samples, whatever the share.

    Args:
        hits: Images classified rightly.
        n: Images, at least 1.

    Returns:
        Lower and upper bound.

    Raises:
        ConfigError: There are no images, or more hits than images.
    """
    _check(hits, n)
    low = 0.0 if hits == 0 else float(beta.ppf(0.025, hits, n - hits + 1))
    high = 1.0 if hits == n else float(beta.ppf(0.975, hits + 1, n - hits))
    return low, high


def _check(hits: int, n: int) -> None:
    if not 0 <= hits <= n or n < 1:
        raise ConfigError(f"An interval needs at least one image and no more hits than images, got {hits} of {n}.")


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
