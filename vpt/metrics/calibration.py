"""Does a confidence of 80 % mean right in 80 % of cases? Calibration error, and the temperature that mends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import softmax

from vpt.metrics.logits import Logits, blocks, check_table, ranked

BINS = 15
"""As in Guo et al., ICML 2017."""


@dataclass(frozen=True)
class Bins:
    """The bins of a reliability diagram that hold images, by ascending confidence.

    Attributes:
        count: float64 (B,), images.
        confidence: float64 (B,), their mean confidence.
        accuracy: float64 (B,), the share of them that is right.
    """

    count: NDArray[np.float64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    @property
    def error(self) -> float:
        """The expected calibration error in [0, 1]: the mean gap, weighted by images (Naeini et al., AAAI 2015)."""
        return float(np.average(np.abs(self.accuracy - self.confidence), weights=self.count))


def equal_width(confidence: NDArray[np.float64], correct: NDArray[np.bool_], bins: int = BINS) -> Bins:
    """Bins of equal width, (0, 1/bins] to (1 − 1/bins, 1] (Guo et al., ICML 2017, equations 2 and 3).

    torchmetrics puts a confidence of exactly 1 into a bin of its own, which a saturated softmax often reaches.

    Args:
        confidence: (N,) in (0, 1].
        correct: (N,).
        bins: At least 1.

    Returns:
        Those that are not empty.
    """
    inner = np.arange(1, bins) / bins
    place = np.searchsorted(inner, confidence, side="left")
    count = np.bincount(place)
    kept = count > 0
    sums = (np.bincount(place, weights=values)[kept] for values in (confidence, correct))
    means = [total / count[kept] for total in sums]
    return Bins(count[kept].astype(np.float64), *means)


def equal_mass(confidence: NDArray[np.float64], correct: NDArray[np.bool_], bins: int = BINS) -> Bins:
    """Bins of equally many images (Nguyen & O'Connor, EMNLP 2015), the larger ones where N does not divide.

    Equally sure images that an edge separates count as the mean of their tie, so their order does not matter.

    Args:
        confidence: (N,) in (0, 1].
        correct: (N,).
        bins: At least 1; N bins if there are fewer images.

    Returns:
        The bins.
    """
    level, share = ranked(confidence, correct)
    pieces: Sequence[NDArray[np.int64]] = np.array_split(np.arange(len(level))[::-1], min(bins, len(level)))
    count = np.array([len(piece) for piece in pieces], dtype=np.float64)
    means = [np.array([values[piece].mean() for piece in pieces]) for values in (level, share)]
    return Bins(count, *means)


def temperature(logits: Logits, labels: NDArray[np.int64]) -> float | None:
    """Finds the temperature that makes validation answers most likely (Guo et al., ICML 2017, section 4.2).

    The negative log likelihood is convex in 1/T; its derivative's only root is bracketed and found to machine
    precision. Fit on in-distribution validation, then read test sets once.

    Args:
        logits: (N, classes), of validation images.
        labels: (N,).

    Returns:
        T > 0; None where the likelihood has no maximum at a finite positive T: every image is right, so that T → 0
        is best, or the answers are no better than none, so that T → ∞ is.

    Raises:
        DataError: The table cannot be scored.
    """
    check_table(logits, labels)
    own = logits[np.arange(len(labels)), labels].astype(np.float64)
    if (logits.max(axis=1) == own).all() or logits.mean(axis=1, dtype=np.float64).mean() >= own.mean():
        return None

    def slope(inverse: float) -> float:
        total = 0.0
        for rows in blocks(*logits.shape):
            over = logits[rows] - own[rows, None]
            total += float((softmax(inverse * over, axis=1) * over).sum())
        return total

    low = high = 1.0
    while slope(low) >= 0:
        low /= 2
    while slope(high) <= 0:
        high *= 2
    return float(1 / brentq(slope, low, high, xtol=1e-300, rtol=1e-14))
