"""The figures of a robustness report, each made of its values alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from vpt.data.corruptions import title
from vpt.reports.page import Values
from vpt.reports.style import NEUTRAL, colour_bar, folded, style
from vpt.robustness.evaluation_result import FIXED_ALPHA
from vpt.robustness.evaluation_sets import CLEAN, SHIFT, VAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTIONS = {
    "Accuracy in and out of distribution": "Logit axes; dashed: equal accuracy with and without shift. Along each line "
    "α goes from 0 (hollow) over 0.5 (grey) to 1 (filled, with its 95 % Wilson interval under shift; means over "
    "several sets have none). 0 % and 100 %, whose logits are infinite, lie at the ends of the axes.",
    "Clean against all shifts": "The mean over the shifted sets over the clean set, in percent: a mark for each α, "
    "hollow at 0, and stars for both ways of a strength for each image.",
    "Agreement on the line": "Probit axes, at the largest α. Hollow: pairs of models, by how often both predict one "
    "class; the line is fitted to these, which need no labels. Filled: the accuracies of the models, which lie near it "
    "where the estimates hold. Dashed: equal with and without shift.",
    "Strengths of layers": "At α = 1; timm's layers: the embeddings, the blocks, the head.",
    "Accuracy at every α": "Bands: 95 % Wilson intervals; means over several sets have none. Steps: exact curves where "
    "only the head differs. α may be chosen on the validation images only.",
    "Reliability": "Bins of equal width; larger marks hold more images. Below the dashed line: overconfident.",
    "Accuracy under corruption": "Corruptions of the clean set.",
}

Place = Callable[[float], float]
COLOURS = ("#c2410c", "#1d4ed8", "#047857", "#7e22ce", "#a16207", "#0e7490", "#be185d", "#4b5563")
MARKERS = "osD^vPX*"
_TICKS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
_TICK_GAP = 0.25  # of logits, between a tick and that of 0 or 100 %
_ACROSS = 3  # panels in a row


def figures(report: Values) -> dict[str, Figure]:
    """Draws what values of `vpt.reports.robustness_values.report` (or read from JSON) there are for; by title."""
    makers = (scatter, plane, agreements, strengths, curves, reliability, heat_map)
    drawn = zip(CAPTIONS, (make(report) for make in makers), strict=True)
    return {name: figure for name, figure in drawn if figure is not None}


def _panels(n: int, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """Room for n panels, and a legend below."""
    from matplotlib.figure import Figure

    across = min(n, _ACROSS)
    down = math.ceil(n / across)
    figure = Figure(figsize=(3.4 * across + 0.4, height * down + 0.5), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).ravel())
    for empty in axes[n:]:
        empty.set_axis_off()
    return figure, axes[:n]


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """That of the panel which shows most models."""
    handles, labels = max((axes.get_legend_handles_labels() for axes in panels), key=lambda each: len(each[1]))
    across = max(1, min(len(labels), int(figure.get_figwidth() // 2.2)))
    figure.legend(handles, labels, loc="outside lower left", ncols=across, frameon=False)


def _looks(report: Values) -> dict[str, tuple[str, str]]:
    names = [model["model"] for model in report["models"]]
    return {name: (COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]) for place, name in enumerate(names)}


def _lines(report: Values, kinds: Sequence[str]) -> dict[str, dict[str, list[Values]]]:
    """Rows by set and model, ascending α; a mean of several corruptions is a set of its own."""
    found: dict[str, dict[str, list[Values]]] = {}
    plain = [row for row in report["rows"] if row["kind"] in kinds]
    for row in [*plain, *(row for row in report["averages"] if len(row["kinds"]) > 1)]:
        found.setdefault(row["set"], {}).setdefault(row["model"], []).append(row)
    return {
        name: {model: sorted(rows, key=lambda row: row["alpha"]) for model, rows in models.items()}
        for name, models in found.items()
    }


def scatter(report: Values) -> Figure | None:
    """Draws accuracy on each shift and mean of corruptions over that on the clean set, along α, on logit axes."""
    lines = _lines(report, (CLEAN, SHIFT))
    clean = lines.pop(CLEAN, {})
    if not lines or not clean:
        return None
    with style():
        figure, panels = _panels(len(lines), 3.3)
        for axes, (name, models) in zip(panels, lines.items(), strict=True):
            paths = {}
            for model, rows in models.items():
                own: dict[float, float] = {row["alpha"]: row["top1"] for row in clean[model]}
                own |= {
                    row["alpha"]: row["reference_accuracy"]
                    for row in report["effective"]
                    if (row["model"], row["set"]) == (model, name)
                }
                paths[model] = [(own[row["alpha"]], row) for row in rows]
            place = _logit_axes(axes, [share for path in paths.values() for point in path for share in _shares(*point)])
            for model, path in paths.items():
                _path(axes, place, path, model, _looks(report)[model])
            axes.set_title(folded(name, 36), loc="left")
        _axis_names(panels, "top-1 on clean (%)", "top-1 on the shift (%)")
        _legend(figure, panels)
    return figure


def plane(report: Values) -> Figure | None:
    """Draws the mean accuracy under shift over that on the clean set, all models in one panel."""
    if not report["shifts"]:
        return None
    with style():
        figure, (axes,) = _panels(1, 3.6)
        figure.set_figwidth(5.2)
        for model, (colour, marker) in _looks(report).items():
            rows = [row for row in report["shifts"] if row["model"] == model]
            line = [row for row in rows if row["alpha"] is not None]
            x, y = ([100 * row[key] for row in line] for key in ("clean", "shifts"))
            axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1, label=folded(model))
            if len(line) > 1:
                axes.plot(x[0], y[0], marker, color=colour, mfc="white", markersize=5, zorder=3)
            for row in (row for row in rows if row["alpha"] is None):
                axes.plot(100 * row["clean"], 100 * row["shifts"], "*", color=colour, markersize=8)
        axes.set_xlabel("top-1 on clean (%)")
        axes.set_ylabel(f"top-1, mean of {report['shifts'][0]['sets']} shifted sets (%)")
        axes.margins(0.08)
        _legend(figure, [axes])
    return figure


def agreements(report: Values) -> Figure | None:
    """Draws the agreements of pairs of models, their line, and the models' accuracies, a panel for each set."""
    rows = report.get("agreement", [])
    if not rows:
        return None
    alpha = max(row["alpha"] for row in rows)
    sets = list(dict.fromkeys(row["set"] for row in rows if row["alpha"] == alpha))
    with style():
        figure, panels = _panels(len(sets), 3.3)
        for axes, name in zip(panels, sets, strict=True):
            own = [row for row in rows if (row["set"], row["alpha"]) == (name, alpha)]
            _line_of_agreement(axes, own, _looks(report))
            axes.set_title(folded(f"{name}, R² {own[0]['r2']:.2f}", 36), loc="left")
        _axis_names(panels, "on clean (%)", "on the shift (%)")
        _legend(figure, panels)
    return figure


def _line_of_agreement(axes: Axes, rows: Sequence[Values], looks: dict[str, tuple[str, str]]) -> None:
    first = rows[0]
    shares = [*first["inside"], *first["outside"], *(row[key] for row in rows for key in ("clean", "shifted"))]
    found = [share for share in map(_probit, shares) if math.isfinite(share)]
    low, high = min(found) - 0.2, max(found) + 0.2

    def place(share: float) -> float:
        return min(max(_probit(share), low), high)

    axes.plot([low, high], [low, high], color=NEUTRAL, linestyle="--", linewidth=0.8, zorder=1)
    ends = np.array([low, high])
    axes.plot(ends, first["slope"] * ends + first["intercept"], color=NEUTRAL, linewidth=1, zorder=1)
    pairs = [[place(share) for share in first[key]] for key in ("inside", "outside")]
    axes.plot(*pairs, "o", mfc="white", color=NEUTRAL, markersize=5, label="pairs of models")
    for row in rows:
        colour, marker = looks[row["model"]]
        point = place(row["clean"]), place(row["shifted"])
        axes.plot(*point, marker, color=colour, markersize=6, label=folded(row["model"]), clip_on=False)
    ticks = [tick for tick in _TICKS if low < _probit(tick) < high]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([place(tick) for tick in ticks], [f"{100 * tick:g}" for tick in ticks])
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")


def _probit(share: float) -> float:
    return NormalDist().inv_cdf(share) if 0 < share < 1 else math.copysign(math.inf, share - 0.5)


def strengths(report: Values) -> Figure | None:
    """Draws the strength of each layer of the models that have several."""
    found = {each["model"]: each["strengths"] for each in report["models"] if each["strengths"]}
    if not found:
        return None
    with style():
        figure, (axes,) = _panels(1, 2.7)
        figure.set_figwidth(5.2)
        for model, values in found.items():
            colour, marker = _looks(report)[model]
            axes.plot(range(len(values)), values, color=colour, marker=marker, markersize=4, label=folded(model))
        axes.set(xlabel="layer", ylabel="strength at α = 1", ylim=(-0.05, 1.05))
        _legend(figure, [axes])
    return figure


def _shares(clean: float, row: Values) -> list[float]:
    return [clean, row["top1"], *(row[key] for key in ("top1_low", "top1_high") if key in row)]


def _path(axes: Axes, place: Place, path: Sequence[tuple[float, Values]], model: str, look: tuple[str, str]) -> None:
    colour, marker = look
    points = [(place(clean), place(row["top1"])) for clean, row in path]
    axes.plot(*zip(*points, strict=True), color=colour, linewidth=1, alpha=0.6, clip_on=False)
    for (x, y), (_, row) in zip(points, path, strict=True):
        last = row is path[-1][1]
        # Smaller towards α = 1, so that of points in one place all are seen.
        face, size = {0.0: ("white", 9.0), FIXED_ALPHA: ("#d1d5db", 6.5)}.get(row["alpha"], (colour, 4.0))
        if not last and row["alpha"] not in (0.0, FIXED_ALPHA):
            continue
        label = folded(model) if last else None
        style: Any = {"mfc": face, "ms": size, "ls": "none", "zorder": 3, "clip_on": False}
        axes.plot(x, y, marker, color=colour, label=label, **style)
        if "top1_low" in row and last:
            ends = place(row["top1_low"]), place(row["top1_high"])
            axes.vlines(x, *ends, color=colour, linewidth=1, clip_on=False)


def _logit_axes(axes: Axes, shares: Sequence[float]) -> Place:
    """Scales both axes for shares in [0, 1], and says where on them a share lies: 0 and 1 at the ends."""
    inside = [logit for logit in map(_logit, shares) if math.isfinite(logit)] or [0.0]
    low, high = min(inside) - 0.4, max(inside) + 0.4
    if high - low < 2:  # a few images apart
        low, high = low - 0.6, high + 0.6

    def place(share: float) -> float:
        return min(max(_logit(share), low), high)

    axes.plot([low, high], [low, high], color=NEUTRAL, linestyle="--", linewidth=0.8, zorder=1)
    ends = [share for share in (0, 1) if share in shares]
    away = [_TICK_GAP * (share in ends) for share in (0, 1)]
    ticks = [tick for tick in _TICKS if low + away[0] < _logit(tick) < high - away[1]]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([place(tick) for tick in (*ticks, *ends)], [f"{100 * tick:g}" for tick in (*ticks, *ends)])
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    return place


def _logit(share: float) -> float:
    return math.log(share / (1 - share)) if 0 < share < 1 else math.copysign(math.inf, share - 0.5)


def _axis_names(panels: Sequence[Axes], x: str, y: str) -> None:
    across = min(len(panels), _ACROSS)
    for place, axes in enumerate(panels):
        axes.set_xlabel(x)
        if place % across == 0:
            axes.set_ylabel(y)


def curves(report: Values) -> Figure | None:
    """Draws accuracy over α with Wilson intervals, a panel for each set; exact where only the head differs."""
    moving = {model["model"] for model in report["models"] if len(model["alphas"]) > 1}
    if not moving:
        return None
    lines = _lines(report, (VAL, CLEAN, SHIFT))
    exact = {(curve["model"], curve["set"]): curve for curve in report["curves"]}
    with style():
        figure, panels = _panels(len(lines), 2.7)
        for axes, (name, models) in zip(panels, lines.items(), strict=True):
            for model, rows in models.items():
                _curve(axes, rows, exact.get((model, name)), model, _looks(report)[model])
            axes.set_title(folded(f"{name} (n = {next(iter(models.values()))[0]['n']:,})", 36), loc="left")
            axes.set_xlim(-0.03, 1.03)
            axes.margins(y=0.08)
        _axis_names(panels, "α", "top-1 (%)")
        _legend(figure, panels)
    return figure


def _curve(axes: Axes, rows: Sequence[Values], exact: Values | None, model: str, look: tuple[str, str]) -> None:
    colour, marker = look
    alphas, top1 = [row["alpha"] for row in rows], [100 * row["top1"] for row in rows]
    if "top1_low" in rows[0]:
        low, high = ([100 * row[key] for row in rows] for key in ("top1_low", "top1_high"))
        if len(rows) > 1:
            axes.fill_between(alphas, low, high, color=colour, alpha=0.1, linewidth=0)
        else:
            axes.vlines(alphas, low, high, color=colour, linewidth=1)
    if exact is not None:
        axes.plot(exact["alpha"], 100 * np.array(exact["top1"]), color=colour, linewidth=1, drawstyle="steps-mid")
    joined = "none" if exact is not None else "-"
    axes.plot(alphas, top1, color=colour, marker=marker, ms=4, ls=joined, lw=1.2, label=folded(model))


def reliability(report: Values) -> Figure | None:
    """Draws accuracy over confidence on the clean set at α = 0, 0.5 and 1; larger marks hold more images."""
    alphas = sorted({bins["alpha"] for bins in report["reliability"]})
    if not alphas:
        return None
    with style():
        figure, panels = _panels(len(alphas), 3.3)
        for axes, alpha in zip(panels, alphas, strict=True):
            axes.plot([0, 100], [0, 100], color=NEUTRAL, linestyle="--", linewidth=0.8)
            for bins in (bins for bins in report["reliability"] if bins["alpha"] == alpha):
                colour, marker = _looks(report)[bins["model"]]
                x, y = (100 * np.array(bins[key]) for key in ("confidence", "accuracy"))
                share = np.array(bins["count"]) / sum(bins["count"])
                axes.plot(x, y, color=colour, linewidth=1, alpha=0.7)
                axes.scatter(x, y, s=6 + 90 * share, color=colour, marker=marker, alpha=0.85, linewidths=0)
                axes.plot([], [], color=colour, marker=marker, markersize=4, label=folded(bins["model"]))
            axes.set(xlim=(-3, 103), ylim=(-3, 103))
            axes.set_title(f"clean, α = {alpha:g}", loc="left")
        _axis_names(panels, "confidence (%)", "accuracy (%)")
        _legend(figure, panels)
    return figure


def heat_map(report: Values) -> Figure | None:
    """Draws accuracy under each corruption and severity, a panel for each model at its largest α."""
    rows = [row for row in report["rows"] if row["severity"] is not None]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    severities = sorted({row["severity"] for row in rows})
    models = list(dict.fromkeys(row["model"] for row in rows))
    if not rows:
        return None
    with style():
        figure, panels = _panels(len(models), 0.9 + 0.3 * len(kinds))
        for place, (axes, model) in enumerate(zip(panels, models, strict=True)):
            own = [row for row in rows if row["model"] == model]
            alpha = max(row["alpha"] for row in own)
            values = np.full((len(kinds), len(severities)), np.nan)
            for row in (row for row in own if row["alpha"] == alpha):
                values[kinds.index(row["kind"]), severities.index(row["severity"])] = 100 * row["top1"]
            image = axes.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
            for (down, across), value in np.ndenumerate(values):
                colour = "white" if value > 60 else "black"
                text = "" if np.isnan(value) else f"{value:.0f}"
                axes.text(across, down, text, ha="center", va="center", fontsize=8, color=colour)
            first = place % _ACROSS == 0
            axes.set_yticks(range(len(kinds)), [title(kind).replace("_", " ") for kind in kinds] if first else [])
            axes.set_xticks(range(len(severities)), [str(severity) for severity in severities])
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            axes.set_title(folded(f"{model}, α = {alpha:g}"), loc="left")
            axes.set_xlabel("severity")
        colour_bar(figure, image, panels, "top-1 (%)", shrink=0.8, aspect=16)
    return figure
