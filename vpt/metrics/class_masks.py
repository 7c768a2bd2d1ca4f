"""Logits of a set that has fewer or coarser classes than the head: columns first, argmax and softmax after.

Scoring all 1000 classes on a set of 200 counts answers as wrong that the set cannot contain.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vpt.errors import ConfigError
from vpt.metrics.logits import Logits, check_precision


def masked(logits: Logits, classes: Sequence[int]) -> Logits:
    """Takes the columns of a set's classes.

    Args:
        logits: float32 or float64 (N, all classes).
        classes: Distinct columns; class k of the set is ``classes[k]`` of the head.

    Returns:
        (N, len(classes)), same type.

    Raises:
        ConfigError: A class has no column, or occurs twice.
        DataError: The logits are a reduced record.
    """
    check_precision(logits)
    columns = group_columns([classes], logits.shape[1])
    if len(np.unique(columns)) < len(columns):
        raise ConfigError("A class mask names a column twice: list each class of the set once.")
    taken: Logits = logits[:, columns]
    return taken


def matched(logits: Logits, labels: NDArray[np.int64], classes: Sequence[int]) -> tuple[Logits, NDArray[np.int64]]:
    """Restricts a record of all classes to some: the images of these classes, scored among these classes.

    The accuracy of ImageNet's validation images "on the classes of ImageNet-R", the abscissa of effective
    robustness, is such a slice of one record; no image is classified again.

    Args:
        logits: float32 or float64 (N, all classes).
        labels: (N,), columns.
        classes: As in `masked`.

    Returns:
        Logits (M, len(classes)) and labels (M,), positions in `classes`.

    Raises:
        ConfigError: A class has no column or occurs twice, or no image has one of them.
        DataError: The logits are a reduced record.
    """
    place = np.full(logits.shape[1], -1, dtype=np.int64)
    subset = masked(logits, classes)
    place[np.asarray(classes)] = np.arange(len(classes))
    rows = place[labels] >= 0
    if not rows.any():
        raise ConfigError(f"None of {len(labels)} images has one of the {len(classes)} classes of the mask.")
    return subset[rows], place[labels[rows]]


def group_max(logits: Logits, groups: Sequence[Sequence[int]]) -> Logits:
    """A class that several columns stand for has the largest of their logits (ObjectNet: Barbu et al., 2019).

    Args:
        logits: float32 or float64 (N, all classes).
        groups: The columns of each class of the set.

    Returns:
        (N, len(groups)), same type.

    Raises:
        ConfigError: A group is empty or names a column that does not exist.
        DataError: The logits are a reduced record.
    """
    check_precision(logits)
    columns = group_columns(groups, logits.shape[1])
    largest: Logits = np.maximum.reduceat(logits[:, columns], _starts(groups), axis=1)
    return largest


def group_mean(logits: Logits, groups: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """A class that several columns stand for has their mean probability (Geirhos et al., ICLR 2019, appendix).

    Args:
        logits: float32 or float64 (N, all classes).
        groups: The columns of each class of the set.

    Returns:
        (N, len(groups)): logits whose softmax is the mean probability of each group's columns, renormalised over
        the groups. They order the groups as the mean probabilities of the full softmax do.

    Raises:
        ConfigError: A group is empty or names a column that does not exist.
        DataError: The logits are a reduced record.
    """
    largest = group_max(logits, groups)
    columns, sizes = group_columns(groups, logits.shape[1]), [len(group) for group in groups]
    below = logits[:, columns].astype(np.float64) - np.repeat(largest, sizes, axis=1)
    shares = np.add.reduceat(np.exp(below), _starts(groups), axis=1) / sizes
    return np.asarray(largest + np.log(shares), dtype=np.float64)


def group_columns(groups: Sequence[Sequence[int]], classes: int) -> NDArray[np.int64]:
    """The columns of all groups, one after the other.

    Args:
        groups: The columns of each class of the set.
        classes: Columns of the logits.

    Returns:
        int64, as many as all groups have.

    Raises:
        ConfigError: A group is empty or names a column that does not exist.
    """
    if not len(groups) or not all(len(group) for group in groups):
        raise ConfigError("A class mask is empty: name at least one column for each class of the set.")
    columns = np.concatenate([np.asarray(group, dtype=np.int64) for group in groups])
    outside = columns[(columns < 0) | (columns >= classes)]
    if len(outside):
        raise ConfigError(f"A class mask names column {outside[0]}, the logits have columns 0 to {classes - 1}.")
    return columns


def _starts(groups: Sequence[Sequence[int]]) -> NDArray[Any]:
    return np.cumsum([0, *(len(group) for group in groups[:-1])])


Groups = Sequence[Sequence[int]]


def restrict(logits: Tensor, groups: Groups) -> Tensor:
    """Leaves only the classes of a test set, so that argmax and softmax are taken over these.

    Args:
        logits: (B, C).
        groups: One tuple of positions in 0..C-1 a class; the first is its label, the largest logit counts.

    Returns:
        (B, C): at each class's label the largest logit of its positions, elsewhere minus infinity.
    """
    merged = torch.full_like(logits, -torch.inf)
    for width, (labels, positions) in _by_width(tuple(tuple(group) for group in groups)).items():
        values = logits[:, positions.to(logits.device)].reshape(len(logits), -1, width).amax(dim=2)
        merged[:, labels.to(logits.device)] = values
    return merged


def mean_probability(logits: Tensor, groups: Groups) -> Tensor:
    """Turns the answer of a fine-grained classifier into one of coarse classes (Geirhos et al., ICLR 2019).

    Args:
        logits: (B, C).
        groups: G tuples of positions in 0..C-1.

    Returns:
        (B, G): the mean probability of each group's positions, after a softmax over all C.
    """
    probabilities = logits.softmax(dim=1)
    return torch.stack([probabilities[:, list(group)].mean(dim=1) for group in groups], dim=1)


@lru_cache(maxsize=16)
def _by_width(groups: tuple[tuple[int, ...], ...]) -> dict[int, tuple[Tensor, Tensor]]:
    """Labels and positions of the groups of each width."""
    widths = sorted({len(group) for group in groups})
    chosen = {width: [group for group in groups if len(group) == width] for width in widths}
    return {
        width: (torch.tensor([group[0] for group in same]), torch.tensor(same).flatten())
        for width, same in chosen.items()
    }
