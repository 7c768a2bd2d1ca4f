"""One pass over a table of logits leaves a few numbers an image; calibration and selection are made of these."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from vpt.robustness.tables import Logits, blocks, check_table


@dataclass(frozen=True)
class Predictions:
    """What a softmax classifier said about each image.

    Attributes:
        correct: bool (N,); of equal logits the first class wins.
        confidence: float64 (N,) in (0, 1], probability of the predicted class.
        log_likelihood: float64 (N,), natural logarithm of the probability of the right class.
        brier: float64 (N,) in [0, 2], squared distance between probabilities and the right answer.
    """

    correct: NDArray[np.bool_]
    confidence: NDArray[np.float64]
    log_likelihood: NDArray[np.float64]
    brier: NDArray[np.float64]

    @property
    def nll(self) -> float:
        """The mean negative log likelihood, at least 0."""
        return float(np.abs(self.log_likelihood).mean())


def predictions(logits: Logits, labels: NDArray[np.int64], temperature: float = 1.0) -> Predictions:
    """Softmax in float64, block by block: a table of 50,000 × 1000 needs some tens of megabytes.

    Args:
        logits: (N, classes).
        labels: (N,).
        temperature: Above 0; logits are divided by it (Guo et al., ICML 2017, equation 9).

    Returns:
        One entry an image.

    Raises:
        DataError: The table cannot be scored.
    """
    check_table(logits, labels)
    n = len(labels)
    right = logits.argmax(axis=1) == labels
    confidence, log_likelihood, brier = np.empty(n), np.empty(n), np.empty(n)
    for rows in blocks(*logits.shape):
        scaled = logits[rows].astype(np.float64) / temperature
        log_probabilities = scaled - logsumexp(scaled, axis=1, keepdims=True)
        own = np.arange(len(scaled)), labels[rows]
        probabilities = np.exp(log_probabilities)
        confidence[rows] = probabilities.max(axis=1)
        log_likelihood[rows] = log_probabilities[own]
        probabilities[own] -= 1
        brier[rows] = np.square(probabilities).sum(axis=1)
    return Predictions(np.asarray(right), confidence, log_likelihood, brier)


def ranked(
    confidence: NDArray[np.float64], correct: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Orders images from the surest to the least sure, without preference among the equally sure.

    Each image of a tie counts as the mean of its tie. Sums over the first k images are then their expectation over
    all orders of the tie, and the order of a record does not matter.

    Args:
        confidence: (N,).
        correct: (N,).

    Returns:
        Confidences, descending, and the share of right answers that belongs to each place; float64 (N,).
    """
    levels, place, sizes = np.unique(-confidence, return_inverse=True, return_counts=True)
    shares = np.bincount(place, weights=correct) / sizes
    return np.repeat(-levels, sizes), np.repeat(shares, sizes)
