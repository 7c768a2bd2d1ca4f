"""Accuracy over α: exactly between two tables of logits, and of several methods side by side.

Where only a linear head differs, or where outputs are averaged, the logits at α are (1 − α)·L₀ + α·L₁. The lead of one
class over another is then linear in α, so the α at which an image is classified correctly form one interval (one for
each column of its class, where several columns stand for a class). Accuracy is a step function of their ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from statistics import fmean

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vpt.errors import ConfigError, DataError
from vpt.metrics.logits import Logits, blocks, check_finite, check_labels, check_precision, group_columns
from vpt.robustness.evaluation_result import RobustnessResult, between, score, shown_alphas
from vpt.screen import Table

ENSEMBLE = "ensemble"
METHODS = {"strength": "gate", "end-to-end": "weights", "head": "head"}
"""What a method is called, by what its α moves."""


@dataclass(frozen=True)
class AccuracyCurve:
    """A step function of α on [0, 1].

    Of equal logits the first class wins, as in `accuracy.correct`. Two logits are equal where an image's interval ends,
    so the value at a break may differ from both sides. The K breaks ascend from 0 to 1, exact but for float64 rounding;
    `at` (K,) is the accuracy there, `between` (K - 1,) that between consecutive ones.
    """

    breaks: NDArray[np.float64]
    at: NDArray[np.float64]
    between: NDArray[np.float64]

    def accuracy(self, alphas: ArrayLike) -> NDArray[np.float64]:
        """Evaluates the curve at α in [0, 1] of any shape, else a ConfigError; accuracies in [0, 1], of that shape."""
        points = np.asarray(alphas, dtype=np.float64)
        if not ((points >= 0) & (points <= 1)).all():
            raise ConfigError(f"α lies between 0 (first table) and 1 (second table), got {points}.")
        place = np.searchsorted(self.breaks, points)
        inside = self.between[np.maximum(place - 1, 0)]
        return np.where(self.breaks[place] == points, self.at[place], inside)

    @property
    def best(self) -> float:
        """The maximum over all α."""
        return float(max(self.at.max(), self.between.max()))


def accuracy_curve(
    zero: Logits, one: Logits, labels: NDArray[np.int64], groups: Sequence[Sequence[int]] | None = None
) -> AccuracyCurve:
    """Finds the accuracy of (1 − α)·zero + α·one, logits (N, classes) in float32 or float64, for all α at once.

    Masks come first: both tables have the columns of the set. `groups` are the columns of each class, where the largest
    counts, as in `logits.group_max`; None for one each. Labels (N,) are positions in them. Time is that of a few passes
    over both tables; beside them about 50 MB are held, whatever their size, and a few numbers an image.

    Raises:
        DataError: A table cannot be scored, is a reduced record, or the two differ in shape.
        ConfigError: A group is empty or names a column that does not exist.
    """
    for table in (zero, one):
        check_precision(table)
        check_finite(table)
    if zero.shape != one.shape:
        raise DataError(f"Both tables have the same images and classes, got shapes {zero.shape} and {one.shape}.")
    groups = groups if groups is not None else [[column] for column in range(zero.shape[1])]
    check_labels(labels, len(zero), len(groups))
    columns = group_columns(groups, zero.shape[1])
    owners = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    members = np.array([*zip_longest(*groups, fillvalue=-1)], dtype=np.int64).T  # (classes, largest group)
    spans = [_no_spans(len(labels)) for _ in range(members.shape[1])]
    for slot, span in enumerate(spans):
        holders = np.flatnonzero(members[labels, slot] >= 0)
        for rows in blocks(len(holders), len(columns)):
            images = holders[rows]
            own = members[labels[images], slot]
            lead0, lead1 = (_lead(table[images], own, columns) for table in (zero, one))
            span[images] = _winning_span(lead0, lead1, owners - labels[images, None])
    return _step_function(np.stack(spans, axis=1))


# The α at which one column beats all columns of other classes: an interval whose ends may be excluded.
_SPAN = np.dtype([("low", np.float64), ("high", np.float64), ("low_open", np.bool_), ("high_open", np.bool_)])


def _no_spans(n: int) -> NDArray[np.void]:
    spans = np.zeros(n, dtype=_SPAN)
    spans["low"] = 1
    return spans


def _lead(logits: Logits, own: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float64]:
    """(B, columns): how far each image's own column is above each column."""
    exact = logits.astype(np.float64)
    return np.asarray(exact[np.arange(len(own)), own, None] - exact[:, columns])


def _winning_span(lead0: NDArray[np.float64], lead1: NDArray[np.float64], rank: NDArray[np.int64]) -> NDArray[np.void]:
    """α where the own column wins, (B,) spans, from its lead over each column (B, columns) at α = 0 and at α = 1.

    `rank` (B, columns) is negative where the column's class comes first and so wins a tie, 0 where it is the own. Low >
    high where a rival is never beaten.
    """
    earlier, later = rank < 0, rank > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        cross = np.abs(lead0 / (lead0 - lead1))  # in [0, 1] wherever it is used; abs because of -0
    rising = (lead0 < lead1) & (lead0 <= 0) & (lead1 >= 0)
    falling = (lead0 > lead1) & (lead0 >= 0) & (lead1 <= 0)
    low, low_open = (np.where(rising & who, cross, -1).max(axis=1) for who in (later, earlier))
    high, high_open = (np.where(falling & who, cross, 2).min(axis=1) for who in (later, earlier))
    # A column of the own class that is ahead everywhere wins wherever this one does, so it may count as a rival here.
    beaten = (lead0 < 0) & (lead1 < 0) | (lead0 == 0) & (lead1 == 0) & earlier
    spans = np.zeros(len(rank), dtype=_SPAN)
    spans["low"], spans["high"] = np.maximum(0, np.maximum(low, low_open)), np.minimum(1, np.minimum(high, high_open))
    spans["low_open"], spans["high_open"] = low_open >= np.maximum(low, 0), high_open <= np.minimum(high, 1)
    spans[beaten.any(axis=1)] = _no_spans(1)
    return spans


def _step_function(spans: NDArray[np.void]) -> AccuracyCurve:
    """Counts the images that are right at each break and between them.

    Breaks and the gaps between them are numbered 0, 1, 2, …: break k is place 2k. Open and closed ends, single points
    and unions are then exact arithmetic of integers.

    Args:
        spans: (N, largest group); an image is right where any of its spans holds α.
    """
    low, high = spans["low"], spans["high"]
    real = low <= high
    breaks = np.unique(np.concatenate([[0.0, 1.0], low[real], high[real]]))
    places = 2 * len(breaks) - 1
    first = np.where(real, 2 * np.searchsorted(breaks, low) + spans["low_open"], places)
    last = np.where(real, 2 * np.searchsorted(breaks, high) - spans["high_open"], -1)
    order = np.argsort(first, axis=1)
    first, last = np.take_along_axis(first, order, axis=1), np.take_along_axis(last, order, axis=1)
    reached = np.maximum.accumulate(last, axis=1)
    first[:, 1:] = np.maximum(first[:, 1:], reached[:, :-1] + 1)  # what an earlier span has counted already
    new = first <= last
    steps = np.bincount(first[new], minlength=places + 1) - np.bincount(last[new] + 1, minlength=places + 1)
    accuracy = np.cumsum(steps)[:places] / len(spans)
    return AccuracyCurve(breaks, accuracy[::2], accuracy[1::2])


@dataclass(frozen=True)
class Curve:
    """One method on all sets."""

    method: str
    result: RobustnessResult


def curves(folders: Sequence[Path]) -> list[Curve]:
    """Reads evaluations of one delta file, data and α; a curve a folder, then the ensemble of the first one's ends.

    Raises a DataError if a folder holds no evaluation, or incomplete or half-precision records; a ConfigError if they
    are of different models, data or α, or α = 0 and 1 are missing.
    """
    found = [_named(RobustnessResult.read(folder)) for folder in folders]
    first = found[0].result
    for curve in found[1:]:
        other = curve.result
        for what, ours, theirs in (
            ("deltas", first.protocol["delta"]["sha256"], other.protocol["delta"]["sha256"]),
            ("data", first.protocol["data"], other.protocol["data"]),
            ("corruptions", first.corruptions, other.corruptions),
            ("images or precision", *(_drawn(each) for each in (first, other))),
            ("α or sets", [(r.set, r.alpha, r.n) for r in first.rows], [(r.set, r.alpha, r.n) for r in other.rows]),
        ):
            if ours != theirs:
                raise ConfigError(f"{first.out} and {other.out} are of different {what}: compare like with like.")
    plain = next((curve.result for curve in found if not curve.result.protocol.get("strengths")), first)
    return [*found, _ensemble(plain)]


def _drawn(result: RobustnessResult) -> list[object]:
    return [result.protocol.get(key) for key in ("max_images", "seed", "precision")]


def _named(result: RobustnessResult) -> Curve:
    if result.protocol.get("start"):
        return Curve("from start", result)
    way = result.protocol["way"]
    if way not in METHODS:
        raise ConfigError(f"In {result.out} α moves nothing, so there is nothing to compare: evaluate with an anchor.")
    return Curve(METHODS[way] + (" by layer" if result.protocol.get("strengths") else ""), result)


def _ensemble(result: RobustnessResult) -> Curve:
    if not {0.0, 1.0} <= {row.alpha for row in result.rows}:
        raise ConfigError(f"{result.out} has no records at α = 0 and 1, which an ensemble is made of.")
    rows = [score(between(*result.ends(row), row.alpha), None) for row in result.rows]
    return Curve(ENSEMBLE, replace(result, rows=rows))


def table(found: Sequence[Curve]) -> Table:
    """Top-1 in percent, a line for each set and method, for `vpt.screen.show`.

    Its last column stands at the α that each method chooses on validation images.
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
    drawn.caption = "ensemble: (1 − α) and α times the logits of α = 0 and α = 1."
    if first.not_chosen:
        drawn.caption += f" No α chosen on val: {first.not_chosen}"
    return drawn
