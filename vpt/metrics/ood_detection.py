"""Images of none of the known classes: scores that are high for them, and how well a score tells them apart.

Features are (N, d), logits (N, C), scores (N,).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, softmax

from vpt.argument_types import checked
from vpt.errors import ConfigError

Floats = NDArray[np.floating]
RESAMPLES = 1000


def msp(logits: Floats) -> NDArray[np.float64]:
    """One minus the largest probability (Hendrycks & Gimpel, ICLR 2017)."""
    return np.asarray(1 - softmax(np.asarray(logits, dtype=np.float64), axis=1).max(axis=1))


def energy(logits: Floats) -> NDArray[np.float64]:
    """The free energy −log Σ exp at temperature 1 (Liu et al., NeurIPS 2020, equation 4)."""
    return np.asarray(-logsumexp(np.asarray(logits, dtype=np.float64), axis=1))


def normalized(features: Floats) -> NDArray[np.float64]:
    """Features of length 1; zeros stay zeros."""
    values = np.asarray(features, dtype=np.float64)
    length = np.linalg.norm(values, axis=1, keepdims=True)
    return np.asarray(values / np.where(length > 0, length, 1))


@checked
def fit_mahalanobis(features: Floats, labels: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means of the classes that occur, (K, d), and a matrix W, (d, d), that makes the shared covariance the identity.

    On features of length 1 (Mueller & Hein, "Mahalanobis++", ICML 2025; Lee et al., NeurIPS 2018, equation 1); the
    covariance within classes is shrunk as Ledoit and Wolf do (J. Multivariate Analysis 88, 2004), so that fewer images
    than dimensions suffice. A ConfigError where all features of each class are equal.
    """
    from sklearn.covariance import ledoit_wolf  # late: it takes a second or more

    values = normalized(features)
    kept, owner = np.unique(labels, return_inverse=True)
    means = np.stack([values[owner == place].mean(axis=0) for place in range(len(kept))])
    covariance, _ = ledoit_wolf(values - means[owner], assume_centered=True)
    spread, directions = np.linalg.eigh(covariance)
    if not spread.max() > 0:
        raise ConfigError("The training images of each class have equal features: there is no distance between them.")
    floor = spread.max() * np.finfo(np.float32).eps
    return means, (directions / np.sqrt(np.maximum(spread, floor))) @ directions.T


def mahalanobis(features: Floats, means: Floats, whitening: Floats) -> NDArray[np.float64]:
    """The squared distance to the nearest class mean, of what `fit_mahalanobis` gives."""
    values, centres = normalized(features) @ whitening, np.asarray(means, dtype=np.float64) @ whitening
    return np.asarray(_distances(values, centres).min(axis=1))


@checked
def nearest_neighbours(features: Floats, known: Floats, k: int) -> NDArray[np.float64]:
    """The squared distance to the k-th nearest of M known features, both of length 1 (Sun et al., ICML 2022).

    A ConfigError where there are fewer than k.
    """
    if not 1 <= k <= len(known):
        raise ConfigError(f"k nearest neighbours are 1 to {len(known)}, got {k}.")
    return np.asarray(np.partition(_distances(normalized(features), normalized(known)), k - 1, axis=1)[:, k - 1])


def _distances(values: Floats, centres: Floats) -> NDArray[np.float64]:
    squares = (values**2).sum(axis=1)[:, None] + (centres**2).sum(axis=1) - 2 * values @ centres.T
    return np.asarray(np.maximum(squares, 0))


@dataclass(frozen=True)
class Detection:
    """How well a score tells images of unknown classes from known ones, with the ends of 95 % bootstrap intervals.

    `auroc` is the probability that an unknown image scores higher than a known one, ties counting half; `fpr95` the
    share of unknown images that pass where 95 % of the known ones do. Both in [0, 1]; intervals are (low, high).
    """

    auroc: float
    auroc_interval: tuple[float, float]
    fpr95: float
    fpr95_interval: tuple[float, float]


@checked
def detection(known: Floats, unknown: Floats, seed: int = 0) -> Detection:
    """Compares the scores of N known and M unknown images; 1,000 resamples of each are drawn by `seed`.

    A ConfigError where one of both is empty or has a score that is not finite.
    """
    if not len(known) or not len(unknown) or not np.isfinite([*known, *unknown]).all():
        raise ConfigError("Detection compares finite scores of at least one known and one unknown image.")
    own = _Pairs(np.asarray(known, dtype=np.float64), np.asarray(unknown, dtype=np.float64))
    random = np.random.default_rng(seed)
    sizes = len(known), len(unknown)
    draws = np.array([own.of(*(random.choice(size, size) for size in sizes)) for _ in range(RESAMPLES)])
    (low, least), (high, most) = np.quantile(draws, (0.025, 0.975), axis=0).tolist()
    area, passing = own.of(*map(np.arange, sizes))
    return Detection(area, (low, high), passing, (least, most))


class _Pairs:
    """AUROC and FPR95 of images drawn with repetition, by counts along the known scores, which are sorted once."""

    def __init__(self, known: NDArray[np.float64], unknown: NDArray[np.float64]) -> None:
        order = np.argsort(known)
        self._sorted, self._unknown = known[order], unknown
        self._rank = np.empty_like(order)
        self._rank[order] = np.arange(len(order))
        self._below, self._up_to = (np.searchsorted(self._sorted, unknown, side) for side in ("left", "right"))

    def of(self, known: NDArray[np.int64], unknown: NDArray[np.int64]) -> tuple[float, float]:
        """See `Detection`; of the images at some positions.

        Unknown ones pass at or below the smallest threshold that 95 % of the known do not exceed.
        """
        n = len(known)
        counted = np.concatenate([[0], np.cumsum(np.bincount(self._rank[known], minlength=n))])
        lower, upper = counted[self._below[unknown]], counted[self._up_to[unknown]]
        wanted = int(np.ceil(round(0.95 * n, 9)))
        threshold = self._sorted[np.searchsorted(counted[1:], wanted)]
        return float((lower + upper).mean() / (2 * n)), float((self._unknown[unknown] <= threshold).mean())
