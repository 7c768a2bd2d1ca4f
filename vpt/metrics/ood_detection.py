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
    random = np.random.default_rng(seed)
    draws = [(random.choice(known, len(known)), random.choice(unknown, len(unknown))) for _ in range(RESAMPLES)]
    ends = [
        tuple(float(end) for end in np.quantile([score(*draw) for draw in draws], (0.025, 0.975)))
        for score in (auroc, fpr95)
    ]
    (low, high), (least, most) = ends
    return Detection(auroc(known, unknown), (low, high), fpr95(known, unknown), (least, most))


def auroc(known: Floats, unknown: Floats) -> float:
    """See `Detection`."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(np.r_[np.zeros(len(known)), np.ones(len(unknown))], np.r_[known, unknown]))


def fpr95(known: Floats, unknown: Floats) -> float:
    """See `Detection`: unknown images at or below the smallest threshold that 95 % of the known do not exceed."""
    threshold = np.sort(known)[int(np.ceil(round(0.95 * len(known), 9))) - 1]
    return float((unknown <= threshold).mean())
