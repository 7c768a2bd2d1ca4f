"""What images are labelled with: one class each, several classes, or numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from vpt.errors import ConfigError, DataError

Targets = Literal["multiclass", "multilabel", "regression"]
"""In torchmetrics' words: a class an image, labels int64 (N,); any number of classes, labels uint8 (N, C) of 0 and 1;
or K numbers, labels float32 (N, K), whose columns are then the "classes"."""

_TRUTH = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1, "no": 0, "yes": 1}


def fits(labels: NDArray[Any], targets: Targets) -> bool:
    """Whether labels have the form of such targets; those of no image may have any."""
    ndim, kinds = {"multiclass": (1, "iu"), "multilabel": (2, "iu"), "regression": (2, "f")}[targets]
    return not len(labels) or (labels.ndim == ndim and labels.dtype.kind in kinds)


def check_multiclass(targets: Targets, what: str) -> None:
    """Refuses, by a ConfigError, targets that `what` cannot deal with."""
    if targets != "multiclass":
        raise ConfigError(f"{what} of images with one class each; the targets of these data are {targets}.")


def truth(text: str, where: str) -> int:
    """Reads a field that says whether an image is of a class; a DataError, which begins with `where`, for another."""
    if (value := _TRUTH.get(text.casefold())) is None:
        raise DataError(f"{where} is {text!r}, where 1 or 0 (true or false, yes or no) is wanted: correct it.")
    return value


def number(text: str, where: str) -> float:
    """Reads a field that is a number; a DataError, which begins with `where`, where it is none, NaN or infinite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= float(np.finfo(np.float32).max):
        raise DataError(f"{where} is {text!r}, where a finite number is wanted: give one, or remove the line.")
    return value


def num_classes(labels: NDArray[Any]) -> int:
    """How many classes, or numbers, there are at least."""
    return 1 + int(labels.max()) if labels.ndim == 1 else labels.shape[1]


def positives(labels: NDArray[Any], classes: int) -> NDArray[np.int64]:
    """How many of N images are of each class, (classes,), by labels of one or several classes each; all, of numbers."""
    if labels.ndim == 1:
        return np.bincount(labels, minlength=classes).astype(np.int64)
    if labels.dtype.kind == "f":
        return np.full(classes, len(labels), dtype=np.int64)
    return cast("NDArray[np.int64]", labels.sum(axis=0, dtype=np.int64))


def strata(labels: NDArray[Any]) -> NDArray[np.int64]:
    """What images are held out by, a whole number each, (N,): the class, or the rarest of several; one for numbers."""
    if labels.ndim == 1:
        return cast("NDArray[np.int64]", labels)
    if labels.dtype.kind == "f":
        return np.zeros(len(labels), dtype=np.int64)
    counts = labels.sum(axis=0, dtype=np.int64)
    rarity = np.where(labels > 0, counts, len(labels) + 1)
    without = np.full((len(labels), 1), len(labels))  # images of no class are a stratum of their own
    return cast("NDArray[np.int64]", np.hstack([rarity, without]).argmin(axis=1).astype(np.int64))


def renumbered(labels: NDArray[Any], names: Sequence[str], wanted: Sequence[str]) -> NDArray[Any]:
    """Labels by `names` as labels by `wanted`, which has all of these."""
    numbers = np.array([list(wanted).index(name) for name in names], dtype=np.int64)
    if labels.ndim == 1:
        return cast("NDArray[Any]", numbers[labels])
    moved = np.zeros((len(labels), len(wanted)), dtype=labels.dtype)
    moved[:, numbers] = labels
    return moved


def several(fields: Iterable[str], separator: str) -> list[list[str]]:
    """The classes that each field names, between separators; none of an empty one."""
    return [[name for part in field.split(separator) if (name := part.strip())] for field in fields]
