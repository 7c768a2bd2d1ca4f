"""All scores of one record that are a single number, as one row of a report."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vpt.argument_types import checked
from vpt.metrics.accuracy import mean_per_class, top1, wilson, worst_class
from vpt.metrics.calibration import aurc, equal_mass, equal_width, risk_at
from vpt.metrics.logits import Logits, predictions


@checked
def summary(logits: Logits, labels: NDArray[np.int64], temperature: float | None = None) -> dict[str, float | None]:
    """Scores a record of logits (N, classes), masked to the set's classes, and labels (N,), columns of these.

    Always these keys, in this order; shares lie in [0, 1]: ``n`` images, ``top1`` and the ends of its 95 % Wilson
    interval, ``mean_per_class`` and ``worst_class``, accuracies within classes, ``nll`` (natural logarithm), ``brier``
    in [0, 2], ``ece`` of 15 bins of equal width, ``ece_equal_mass`` of bins of equally many images, ``aurc``, the area
    under the risk-coverage curve, ``risk_at_80``, the selective risk at 80 % coverage; then ``temperature``, fitted on
    in-distribution validation images by `calibration.temperature`, and what it changes, all None without one. A
    DataError where the table cannot be scored.
    """
    plain = predictions(logits, labels)
    scaled = None if temperature is None else predictions(logits, labels, temperature)
    low, high = wilson(int(plain.correct.sum()), len(labels))
    answers = plain.confidence, plain.correct
    after = None if scaled is None else (scaled.confidence, scaled.correct)
    return {
        "n": len(labels),
        "top1": top1(logits, labels),
        "top1_low": low,
        "top1_high": high,
        "mean_per_class": mean_per_class(logits, labels),
        "worst_class": worst_class(logits, labels),
        "nll": plain.nll,
        "brier": float(plain.brier.mean()),
        "ece": equal_width(*answers).error,
        "ece_equal_mass": equal_mass(*answers).error,
        "aurc": aurc(*answers),
        "risk_at_80": risk_at(0.8, *answers),
        "temperature": temperature,
        "nll_scaled": None if scaled is None else scaled.nll,
        "ece_scaled": None if after is None else equal_width(*after).error,
        "ece_equal_mass_scaled": None if after is None else equal_mass(*after).error,
    }
