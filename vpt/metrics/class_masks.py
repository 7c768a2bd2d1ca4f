"""Logits of a set that has fewer or coarser classes than the head: columns first, argmax and softmax after.

Scoring all 1000 classes on a set of 200 counts answers as wrong that the set cannot contain.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vpt.errors import ConfigError
from vpt.metrics.logits import Logits, check_precision

Groups = Sequence[Sequence[int]]
"""The columns of each class of a set, its label first."""


def group_max(logits: Tensor, groups: Groups) -> Tensor:
    """A class that several columns stand for has the largest of their logits (ObjectNet: Barbu et al., 2019).

    Args:
        logits: (N, all classes).
        groups: The columns of each class of the set.

    Returns:
        (N, len(groups)), same type and device.

    Raises:
        ConfigError: A group is empty or names a column that does not exist.
    """
    columns = torch.from_numpy(group_columns(groups, logits.shape[1])).to(logits.device)
    owners = torch.tensor([place for place, group in enumerate(groups) for _ in group], device=logits.device)
    lowest = logits.new_full((len(logits), len(groups)), -torch.inf)
    return lowest.scatter_reduce(1, owners.expand(len(logits), -1), logits[:, columns], "amax")


def restrict(logits: Tensor, groups: Groups) -> Tensor:
    """Leaves only the classes of a test set, so that argmax and softmax are taken over these.

    Args:
        logits: (N, all classes).
        groups: The columns of each class of the set; the first is its label.

    Returns:
        Same shape: at each class's label the largest logit of its columns, elsewhere minus infinity.

    Raises:
        ConfigError: A group is empty or names a column that does not exist.
    """
    restricted = torch.full_like(logits, -torch.inf)
    restricted[:, [group[0] for group in groups]] = group_max(logits, groups)
    return restricted


def matched(logits: Logits, labels: NDArray[np.int64], groups: Groups | None) -> tuple[Logits, NDArray[np.int64]]:
    """Takes from a record of all classes the images of some classes, scored among these classes.

    The accuracy of ImageNet's validation images "on the classes of ImageNet-R", the abscissa of effective
    robustness, is such a slice of one record; no image is classified again.

    Args:
        logits: (N, all classes), float32 or float64 where there are groups.
        labels: (N,), columns.
        groups: The columns of each class; None for all classes.

    Returns:
        Logits (M, len(groups)) and labels (M,), positions in `groups`.

    Raises:
        ConfigError: A group is empty or names a column that does not exist, or no image has one of the classes.
        DataError: The logits are a reduced record.
    """
    if groups is None:
        return logits, labels
    check_precision(logits)
    places = positions(labels, groups)
    rows = places >= 0
    if not rows.any():
        raise ConfigError(f"None of {len(labels)} images has one of the {len(groups)} classes of the mask.")
    return group_max(torch.from_numpy(logits[rows]), groups).numpy(), places[rows]


def positions(labels: NDArray[np.int64], groups: Groups) -> NDArray[np.int64]:
    """Finds the class of each label.

    Args:
        labels: (N,), columns of the head.
        groups: The columns of each class.

    Returns:
        (N,), positions in `groups`; -1 where a label is in none.
    """
    place = np.full(1 + max(int(labels.max()), *(max(group) for group in groups)), -1, dtype=np.int64)
    for position, group in enumerate(groups):
        place[list(group)] = position
    return place[labels]


def group_mean(logits: Logits, groups: Groups) -> NDArray[np.float64]:
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
    check_precision(logits)
    own = logits[:, group_columns(groups, logits.shape[1])].astype(np.float64)
    sizes = [len(group) for group in groups]
    totals = np.logaddexp.reduceat(own, np.cumsum([0, *sizes[:-1]]), axis=1)
    return np.asarray(totals - np.log(sizes), dtype=np.float64)


def group_columns(groups: Groups, classes: int) -> NDArray[np.int64]:
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
