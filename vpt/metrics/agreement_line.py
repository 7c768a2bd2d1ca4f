"""Agreement on the line: accuracy under shift without labels of shifted images (Baek et al., NeurIPS 2022).

Where the accuracies of models in and out of distribution lie on a line on probit axes, so do the agreements of pairs of
models, and on the same one; and agreement needs no label. Where they lie on none, neither estimate means anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from vpt.argument_types import checked
from vpt.errors import ConfigError

INSIDE = (0.05, 0.98)
"""Between which agreements count, as in the released code: nearer to 0 and 1 a probit is a matter of a few images."""


@dataclass(frozen=True)
class Agreement:
    """The line of the agreements of K models, Φ⁻¹(out) = slope · Φ⁻¹(in) + intercept, and what follows from it.

    Attributes:
        slope: a.
        intercept: b.
        r2: The share of the variance of the agreements out of distribution that the line explains, on probit axes.
        pairs: How many pairs of models it was fitted to.
        left_out: How many more there were, whose agreement lies beyond `INSIDE` in or out of distribution.
        inside: Agreement in distribution of each pair that counts, (pairs,).
        outside: The same out of distribution.
        aline_s: ALine-S, Φ(a · Φ⁻¹(accuracy) + b) of each model, (K,).
        aline_d: ALine-D (K,), by least squares over all pairs; None where the pairs do not determine all models.
    """

    slope: float
    intercept: float
    r2: float
    pairs: int
    left_out: int
    inside: NDArray[np.float64]
    outside: NDArray[np.float64]
    aline_s: NDArray[np.float64]
    aline_d: NDArray[np.float64] | None


@checked
def agreement(inside: NDArray[np.int64], outside: NDArray[np.int64], accuracy: NDArray[np.float64]) -> Agreement:
    """Estimates accuracy out of distribution from predicted classes alone.

    Section 5 of the paper: ALine-S puts each accuracy in distribution on the line of the agreements. ALine-D lets the
    accuracies w out of distribution of each pair i, j fulfil (Φ⁻¹(wᵢ) + Φ⁻¹(wⱼ)) / 2 = Φ⁻¹(out) + a · ((Φ⁻¹(accᵢ) +
    Φ⁻¹(accⱼ)) / 2 − Φ⁻¹(in)) of their agreements, in the sense of least squares.

    Args:
        inside: Classes that K models predict for N images in distribution, (K, N).
        outside: The same of M images out of distribution, (K, M).
        accuracy: Of each model in distribution, (K,), above 0 and below 1.

    Raises:
        ConfigError: There are fewer than three models, or three pairs within `INSIDE`, all pairs agree alike in
            distribution, or an accuracy is none that has a probit.
    """
    models = len(inside)
    if models < 3 or len(outside) != models or accuracy.shape != (models,):
        raise ConfigError(f"Agreement on the line needs the predictions of at least three models, got {models}.")
    if not ((accuracy > 0) & (accuracy < 1)).all():
        raise ConfigError("A model is right on all images in distribution or on none, which has no place on the line.")
    every = list(combinations(range(models), 2))
    both = np.array([[float((each[i] == each[j]).mean()) for each in (inside, outside)] for i, j in every])
    counted = ((both >= INSIDE[0]) & (both <= INSIDE[1])).all(axis=1)
    pairs, (x, y) = np.array(every)[counted], norm.ppf(both[counted]).T
    if len(pairs) < 3:
        raise ConfigError(
            f"Only {len(pairs)} of {len(every)} pairs of models agree on {INSIDE[0]:.0%} to {INSIDE[1]:.0%} of the "
            "images: models that agree more, or less, tell no line."
        )
    if not np.ptp(x) > 0:
        raise ConfigError("All pairs of models agree on as many images in distribution, which is no line.")
    slope, intercept = np.polyfit(x, y, 1)
    spread = float(np.square(y - y.mean()).sum())
    r2 = 1 - float(np.square(y - slope * x - intercept).sum()) / spread if spread > 0 else 0.0
    probit = norm.ppf(accuracy)
    halves = np.zeros((len(pairs), models))
    np.put_along_axis(halves, pairs, 0.5, axis=1)
    found, _, rank, _ = np.linalg.lstsq(halves, y + slope * (halves @ probit - x), rcond=None)
    return Agreement(
        slope=float(slope),
        intercept=float(intercept),
        r2=r2,
        pairs=len(pairs),
        left_out=len(every) - len(pairs),
        inside=both[counted, 0],
        outside=both[counted, 1],
        aline_s=norm.cdf(slope * probit + intercept),
        aline_d=norm.cdf(found) if rank == models else None,
    )
