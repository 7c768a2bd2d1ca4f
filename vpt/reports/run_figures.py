"""Figures of `vpt report`: learning curves and ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vpt.reports.style import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Values = dict[str, Any]
CAPTIONS = {
    "Learning curves": "One run of each method, by training steps. Validation accuracy says something only where the "
    "validation images were not trained on.",
    "Ranks": "Dots: rank on each task, by mean accuracy; bars: mean rank. Left is better. Tasks that all methods were "
    "run on.",
}


def figures(report: Values) -> dict[str, Figure]:
    """Draws what a report (`vpt.reports.run_values.report`) has values for, by name, in the order of the page."""
    drawn = {}
    with style():
        if report["curves"]:
            drawn["Learning curves"] = learning_curves(report["curves"])
        if report["ranks"]:
            drawn["Ranks"] = rank_plot(report["ranks"])
    return drawn


def learning_curves(curves: list[Values]) -> Figure:
    """A panel for each task and curve, a line for each method."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["task"], row["curve"]) for row in curves))
    methods = list(dict.fromkeys(row["method"] for row in curves))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    handles: dict[str, Any] = {}
    for axis, panel in zip(axes, panels, strict=False):
        for row in curves:
            if (row["task"], row["curve"]) == panel:
                scale = 100 if "top-1" in row["curve"] else 1
                values = [scale * value for value in row["values"]]
                color = f"C{methods.index(row['method']) % 10}"
                (handles[row["method"]],) = axis.plot(row["steps"], values, color=color, lw=1.4)
        axis.set(title=panel[0], xlabel="step", ylabel=panel[1] + (" (%)" if "top-1" in panel[1] else ""))
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3)
    return figure


def rank_plot(ranks: list[Values]) -> Figure:
    """A line for each method, best mean rank on top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 0.9 + 0.34 * len(ranks)), layout="constrained")
    axis = figure.subplots()
    for place, row in enumerate(ranks):
        axis.barh(place, row["mean"], color="C0", alpha=0.3)
        axis.plot(row["ranks"], [place] * len(row["ranks"]), "o", color="C0", ms=5)
        axis.text(len(ranks) + 0.6, place, f"{row['mean']:.1f}", va="center", fontsize=8)
    axis.set_yticks(range(len(ranks)), [row["method"] for row in ranks])
    axis.invert_yaxis()
    axis.set(xlabel="rank (1 is best)", xlim=(0, len(ranks) + 0.5))
    return figure
