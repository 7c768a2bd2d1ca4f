"""All shifts of an evaluation together, at each α and with a strength for each image: mean, worst, harmonic mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, harmonic_mean

import numpy as np

from vpt.metrics.accuracy import correct, top1
from vpt.reports.page import Values
from vpt.robustness import per_image
from vpt.robustness.evaluation_result import RobustnessResult, Row
from vpt.robustness.evaluation_sets import CLEAN, SHIFT

BY_IMAGE = {"answers": "by image, answers", "models": "by image, models"}
"""Ways of `vpt.robustness.per_image`."""


def together(name: str, result: RobustnessResult) -> Iterator[Values]:
    """A row for each α, and for each of `BY_IMAGE` where both ends were measured: accuracies in [0, 1].

    ``way`` and ``alpha`` (None by image), ``clean``, ``shifts``, the mean over the shifted sets, or where there are
    none over the corrupted ones, how many these are (``sets``), ``worst``, the smallest of them, and ``worst_set``, and
    the ``harmonic`` mean of clean and shifts. Nothing where nothing is shifted.
    """
    shifts = [row for row in result.rows if row.kind == SHIFT] or [r for r in result.rows if r.severity is not None]
    if not shifts:
        return
    kept = [row for row in result.rows if row.kind == CLEAN] + shifts
    method = (result.protocol.get("adapt") or {}).get("method")
    adapted = "" if method is None else f", adapted at test time ({method})"
    for alpha in sorted({row.alpha for row in kept}):
        sets = {row.set: row.top1 for row in kept if row.alpha == alpha}
        yield {"model": name, "way": f"α = {alpha:g}{adapted}", "alpha": alpha} | _of_sets(sets)
    if not {0.0, 1.0} <= {row.alpha for row in kept}:
        return
    found: dict[str, dict[str, float]] = {kind: {} for kind in BY_IMAGE}
    for group in {row.set: [each for each in kept if each.set == row.set] for row in kept}.values():
        for kind, value in _by_image(result, group).items():
            found[kind][group[0].set] = value
    for kind, sets in found.items():
        yield {"model": name, "way": BY_IMAGE[kind], "alpha": None} | _of_sets(sets)


def _of_sets(sets: Mapping[str, float]) -> Values:
    shifted = {name: value for name, value in sets.items() if name != CLEAN}
    worst, clean, mean = min(shifted, key=lambda each: shifted[each]), sets[CLEAN], fmean(shifted.values())
    return {
        "clean": clean,
        "shifts": mean,
        "sets": len(shifted),
        "worst": shifted[worst],
        "worst_set": worst,
        "harmonic": harmonic_mean([clean, mean]),
    }


def _by_image(result: RobustnessResult, rows: Sequence[Row]) -> dict[str, float]:
    """Accuracies of one set; a record or two are in memory at a time."""
    ends = {row.alpha: result.record(row).matched for row in rows if row.alpha in (0.0, 1.0)}
    (start, labels), (end, _) = ends[0.0], ends[1.0]
    nearest = per_image.nearest(start, end, [row.alpha for row in rows])
    right = np.zeros(len(labels), dtype=bool)
    for row in rows:
        chosen = nearest == row.alpha
        if chosen.any():
            right[chosen] = correct(result.record(row).matched[0][chosen], labels[chosen])
    return {"answers": top1(per_image.answers(start, end), labels), "models": float(right.mean())}
