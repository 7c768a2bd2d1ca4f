"""Accuracies of stored logits, their intervals, and the difference between two models on the same images.

Logits are (N, classes) and labels (N,), with N ≥ 1; shares lie in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from vpt.argument_types import checked
from vpt.errors import ConfigError
from vpt.metrics.logits import check_table

RESAMPLES, SCORED = 10_000, 1_000
"""Of the paired bootstrap, and of that of any score."""


@checked
def correct(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Says which images are classified correctly, bool (N,); ties go to the first class.

    Classes are left out by minus infinity. A DataError where the table cannot be scored.
    """
    check_table(logits, labels, masked=True)
    return np.asarray(logits.argmax(axis=1) == labels)


def top1(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The share of images classified correctly."""
    return float(correct(logits, labels).mean())


def mean_per_class(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The mean over classes of the accuracy within a class; classes without images do not count."""
    return float(_by_class(logits, labels).mean())


@checked
def worst_class(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The accuracy within the class where it is smallest; classes without images do not count."""
    return float(_by_class(logits, labels).min())


def _by_class(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    right = correct(logits, labels)
    images = np.bincount(labels, minlength=logits.shape[1])
    hits = np.bincount(labels, weights=right, minlength=logits.shape[1])
    present = images > 0
    return np.asarray(hits[present] / images[present])


@checked
def wilson(hits: int, n: int) -> tuple[float, float]:
    """Both ends of the 95 % score interval of a share, hits of n images (Wilson, "Probable inference", JASA 22, 1927).

    Inside [0, 1], and no point at 0 and 1. A ConfigError where there are no images, or more hits than images.
    """
    if not 0 <= hits <= n or n < 1:
        raise ConfigError(f"An interval needs at least one image and no more hits than images, got {hits} of {n}.")
    interval = binomtest(hits, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Difference:
    """How much more often the first of two models is right on n images.

    `value` is first minus second top-1, in [-1, 1], `low` and `high` are the ends of its 95 % bootstrap interval, and
    `p_value`, of equal accuracy, is McNemar's test in its exact form (Psychometrika 12, 1947).
    """

    n: int
    value: float
    low: float
    high: float
    p_value: float


@checked
def difference(first: NDArray[np.bool_], second: NDArray[np.bool_], seed: int = 0) -> Difference:
    """Compares two models by a paired bootstrap over images (Efron & Tibshirani, 1993, chapter 13, percentiles).

    `first` and `second` say which of the same N images each classifies correctly. An image adds -1, 0 or 1, so that the
    counts of these in a resample are multinomial, and 10,000 resamples are drawn without touching an image. A
    ConfigError where they are not of the same images, or of none.
    """
    alike = first.ndim == 1 and first.shape == second.shape and first.dtype == second.dtype == np.bool_
    if not alike or not len(first):
        raise ConfigError(
            f"Two models are compared by what each has right of the same images, bool (N,) with N of at least 1, got "
            f"{first.dtype} {first.shape} and {second.dtype} {second.shape}."
        )
    n, wins, losses = len(first), int((first & ~second).sum()), int((second & ~first).sum())
    shares = np.array([wins, losses, n - wins - losses]) / n
    draws = np.random.default_rng(seed).multinomial(n, shares, size=RESAMPLES)
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / n, (0.025, 0.975))
    p_value = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return Difference(n, (wins - losses) / n, float(low), float(high), p_value)


def bootstrap(
    score: Callable[[NDArray[np.float64]], float], count: int, width: int = 1, seed: int = 0
) -> tuple[float, float, float]:
    """A score of N images and the ends of its 95 % bootstrap interval over them, by percentiles.

    There are `SCORED` resamples, or fewer, at least 100, of more than a million answers: N images of `width` each.

    Args:
        score: Takes the weights of the images, float64 (N,): how often each was drawn. Resamples in which it is NaN do
            not count.
        count: N.
        width: How many answers an image has.
        seed: Of the resamples.

    Raises:
        ConfigError: There are no images.
    """
    if count < 1:
        raise ConfigError("An interval needs at least one image.")
    generator = np.random.default_rng(seed)
    rounds = max(100, min(SCORED, SCORED * 1_000_000 // (count * width)))
    draws = [
        score(np.bincount(generator.integers(count, size=count), minlength=count).astype(np.float64))
        for _ in range(rounds)
    ]
    whole = score(np.ones(count))
    if np.isnan(draws).all():
        return whole, float("nan"), float("nan")
    low, high = np.nanquantile(draws, (0.025, 0.975))
    return whole, float(low), float(high)
