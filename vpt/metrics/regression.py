"""Errors of numbers, (N, K), against true ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vpt.metrics.accuracy import bootstrap

Floats = NDArray[np.floating]


def mean_absolute_error(values: Floats, truth: Floats) -> tuple[float, float, float]:
    """The mean over images and numbers of |value − truth|, and its 95 % interval over images."""
    missed = np.abs(np.asarray(values, dtype=np.float64) - truth).mean(axis=1)
    return bootstrap(lambda weights: float(weights @ missed / len(missed)), len(missed))


def r2(values: Floats, truth: Floats) -> NDArray[np.float64]:
    """The coefficient of determination of each of K numbers, (K,), of values (N, K); NaN where all truths are equal."""
    right = np.asarray(truth, dtype=np.float64)
    left = np.square(right - values).sum(axis=0)
    spread = np.square(right - right.mean(axis=0)).sum(axis=0)
    return np.asarray(1 - np.divide(left, spread, out=np.full_like(left, np.nan), where=spread > 0))


def mean_r2(values: Floats, truth: Floats) -> float:
    """The mean of `r2` over the numbers whose truths are not all equal; NaN where all are."""
    found = r2(values, truth)
    return float(np.nanmean(found)) if not np.isnan(found).all() else float("nan")
