"""Calibration error, temperature scaling, and selective risk: errors among the most confident images.

Confidences are float64 (N,) in (0, 1], `correct` says which of the N images are classified correctly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import betaincinv, softmax

from vpt.argument_types import checked
from vpt.errors import ConfigError
from vpt.metrics.logits import Logits, blocks, check_table

BINS = 15
"""As in Guo et al., ICML 2017."""
_STARTS = (0.99, 0.9, 0.7, 0.4)  # of the chains of `risk_threshold`


@dataclass(frozen=True)
class Bins:
    """The B bins of a reliability diagram that hold images, by ascending confidence.

    Each has a count of images, their mean confidence, and the share of them that is right; float64 (B,).
    """

    count: NDArray[np.float64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    @property
    def error(self) -> float:
        """The expected calibration error in [0, 1]: the mean gap, weighted by images (Naeini et al., AAAI 2015)."""
        return float(np.average(np.abs(self.accuracy - self.confidence), weights=self.count))


def _check(confidence: NDArray[np.float64], correct: NDArray[np.bool_], bins: int = 1) -> None:
    """A ConfigError where there is no image, they do not belong together, or are no confidences in (0, 1]."""
    shape = np.shape(confidence)
    if len(shape) != 1 or not shape[0] or np.shape(correct) != shape:
        raise ConfigError(f"Confidences and what is right are (N,), N at least 1, got {shape} and {np.shape(correct)}.")
    if not bool(((confidence > 0) & (confidence <= 1 + 1e-9)).all()):
        raise ConfigError(f"Confidences lie in (0, 1], got {confidence.min():.4g} to {confidence.max():.4g}.")
    if bins < 1:
        raise ConfigError(f"A reliability diagram has at least one bin, got {bins}.")


@checked
def ranked(
    confidence: NDArray[np.float64], correct: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Orders images from most to least confident, without preference among ties.

    Each image of a tie counts as its mean, so that sums over the first k are their expectation over all orders of the
    tie. Returns confidences, descending, and the share of correct predictions at each place; float64 (N,).
    """
    _check(confidence, correct)
    levels, place, sizes = np.unique(-confidence, return_inverse=True, return_counts=True)
    shares = np.bincount(place, weights=correct) / sizes
    return np.repeat(-levels, sizes), np.repeat(shares, sizes)


@checked
def equal_width(confidence: NDArray[np.float64], correct: NDArray[np.bool_], bins: int = BINS) -> Bins:
    """Bins of equal width, (0, 1/bins] to (1 − 1/bins, 1] (Guo et al., ICML 2017, equations 2 and 3).

    torchmetrics puts a confidence of exactly 1 into a bin of its own, which a saturated softmax often reaches.
    """
    _check(confidence, correct, bins)
    inner = np.arange(1, bins) / bins
    place = np.searchsorted(inner, confidence, side="left")
    count = np.bincount(place)
    kept = count > 0
    sums = (np.bincount(place, weights=values)[kept] for values in (confidence, correct))
    means = [total / count[kept] for total in sums]
    return Bins(count[kept].astype(np.float64), *means)


@checked
def equal_mass(confidence: NDArray[np.float64], correct: NDArray[np.bool_], bins: int = BINS) -> Bins:
    """Bins of equally many images (Nguyen & O'Connor, EMNLP 2015), the larger ones where N does not divide.

    Equally sure images count as the mean of their tie; there are N bins if there are fewer images.
    """
    _check(confidence, correct, bins)
    level, share = ranked(confidence, correct)
    pieces: Sequence[NDArray[np.int64]] = np.array_split(np.arange(len(level))[::-1], min(bins, len(level)))
    count = np.array([len(piece) for piece in pieces], dtype=np.float64)
    means = [np.array([values[piece].mean() for piece in pieces]) for values in (level, share)]
    return Bins(count, *means)


@checked
def temperature(logits: Logits, labels: NDArray[np.int64]) -> float | None:
    """Finds the temperature of maximum likelihood on validation images (Guo et al., ICML 2017, section 4.2).

    The negative log likelihood is convex in 1/T; its derivative's only root is bracketed and found to machine
    precision. Fit on in-distribution validation, logits (N, classes) and labels (N,), then read test sets once. T > 0;
    None where there is no maximum at a finite positive T: every image is right, so that T → 0 is best, or the answers
    are no better than none, so that T → ∞ is. A DataError where the table cannot be scored.
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


def risks(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The selective risk, errors among the k most confident images, at every coverage k / N: float64 (N,) from k = 1.

    Equally confident images enter in random order; the expectation over all orders is returned.
    """
    _, share = ranked(confidence, correct)
    return np.asarray(np.cumsum(1 - share) / np.arange(1, len(share) + 1))


def aurc(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> float:
    """The area under the risk-coverage curve, in [0, 1]: the mean of `risks` (Geifman & El-Yaniv, NeurIPS 2017)."""
    return float(risks(confidence, correct).mean())


@checked
def risk_at(coverage: float, confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> float:
    """The selective risk at a coverage in (0, 1], the number of images rounded up; a ConfigError out of range."""
    if not 0 < coverage <= 1:
        raise ConfigError(f"Coverage is a share of the images above 0 and at most 1, got {coverage}.")
    answered = math.ceil(round(coverage * len(confidence), 9))  # 0.55 · 100 is a little more than 55
    return float(risks(confidence, correct)[answered - 1])


@checked
def risk_threshold(
    confidence: NDArray[np.float64], correct: NDArray[np.bool_], max_risk: float, certainty: float = 0.9
) -> float:
    """The lowest confidence from which on at most a share of `max_risk` of the answers is wrong.

    Confidences from 0.999 down in steps of 0.001 are tested on N validation images, each by a binomial bound, in four
    chains that begin at 0.99, 0.9, 0.7 and 0.4, share the doubt that is left by `certainty`, and end where a bound is
    above `max_risk` (Learn then Test: Angelopoulos et al., 2021, fixed sequences with several starts). Where
    further images are drawn as these, the promise holds with that certainty. A ConfigError where either share is not
    in (0, 1), or no threshold keeps the promise.
    """
    _check(confidence, correct)
    for name, value in (("max_risk", max_risk), ("certainty", certainty)):
        if not 0 < value < 1:
            raise ConfigError(f"{name} lies between 0 and 1, got {value}.")
    doubt = (1 - certainty) / len(_STARTS)
    found = math.inf
    for start in _STARTS:
        for threshold in np.arange(round(1000 * start), 0, -1) / 1000:
            answered = confidence >= threshold
            n, wrong = int(answered.sum()), int((answered & ~correct).sum())
            if wrong == n or betaincinv(wrong + 1, n - wrong, 1 - doubt) > max_risk:
                break
            found = min(found, float(threshold))
    if math.isinf(found):
        least = math.ceil(math.log(doubt) / math.log1p(-max_risk))
        raise ConfigError(
            f"No threshold keeps the share of errors below {max_risk:g}: {int((~correct).sum())} of {len(correct)} "
            f"validation images are wrong, and to promise it takes {least:,} right ones without a wrong one among "
            "them. Allow more, or give more validation images."
        )
    return found
