"""Scores of images with several labels each, and the thresholds that decide.

Scores and labels are (N, C), labels 0 or 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpt.argument_types import checked
from vpt.metrics.accuracy import bootstrap

Floats = NDArray[np.floating]


@checked
def average_precision(scores: Floats, labels: NDArray[Any], weights: Floats | None = None) -> NDArray[np.float64]:
    """The average precision of each class, (C,), in [0, 1]; NaN of a class without images.

    AP = Σ (R_k − R_(k−1)) · P_k over the distinct scores, from the largest (scikit-learn's and torchmetrics' sum, no
    interpolation). The images may have weights, (N,), as in a bootstrap.
    """
    return _average_precision(_ranked(scores, labels), np.ones(len(scores)) if weights is None else weights)


def _ranked(scores: Floats, labels: NDArray[Any]) -> list[tuple[NDArray[np.int64], Floats, NDArray[np.int64]]]:
    """Of each class the order of the images, their labels in it, and the last place of each distinct score."""
    found = []
    for column, truth in zip(scores.T, labels.T, strict=True):
        order = np.argsort(-column, kind="stable")
        ends = np.flatnonzero(np.diff(column[order], append=np.nan))
        found.append((order, truth[order].astype(np.float64), ends))
    return found


def _average_precision(
    ranked: list[tuple[NDArray[np.int64], Floats, NDArray[np.int64]]], weights: Floats
) -> NDArray[np.float64]:
    found = np.full(len(ranked), np.nan)
    for place, (order, truth, ends) in enumerate(ranked):
        own = weights[order]
        hits, seen = np.cumsum(own * truth)[ends], np.cumsum(own)[ends]
        if hits[-1] > 0:
            precision = np.divide(hits, seen, out=np.zeros_like(hits), where=seen > 0)
            found[place] = (np.diff(hits, prepend=0.0) * precision).sum() / hits[-1]
    return found


def f1(decided: NDArray[np.bool_], labels: NDArray[Any]) -> NDArray[np.float64]:
    """The F1 score of each class, 2 TP / (2 TP + FP + FN), (C,); 0 where there is nothing of it."""
    truth = labels > 0
    hits = (decided & truth).sum(axis=0, dtype=np.float64)
    both = decided.sum(axis=0) + truth.sum(axis=0)
    return np.asarray(np.divide(2 * hits, both, out=np.zeros_like(hits), where=both > 0))


def mean_ap(scores: Floats, labels: NDArray[Any]) -> float:
    """The mean of `average_precision` over the classes with images; NaN without any."""
    return _mean(average_precision(scores, labels), labels)


def mean_f1(decided: NDArray[np.bool_], labels: NDArray[Any]) -> float:
    """The mean of `f1` over the classes with images; NaN without any."""
    return _mean(f1(decided, labels), labels)


def _mean(scores: NDArray[np.float64], labels: NDArray[Any]) -> float:
    present = (labels > 0).any(axis=0)
    return float(scores[present].mean()) if present.any() else float("nan")


@checked
def f1_thresholds(logits: Floats, labels: NDArray[Any]) -> NDArray[np.float64]:
    """The logit from which on a class counts as seen so that its F1 is largest on these images, (C,).

    Thresholds lie midway between the logits of two images, or at the smallest; of equally good ones the largest is
    taken. A class without images keeps 0, a probability of ½.
    """
    found = np.zeros(logits.shape[1])
    for place, (order, truth, ends) in enumerate(_ranked(logits, labels)):
        if not truth.any():
            continue
        falling = logits[order, place].astype(np.float64)
        hits = np.cumsum(truth)[ends]
        best = ends[int(np.argmax(2 * hits / (ends + 1 + truth.sum())))]
        found[place] = (falling[best] + falling[min(best + 1, len(falling) - 1)]) / 2
    return found


def mean_average_precision(scores: Floats, labels: NDArray[Any]) -> tuple[float, float, float]:
    """The mean of `average_precision` over the classes with images, and its 95 % interval over images."""
    ranked = _ranked(scores, labels)

    def score(weights: Floats) -> float:
        found = _average_precision(ranked, weights)
        return float(np.nanmean(found)) if not np.isnan(found).all() else float("nan")

    return bootstrap(score, len(scores), labels.shape[1])
