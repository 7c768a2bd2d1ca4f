"""Tables of logits: what they must be before they are scored, what a softmax says, and which classes count.

Logits are (N, classes) and labels (N,). On a set of fewer or coarser classes than the head's, columns are taken first,
argmax and softmax after: else predictions that the set cannot contain would count as wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from torch import Tensor

from vpt.argument_types import checked
from vpt.errors import ConfigError, DataError

Logits = NDArray[Any]  # a float table (N, classes)

_BLOCK = 1 << 19  # numbers in a block: 4 MB as float64


def check_table(logits: Logits, labels: NDArray[np.int64], masked: bool = False) -> None:
    """A DataError where a table is empty, labels do not belong to it, or a logit is not finite.

    Where it is `masked`, minus infinity leaves classes out, but never all of a row.
    """
    check_finite(logits, masked)
    check_labels(labels, *logits.shape)


def check_finite(logits: Logits, masked: bool = False) -> None:
    """Refuses what is not a table of numbers; a DataError where it is empty or a logit is not finite."""
    if logits.ndim != 2 or 0 in logits.shape:
        raise DataError(f"Logits are a table of images × classes with at least one of each, got shape {logits.shape}.")
    if logits.dtype.kind not in "fiu":
        raise DataError(f"Logits are numbers, got an array of {logits.dtype}.")
    finite = np.isfinite(logits.max(axis=1, keepdims=True) if masked else logits)
    if not finite.all():
        row = int(np.flatnonzero(~finite.all(axis=1))[0])
        raise DataError(
            f"Row {row} of the logits holds a number that is not finite: evaluate this record again, "
            "and leave classes out by a mask rather than by -inf."
        )


def check_labels(labels: NDArray[np.int64], images: int, classes: int) -> None:
    """A DataError where a table has not one label a row, or a label has no column."""
    if labels.shape != (images,):
        raise DataError(f"There are {images} rows of logits and labels of shape {labels.shape}: give one label a row.")
    if labels.dtype.kind not in "iu":
        raise DataError(f"Labels are whole numbers, got an array of {labels.dtype}.")
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise DataError(
            f"Label {outside[0]} is none of {classes} classes, 0 to {classes - 1}: mask the labels with the logits, "
            "or evaluate with the head of this set."
        )


def check_precision(logits: Logits) -> None:
    """A DataError for reduced records, of less than single precision: rounding would change which class wins."""
    if logits.dtype not in (np.float32, np.float64):
        raise DataError(
            f"These logits are {logits.dtype}, a reduced record, and masks and exact α curves need float32: "
            "evaluate again without reducing."
        )


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Cuts a table into runs of rows of half a million numbers, so that what is computed on the way stays small."""
    step = max(1, _BLOCK // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


@dataclass(frozen=True)
class Predictions:
    """What a softmax classifier said about each image; all are (N,), and float64 unless said.

    `correct` is bool, and of equal logits the first class wins. `confidence`, in (0, 1], is the probability of the
    predicted class, `log_likelihood` the natural logarithm of that of the right class, and `brier`, in [0, 2], the
    squared distance between probabilities and the one-hot label.
    """

    correct: NDArray[np.bool_]
    confidence: NDArray[np.float64]
    log_likelihood: NDArray[np.float64]
    brier: NDArray[np.float64]

    @property
    def nll(self) -> float:
        """The mean negative log likelihood, at least 0."""
        return float(np.abs(self.log_likelihood).mean())


@checked
def predictions(logits: Logits, labels: NDArray[np.int64], temperature: float = 1.0) -> Predictions:
    """Softmax in float64, block by block: a table of 50,000 × 1000 needs some tens of megabytes.

    Logits are divided by T > 0 (Guo et al., ICML 2017, equation 9). A DataError where the table cannot be scored.
    """
    check_table(logits, labels)
    if not temperature > 0:
        raise ConfigError(f"A temperature is above 0, got {temperature}.")
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


Groups = Sequence[Sequence[int]]
"""The columns of each class of a set, its label first."""


def group_max(logits: Tensor, groups: Groups) -> Tensor:
    """A class that several columns stand for has the largest of their logits (ObjectNet: Barbu et al., 2019).

    Takes (N, all classes), gives (N, len(groups)); all that take groups and logits raise what `group_columns` does.
    """
    columns = torch.from_numpy(group_columns(groups, logits.shape[1])).to(logits.device)
    owners = torch.tensor([place for place, group in enumerate(groups) for _ in group], device=logits.device)
    lowest = logits.new_full((len(logits), len(groups)), -torch.inf)
    return lowest.scatter_reduce(1, owners.expand(len(logits), -1), logits[:, columns], "amax")


def restrict(logits: Tensor, groups: Groups) -> Tensor:
    """Leaves only the classes of a test set, so that argmax and softmax are taken over these.

    Of the same shape: at each class's label the largest logit of its columns, elsewhere minus infinity.
    """
    restricted = torch.full_like(logits, -torch.inf)
    restricted[:, [group[0] for group in groups]] = group_max(logits, groups)
    return restricted


@checked
def matched(logits: Logits, labels: NDArray[np.int64], groups: Groups | None) -> tuple[Logits, NDArray[np.int64]]:
    """Takes from a record of all classes the images of some classes, scored among these classes.

    ImageNet's accuracy "on the classes of ImageNet-R", the abscissa of effective robustness, is such a slice. Gives
    logits (M, len(groups)) and labels (M,), positions in `groups`; both as they are where that is None. A ConfigError
    where a group is empty or names no column, or no image has such a class; a DataError where logits are a reduced
    record.
    """
    if groups is None:
        return logits, labels
    check_precision(logits)
    group_columns(groups, logits.shape[1])
    places = positions(labels, groups)
    rows = places >= 0
    if not rows.any():
        raise ConfigError(f"None of {len(labels)} images has one of the {len(groups)} classes of the mask.")
    return group_max(torch.from_numpy(logits[rows]), groups).numpy(), places[rows]


def positions(labels: NDArray[np.int64], groups: Groups) -> NDArray[np.int64]:
    """The position in `groups` of each label, a column of the head; -1 where it is in none."""
    place = np.full(1 + max(int(labels.max()), *(max(group) for group in groups)), -1, dtype=np.int64)
    for position, group in enumerate(groups):
        place[list(group)] = position
    return place[labels]


@checked
def group_mean(logits: Logits, groups: Groups) -> NDArray[np.float64]:
    """A class that several columns stand for has their mean probability (Geirhos et al., ICLR 2019, appendix).

    Gives (N, len(groups)): logits whose softmax is the mean probability of each group's columns, renormalised, in the
    order of the full softmax's means. A DataError where the logits are a reduced record.
    """
    check_precision(logits)
    own = logits[:, group_columns(groups, logits.shape[1])].astype(np.float64)
    sizes = [len(group) for group in groups]
    totals = np.logaddexp.reduceat(own, np.cumsum([0, *sizes[:-1]]), axis=1)
    return np.asarray(totals - np.log(sizes), dtype=np.float64)


def group_columns(groups: Groups, classes: int) -> NDArray[np.int64]:
    """Columns of all groups, in order; a ConfigError where one is empty or has a column that does not exist."""
    if not len(groups) or not all(len(group) for group in groups):
        raise ConfigError("A class mask is empty: name at least one column for each class of the set.")
    columns = np.concatenate([np.asarray(group, dtype=np.int64) for group in groups])
    outside = columns[(columns < 0) | (columns >= classes)]
    if len(outside):
        raise ConfigError(f"A class mask names column {outside[0]}, the logits have columns 0 to {classes - 1}.")
    return columns
