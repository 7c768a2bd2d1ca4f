"""Ways to interpolate one tuned model beside each other, all from records: no image is classified again.

Gate: the strength of a delta (DESIGN decision 9), log α on the attention logits of prompt keys. Ensemble: the logits
of α = 0 and α = 1 mixed. From start: all trained tensors between their initial and their final values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from rich.table import Table

from vpt.errors import ConfigError
from vpt.robustness import records
from vpt.robustness.result import RobustnessResult, between, score, shown_alphas

ENSEMBLE = "ensemble"
METHODS = {"strength": "gate", "end-to-end": "weights", "head": "head"}


@dataclass(frozen=True)
class Curve:
    """One method on all sets.

    Attributes:
        method: Its name.
        result: Its rows.
    """

    method: str
    result: RobustnessResult


def curves(folders: Sequence[Path]) -> list[Curve]:
    """Reads evaluations of one delta file and adds the ensemble of the first one's ends.

    Args:
        folders: Each of one `vpt.robustness.run`, of the same delta, data and α.

    Returns:
        A curve per folder, then the ensemble.

    Raises:
        DataError: A folder holds no evaluation, or its records are incomplete or in half precision.
        ConfigError: The evaluations are of different models, data or α, or α = 0 and 1 are missing.
    """
    found = [_named(RobustnessResult.read(folder)) for folder in folders]
    first = found[0].result
    for curve in found[1:]:
        other = curve.result
        for what, ours, theirs in (
            ("deltas", first.protocol["delta"]["sha256"], other.protocol["delta"]["sha256"]),
            ("data", first.protocol["data"], other.protocol["data"]),
            ("α or sets", [(r.set, r.alpha, r.n) for r in first.rows], [(r.set, r.alpha, r.n) for r in other.rows]),
        ):
            if ours != theirs:
                raise ConfigError(f"{first.out} and {other.out} are of different {what}: compare like with like.")
    return [*found, _ensemble(first)]


def _named(result: RobustnessResult) -> Curve:
    if result.protocol["start"]:
        return Curve("from start", result)
    way = result.protocol["way"]
    if way not in METHODS:
        raise ConfigError(f"In {result.out} α moves nothing, so there is nothing to compare: evaluate with an anchor.")
    return Curve(METHODS[way], result)


def _ensemble(result: RobustnessResult) -> Curve:
    kept = {(row.set, row.alpha): row.record for row in result.rows}
    rows = []
    for row in result.rows:
        ends = [kept.get((row.set, alpha)) for alpha in (0.0, 1.0)]
        if None in ends:
            raise ConfigError(f"{result.out} has no records at α = 0 and 1, which an ensemble is made of.")
        start, end = (records.read(result.out / "records" / str(name)) for name in ends)
        rows.append(score(between(start, end, row.alpha), None))
    return Curve(ENSEMBLE, replace(result, rows=rows))


def table(found: Sequence[Curve]) -> Table:
    """Top-1 in percent, a line for each set and method.

    Args:
        found: From `curves`.

    Returns:
        A table for `rich.print`, its last column at the α that each method chooses on validation images.
    """
    first = found[0].result
    alphas = sorted({row.alpha for row in first.rows})
    shown = shown_alphas(alphas)
    drawn = Table(title=f"Top-1 (%) on {first.protocol['data']['name']}", title_justify="left", caption_justify="left")
    for heading in ("test set", "n", "method", *(f"α = {alpha:g}" for alpha in shown), "chosen on val"):
        drawn.add_column(heading, justify="left" if heading in ("test set", "method") else "right")
    for group in zip(*(curve.result.groups() for curve in found), strict=True):
        for curve, (label, rows, _) in zip(found, group, strict=True):
            means = {alpha: fmean(row.top1 for row in rows if row.alpha == alpha) for alpha in alphas}
            chosen = curve.result.chosen_alpha
            last = "–" if chosen is None else f"{100 * means[chosen]:.1f} ({chosen:g})"
            cells = [f"{100 * means[alpha]:.1f}" for alpha in shown]
            start = (label, str(rows[0].n)) if curve is found[0] else ("", "")
            drawn.add_row(*start, curve.method, *cells, last, end_section=curve is found[-1])
    drawn.caption = "ensemble: the logits of α = 0 and α = 1 mixed."
    if first.not_chosen:
        drawn.caption += f" No α chosen on val: {first.not_chosen}"
    return drawn
