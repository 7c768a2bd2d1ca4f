"""What `vpt test` and `vpt validate` print: scores with intervals, and those of every class or number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Column

from vpt.data.targets import Targets
from vpt.metrics.accuracy import wilson
from vpt.metrics.multilabel import average_precision, f1, mean_average_precision
from vpt.metrics.regression import mean_absolute_error, r2
from vpt.screen import Table

CLASSES = 20
"""Up to which all of them are listed."""
SQUARE = 10
"""Classes up to which the whole confusion matrix is shown."""
LISTED = 10
"""Of the classes, or confusions, that are listed where there are more."""
_SHORT = 4
"""Characters of names up to which they head the columns of the matrix; longer ones are numbered."""
_SHARES = ("acc", "mean_per_class", "miou", "pixel_acc", "mean_ap", "f1")
_IOU = "/iou/"


Answers = tuple[NDArray[np.floating[Any]], NDArray[Any]]
"""Outputs and labels, (N, C) each, of models of several labels an image, or of numbers."""


def score_lines(metrics: Mapping[str, float], kept: NDArray[np.int64] | Answers) -> Iterator[str]:
    """A line for each score; the first of each kind with its 95 % interval.

    That is from the confusion matrix, (classes, classes), with counts, or a bootstrap over the images that `kept` holds
    the answers of.
    """
    single = {key: value for key, value in metrics.items() if _IOU not in key}
    width = max(map(len, single), default=0)
    for key, value in single.items():
        name, text = key.partition("/")[2], f"{value:.4g}"
        if np.isnan(value):
            yield f"{key:<{width}}  – (these images say nothing of it)"
            continue
        if name in _SHARES:
            text = f"{100 * value:.1f} %"
        if not isinstance(kept, tuple):
            if name == "acc" and (n := int(kept.sum())):
                hits = int(kept.trace())
                low, high = wilson(hits, n)
                text += f" ({hits:,} of {n:,}; 95 %: {100 * low:.1f} to {100 * high:.1f})"
        elif name == "mean_ap":
            _, low, high = mean_average_precision(*kept)
            text += f" (of {len(kept[0]):,} images; 95 %: {100 * low:.1f} to {100 * high:.1f})"
        elif name == "mae":
            _, low, high = mean_absolute_error(*kept)
            text += f" (of {len(kept[0]):,} images; 95 %: {low:.4g} to {high:.4g})"
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


def answer_table(kept: Answers, class_names: Sequence[str], targets: Targets) -> Table:
    """The scores of each class, or of each number; the classes of the lowest AP where there are many."""
    outputs, labels = kept
    if targets == "regression":
        table = Table("number", *_numbers("mean", "MAE", "R²"), title="Errors of each number")
        missed, explained = np.abs(outputs - labels).mean(axis=0, dtype=np.float64), r2(outputs, labels)
        for name, mean, error, share in zip(class_names, labels.mean(axis=0), missed, explained, strict=True):
            table.add_row(name, f"{mean:.4g}", f"{error:.4g}", "–" if np.isnan(share) else f"{share:.3f}")
        return table
    precision, score = average_precision(outputs, labels), f1(outputs >= 0, labels)  # a logit of 0 is ½
    order, title = np.arange(len(class_names)), "Scores by class"
    if len(order) > CLASSES:
        order, title = np.argsort(precision, kind="stable")[:LISTED], f"The {LISTED} classes of the lowest AP"
    table = Table("class", *_numbers("images", "AP", "F1"), title=title)
    for place in order.tolist():
        ap = "–" if np.isnan(precision[place]) else f"{100 * precision[place]:.1f} %"
        table.add_row(class_names[place], f"{int(labels[:, place].sum()):,}", ap, f"{100 * score[place]:.1f} %")
    return table


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
