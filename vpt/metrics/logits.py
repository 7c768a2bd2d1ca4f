"""What a table of logits must be before it is scored, and how it is walked in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from vpt.errors import DataError

Logits = NDArray[Any]  # a float table (N, classes)

_BLOCK = 1 << 19  # numbers in a block: 4 MB as float64


def check_table(logits: Logits, labels: NDArray[np.int64]) -> None:
    """Refuses a table that cannot be scored.

    Args:
        logits: (N, classes).
        labels: (N,).

    Raises:
        DataError: It is empty, its labels do not belong to it, or a logit is not finite.
    """
    check_finite(logits)
    check_labels(labels, *logits.shape)


def check_finite(logits: Logits) -> None:
    """Refuses what is not a table of numbers.

    Args:
        logits: (N, classes).

    Raises:
        DataError: It is empty or a logit is not finite.
    """
    if logits.ndim != 2 or 0 in logits.shape:
        raise DataError(f"Logits are a table of images × classes with at least one of each, got shape {logits.shape}.")
    if not np.isfinite(logits).all():
        row = int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0])
        raise DataError(
            f"Row {row} of the logits holds a number that is not finite: evaluate this record again, "
            "and leave classes out by a mask rather than by -inf."
        )


def check_labels(labels: NDArray[np.int64], images: int, classes: int) -> None:
    """Refuses labels that do not belong to a table.

    Args:
        labels: (N,).
        images: Rows of the table.
        classes: Columns of the table, at least 1.

    Raises:
        DataError: There is not one label a row, or a label has no column.
    """
    if labels.shape != (images,):
        raise DataError(f"There are {images} rows of logits and labels of shape {labels.shape}: give one label a row.")
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise DataError(
            f"Label {outside[0]} is none of {classes} classes, 0 to {classes - 1}: mask the labels with the logits, "
            "or evaluate with the head of this set."
        )


def check_precision(logits: Logits) -> None:
    """Refuses reduced records where rounding would change which class wins.

    Args:
        logits: (N, classes).

    Raises:
        DataError: They have less than single precision.
    """
    if logits.dtype not in (np.float32, np.float64):
        raise DataError(
            f"These logits are {logits.dtype}, a reduced record, and masks and exact α curves need float32: "
            "evaluate again without reducing."
        )


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Cuts a table into runs of rows, so that what is computed on the way stays small.

    Args:
        rows: Of the table.
        columns: Of the table.

    Yields:
        Slices of consecutive rows; a block holds about half a million numbers.
    """
    step = max(1, _BLOCK // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


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
