"""Two models on the same images: the difference of their accuracies varies less than either accuracy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from vpt.errors import DataError
from vpt.metrics.accuracy import correct
from vpt.robustness.evaluation.records import Record

RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """How much more often the first model is right.

    Attributes:
        n: Images.
        value: First minus second top-1, in [-1, 1].
        low: Lower end of its 95 % bootstrap interval.
        high: Upper end.
        p_value: Of equal accuracy, McNemar's test in its exact form (Psychometrika 12, 1947).
    """

    n: int
    value: float
    low: float
    high: float
    p_value: float


def check_same_images(first: Record, second: Record) -> None:
    """Refuses records of different images.

    Args:
        first: A record.
        second: Another.

    Raises:
        DataError: Their index or label differs.
    """
    ours, theirs = first.protocol.get("set", "unnamed"), second.protocol.get("set", "unnamed")
    for what, one, other in (("images", first.index, second.index), ("labels", first.label, second.label)):
        if not np.array_equal(one, other):
            raise DataError(
                f"The records of sets {ours!r} ({len(one)} images) and {theirs!r} ({len(other)} images) hold different "
                f"{what}: compare two models on one list, both evaluated with the same max_images and seed."
            )


def difference(first: Record, second: Record, seed: int = 0) -> Difference:
    """Compares two models by a paired bootstrap over images (Efron & Tibshirani, 1993, chapter 13, percentiles).

    An image adds -1, 0 or 1 to the difference, so the counts of these three in a resample of images are multinomial
    and 10,000 resamples are drawn without touching an image.

    Args:
        first: A record; replace its logits by masked ones to score a subset of classes.
        second: A record of the same images.
        seed: Of the bootstrap.

    Returns:
        The difference and its interval.

    Raises:
        DataError: The records hold different images.
    """
    check_same_images(first, second)
    ours, theirs = (correct(record.logits, record.label) for record in (first, second))
    n, wins, losses = len(ours), int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    shares = np.array([wins, losses, n - wins - losses]) / n
    draws = np.random.default_rng(seed).multinomial(n, shares, size=RESAMPLES)
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / n, (0.025, 0.975))
    p_value = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return Difference(n, (wins - losses) / n, float(low), float(high), p_value)
