"""Effective robustness of evaluated models, on ImageNet's shifts alone: others have no baseline population."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from vpt.robustness.answers import Answers, places
from vpt.robustness.effective import BASELINES, FIT_FROM, effective_robustness
from vpt.robustness.masks import group_max
from vpt.robustness.records import Record
from vpt.robustness.scores import top1
from vpt.robustness.shifts import CLEAN, SHIFT

_REFERENCE = "imagenet_1k"


def effective_rows(name: str, model: Answers) -> Iterator[dict[str, Any]]:
    """Compares accuracies under shift with what ImageNet's accuracy predicts.

    Args:
        name: Of the model.
        model: Its answers; nothing is given unless its clean set is ImageNet's validation set, in full precision.

    Yields:
        Model, set, α, both accuracies, effective robustness in percentage points, and whether the baseline is
        extrapolated.
    """
    protocol, rows = model.result.protocol, model.result.rows
    if protocol["data"]["name"] != _REFERENCE or protocol["logits"] != "float32":
        return
    clean = {row.alpha: row for row in rows if row.kind == CLEAN}
    for row in (row for row in rows if row.kind == SHIFT and row.set in BASELINES):
        groups = model.record(row).protocol["groups"]
        reference = matched_accuracy(model.record(clean[row.alpha]), groups)
        yield effective_row(name, row.set, row.alpha, row.top1, reference)


def matched_accuracy(record: Record, groups: list[list[int]] | None) -> float:
    """Scores the reference on the classes of a shift.

    Args:
        record: Of ImageNet's validation set.
        groups: Of the shift; None if it has all classes.

    Returns:
        Top-1 in [0, 1] of the images of these classes, among these classes.
    """
    if groups is None:
        return top1(record.logits, record.label)
    place = places(record.label, groups)
    kept = place >= 0
    return top1(group_max(record.logits[kept], groups), place[kept])


def effective_row(model: str, shift: str, alpha: float, accuracy: float, reference: float) -> dict[str, Any]:
    """Makes one row.

    Args:
        model: Its name.
        shift: A key of `BASELINES`.
        alpha: In [0, 1].
        accuracy: On the shift, in [0, 1].
        reference: On the reference set, in [0, 1].

    Returns:
        The row; ``extrapolated`` where the reference lies below all models that the baseline was fitted on.
    """
    baseline = BASELINES[shift]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the row says so itself
        points = effective_robustness(shift, accuracy, {baseline.reference: reference})
    return {
        "model": model,
        "set": shift,
        "alpha": alpha,
        "accuracy": accuracy,
        "reference": baseline.reference,
        "reference_accuracy": reference,
        "points": points,
        "extrapolated": reference < FIT_FROM,
    }
