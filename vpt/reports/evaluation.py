"""What `vpt test` and `vpt validate` print: scores, the accuracy of every class, and what is taken for what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from rich.table import Column

from vpt.metrics.accuracy import wilson
from vpt.screen import Table

CLASSES = 20
"""Up to which all of them are listed."""
SQUARE = 10
"""Classes up to which the whole confusion matrix is shown."""
LISTED = 10
"""Of the classes, or confusions, that are listed where there are more."""
_SHORT = 4
"""Characters of names up to which they head the columns of the matrix; longer ones are numbered."""
_SHARES = ("acc", "mean_per_class", "miou", "pixel_acc")
_IOU = "/iou/"


def score_lines(metrics: Mapping[str, float], matrix: NDArray[np.int64]) -> Iterator[str]:
    """A line for each score; top-1 has counts and its 95 % interval from the confusion matrix, (classes, classes)."""
    single = {key: value for key, value in metrics.items() if _IOU not in key}
    width = max(map(len, single), default=0)
    for key, value in single.items():
        name, text = key.partition("/")[2], f"{value:.4g}"
        if name in _SHARES:
            text = f"{100 * value:.1f} %"
        if name == "acc" and (n := int(matrix.sum())):
            hits = int(matrix.trace())
            low, high = wilson(hits, n)
            text += f" ({hits:,} of {n:,}; 95 %: {100 * low:.1f} to {100 * high:.1f})"
        yield f"{key:<{width}}  {text}"


def class_tables(matrix: NDArray[np.int64], class_names: Sequence[str]) -> Iterator[Table]:
    """The accuracy of each class, rows of the confusion matrix, and the matrix; the worst of both of many classes."""
    images = matrix.sum(axis=1)
    present = np.flatnonzero(images)
    shares = matrix.diagonal()[present] / images[present]
    several, title = len(present) > CLASSES, "Accuracy by class"
    if several:
        order = np.argsort(shares, kind="stable")[:LISTED]
        present, shares, title = present[order], shares[order], f"The {LISTED} classes of the lowest accuracy"
    table = Table("class", *_numbers("images", "right", "accuracy"), title=title)
    for position, share in zip(present.tolist(), shares, strict=True):
        right = f"{matrix[position, position]:,}"
        table.add_row(class_names[position], f"{images[position]:,}", right, f"{100 * share:.1f} %")
    yield table
    if len(class_names) <= SQUARE:
        names, heads = list(class_names), list(class_names)
        if max(map(len, names)) > _SHORT:
            heads = [str(number) for number in range(1, len(names) + 1)]
            names = [f"{number} {name}" for number, name in zip(heads, names, strict=True)]
        square = Table("class", *_numbers(*heads), title="Images of a class, as predicted")
        for name, row in zip(names, matrix, strict=True):
            square.add_row(name, *(f"{count:,}" if count else "·" for count in row))
        yield square
    elif len(confused := _confused(matrix)):
        pairs = Table("class", "taken for", *_numbers("images"), title="What is most often confused")
        pairs.keys = 2
        for true, predicted in confused:
            pairs.add_row(class_names[true], class_names[predicted], f"{matrix[true, predicted]:,}")
        yield pairs


def iou_table(metrics: Mapping[str, float]) -> Iterator[Table]:
    """The IoU of each class of a segmentation, where it was measured."""
    if found := {key.partition(_IOU)[2]: value for key, value in metrics.items() if _IOU in key}:
        table = Table("class", *_numbers("IoU"), title="IoU by class")
        for name, value in found.items():
            table.add_row(name, f"{100 * value:.1f} %")
        yield table


def _numbers(*names: str) -> list[Column]:
    return [Column(name, justify="right") for name in names]


def _confused(matrix: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Pairs (true, predicted), the most frequent first."""
    wrong = matrix * (1 - np.eye(len(matrix), dtype=matrix.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:LISTED]
    pairs = [divmod(int(each), len(matrix)) for each in order]
    return [pair for pair in pairs if wrong[pair]]
