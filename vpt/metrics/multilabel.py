"""Scores of images with several labels each, and the thresholds that decide.

Scores and labels are (N, C), labels 0 or 1; the N images may have weights, (N,), as in a bootstrap.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vpt.argument_types import checked
from vpt.metrics.accuracy import bootstrap

Floats = NDArray[np.floating]


@checked
def average_precision(
    scores: Floats, labels: NDArray[np.integer], weights: Floats | None = None
) -> NDArray[np.float64]:
    """The average precision of each class, (C,), in [0, 1]; NaN of a class without images.

    AP = Σ (R_k − R_(k−1)) · P_k over the distinct scores, from the largest (scikit-learn's and torchmetrics' sum, no
    interpolation).
    """
    return _average_precision(_ranked(scores, labels), np.ones(len(scores)) if weights is None else weights)


def _ranked(scores: Floats, labels: NDArray[np.integer]) -> list[tuple[NDArray[np.int64], Floats, NDArray[np.int64]]]:
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


def f1(decided: NDArray[np.bool_], labels: NDArray[np.integer], weights: Floats | None = None) -> NDArray[np.float64]:
    """The F1 score of each class, 2 TP / (2 TP + FP + FN), (C,); 0 where there is nothing of it, as torchmetrics'."""
    own = np.ones(len(labels)) if weights is None else np.asarray(weights, dtype=np.float64)
    truth = labels > 0
    hits = own @ (decided & truth)
    both = own @ decided.astype(np.float64) + own @ truth.astype(np.float64)
    return np.asarray(np.divide(2 * hits, both, out=np.zeros_like(hits), where=both > 0))


@checked
def f1_thresholds(probabilities: Floats, labels: NDArray[np.integer]) -> NDArray[np.float64]:
    """The probability from which on a class counts as seen so that its F1 is largest on these images, (C,).

    Thresholds lie midway between the probabilities of two images; of equally good ones the largest is taken. A class
    without images keeps 0.5.
    """
    found = np.full(probabilities.shape[1], 0.5)
    for place, (order, truth, ends) in enumerate(_ranked(probabilities, labels)):
        if not truth.any():
            continue
        falling = probabilities[order, place].astype(np.float64)
        hits = np.cumsum(truth)[ends]
        best = ends[int(np.argmax(2 * hits / (ends + 1 + truth.sum())))]
        below = falling[best + 1] if best + 1 < len(falling) else 0.0
        found[place] = (falling[best] + below) / 2
    return found


def mean_average_precision(scores: Floats, labels: NDArray[np.integer]) -> tuple[float, float, float]:
    """The mean of `average_precision` over the classes with images, and its 95 % interval over images."""
    ranked = _ranked(scores, labels)
    return bootstrap(lambda weights: float(np.nanmean(_average_precision(ranked, weights))), len(scores))
