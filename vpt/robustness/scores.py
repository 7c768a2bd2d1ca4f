"""Scores of stored logits."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


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


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson, "Probable inference", JASA 22, 1927).

    Unlike the normal approximation it stays inside [0, 1] and does not shrink to a point at 0 and 1.

    Args:
        hits: Images classified rightly.
        n: Images, at least 1.

    Returns:
        Lower and upper bound.
    """
    share, z2 = hits / n, _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)
