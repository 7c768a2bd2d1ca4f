"""Figures of `benchmarks.robustness_tables`: curves over α and over shots, with a band."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING

from benchmarks.robustness_trials import METHODS, Place, Trial
from vpt.reports.style import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = dict(zip(METHODS, ("#4b5563", "#1d4ed8", "#0e7490", "#a16207", "#c2410c", "#7e22ce", "#be185d"), strict=True))


def band(axis: Axes, method: str, curve: Mapping[float, Sequence[float]]) -> None:
    """Draws one method's mean in percent, with a band of one standard deviation over seeds.

    Args:
        axis: Where.
        method: A key of `METHODS`, which has a colour in all figures.
        curve: Shares of the seeds, by x.
    """
    middle = [100 * mean(values) for values in curve.values()]
    spread = [100 * stdev(values) if len(values) > 1 else 0.0 for values in curve.values()]
    low, high = ([m + sign * s for m, s in zip(middle, spread, strict=True)] for sign in (-1, 1))
    colour = COLOURS[method]
    axis.plot(list(curve), middle, color=colour, lw=1.5, marker=".", ms=4, label=METHODS[method].title)
    axis.fill_between(list(curve), low, high, alpha=0.15, color=colour, lw=0)


def alpha_curves(place: Place, found: Mapping[str, Sequence[str]], panels: Mapping[str, Sequence[str]]) -> Figure:
    """Accuracy at every α, a panel for each set or mean of sets.

    Args:
        place: Where the trials are.
        found: Names of the trials that are there, one a seed, by method.
        panels: By title, the sets whose mean is shown.

    Returns:
        The figure.
    """
    from matplotlib.figure import Figure

    trials = {method: [trial for name in names if (trial := place.read(name))] for method, names in found.items()}
    columns = 3 if len(panels) <= 6 else 5
    rows = -(-len(panels) // columns)
    with style():
        figure = Figure(figsize=(2.9 * columns if columns == 3 else 11.5, 2.5 * rows + 0.6), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, (title, sets) in zip(axes, panels.items(), strict=False):
            for method, own in trials.items():
                if own:
                    band(axis, method, _curve(own, sets))
            axis.set(title=title, xlabel="α", ylabel="top-1 (%)")
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, max(1, len(labels))), frameon=False)
    return figure


def _curve(trials: Sequence[Trial], sets: Sequence[str]) -> dict[float, list[float]]:
    """Mean accuracy over the sets of each seed, by α."""
    curve: dict[float, list[float]] = {}
    for trial in trials:
        for alpha in sorted({row["alpha"] for row in trial["rows"]}):
            shown = [row["top1"] for row in trial["rows"] if row["alpha"] == alpha and row["set"] in sets]
            curve.setdefault(alpha, []).append(mean(shown))
    return curve
