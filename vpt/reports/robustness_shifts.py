"""All shifts of an evaluation together, at each α and with a strength for each image: mean, worst, harmonic mean.

And several evaluations together: agreement on the line, which estimates accuracy under shift without labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, harmonic_mean
from typing import Any

import numpy as np

from vpt.errors import ConfigError
from vpt.metrics.accuracy import correct, top1
from vpt.metrics.agreement_line import agreement
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


def agreements(models: Mapping[str, RobustnessResult], alphas: Sequence[float]) -> tuple[list[Values], list[str]]:
    """Agreement on the line (`vpt.metrics.agreement_line`) of at least three models on each shift, or corrupted set.

    A row for each set, α and model: accuracies in [0, 1], ``clean``, ``shifted``, which was measured, and the estimates
    ``aline_s`` and ``aline_d`` (None where there is none); of the line ``slope``, ``intercept``, ``r2``, ``pairs``,
    ``left_out``, and in the row of the first model each pair's agreement ``inside`` and ``outside``. Beside them a
    sentence for each set that has no line. Models that were adapted to the test images have no part.
    """
    own = {name: result for name, result in models.items() if result.protocol.get("adapt") is None}
    found: list[Values] = []
    refused: list[str] = []
    for alpha in alphas if len(own) >= 3 else ():
        at = {name: {row.set: row for row in result.rows if row.alpha == alpha} for name, result in own.items()}
        first = next(iter(at.values()))
        sets = [row.set for row in first.values() if row.kind == SHIFT] or [r.set for r in first.values() if r.severity]
        for name in sets if all(CLEAN in each for each in at.values()) else ():
            if all(name in each for each in at.values()):
                try:
                    found += _agreement(own, {model: (each[CLEAN], each[name]) for model, each in at.items()})
                except ConfigError as error:
                    refused.append(f"{name} at α = {alpha:g}: {error}")
    return found, refused


def _agreement(models: Mapping[str, RobustnessResult], rows: Mapping[str, tuple[Row, Row]]) -> list[Values]:
    classes: tuple[list[Any], list[Any]] = [], []
    for side, kept in enumerate(classes):
        records = [models[model].record(both[side]) for model, both in rows.items()]
        if not all(each.same_images(records[0]) for each in records):
            raise ConfigError("The models were evaluated on different images.")
        kept += [record.scored.argmax(axis=1) for record in records]
    accuracy = np.array([clean.top1 for clean, _ in rows.values()])
    line = agreement(np.array(classes[0]), np.array(classes[1]), accuracy)
    told = {key: getattr(line, key) for key in ("slope", "intercept", "r2", "pairs", "left_out")}
    found: list[Values] = []
    for place, (model, (clean, shifted)) in enumerate(rows.items()):
        estimates = {
            "aline_s": float(line.aline_s[place]),
            "aline_d": None if line.aline_d is None else float(line.aline_d[place]),
        }
        own: Values = {"model": model, "set": shifted.set, "alpha": shifted.alpha, "clean": clean.top1}
        found.append(own | {"shifted": shifted.top1} | estimates | told)
    found[0] |= {"inside": line.inside.tolist(), "outside": line.outside.tolist()}
    return found
