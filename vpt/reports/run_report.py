"""`vpt report`: tables, learning curves and ranks of tested runs, also as CSV and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd

from vpt.reports.page import Columns, Report, Table, Values, percent, table_of
from vpt.reports.style import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMED_RUNS = 5
TITLE = "Tuned models on their tasks"
CAPTIONS = {
    "Learning curves": "One run of each method, by training steps. Validation accuracy is meaningful only where "
    "the validation images were not trained on.",
    "Ranks": "Dots: rank on each task, by mean accuracy; bars: mean rank. Left is better. Tasks that all methods were "
    "run on.",
}


def run_report(values: Values) -> Report:
    """Lays out what `vpt.reports.run_values.report` gave, or was read back from its JSON; also as CSV and LaTeX."""
    others = {"csv": csv(values), "tex": latex(values)}
    return Report(values, TITLE, notes(values), tables(values), figures(values), CAPTIONS, others)


def tables(report: Values) -> list[Table]:
    """All tables that a report has values for: accuracy, means, published numbers, agreement, ranks and protocols."""
    makers = (_accuracy, _means, _published, _agreement, _ranks, _protocols)
    return [table for table in (make(report) for make in makers) if table.rows]


def notes(report: Values) -> list[str]:
    """What a reader must know, in sentences."""
    said = ["Test top-1 in %, last epoch, mean ± standard deviation over seeds."]
    if len(backbones := _backbones(report)) == 1:
        said.append(f"All on {backbones[0]}.")
    if partial := [row["task"] for row in report["tasks"] if _partial(report, row["task"])]:
        said.append(f"Partial data, by missing images or limited batches: {', '.join(partial)}.")
    refused: dict[tuple[str, str], list[str]] = {}
    for row in report["methods"]:
        if row["no_means"]:
            refused.setdefault((row["backbone"], row["no_means"]), []).append(row["method"])
        if row["mixed"]:
            said.append(f"The mean of {row['method']} mixes {', '.join(row['mixed'])}.")
    for (backbone, reason), methods in refused.items():
        said.append(f"No mean of {', '.join(methods)} on {backbone}: {reason} (--mixed averages anyway).")
    if untested := report.get("untested"):  # which reports of version 0.1 do not have
        more = f" and {len(untested) - _NAMED_RUNS:,} more" if len(untested) > _NAMED_RUNS else ""
        said.append(f"Not tested, and not here: {', '.join(untested[:_NAMED_RUNS])}{more}.")
    return said + [f"Left out: {sentence}" for sentence in report.get("damaged", [])]


def _backbones(report: Values) -> list[str]:
    return list(dict.fromkeys(row["backbone"] for row in report["methods"]))


def _partial(report: Values, task: str) -> bool:
    numbers = [row["numbers"][task] for row in report["methods"] if task in row["numbers"]]
    return any(number["protocol"]["partial data"] for number in numbers)


def _accuracy(report: Values) -> Table:
    columns: Columns = {
        **_names(report),
        "trained": lambda row: _range(row["trainable"]),
        "epochs": lambda row: _range(row["epochs"]),
        "seeds": lambda row: _range(row["seeds"]),
        **{row["task"]: partial(_number, row["task"]) for row in report["tasks"]},
    }
    sizes = ", ".join(f"{row['task']} {_range(row['n'])}" for row in report["tasks"])
    return table_of("Accuracy by task", f"Test images: {sizes}.", columns, report["methods"], len(_names(report)))


def _names(report: Values) -> Columns:
    """A backbone that all share is said once, above."""
    return {head: head for head in (["backbone", "method"] if len(_backbones(report)) > 1 else ["method"])}


def _number(task: str, row: Values) -> str:
    number = row["numbers"].get(task)
    return "–" if number is None else percent(number["mean"], number["std"])


def _mean(name: str, row: Values) -> str:
    return percent(row["means"].get(name))


def _means(report: Values) -> Table:
    rows = [row for row in report["methods"] if row["means"]]
    columns: Columns = {**_names(report), **{name: partial(_mean, name) for row in rows for name in row["means"]}}
    note = "VTAB-1k has two means: over its 19 tasks, and over the means of its three groups. Others: over these tasks."
    return table_of("Means", note, columns, rows, len(_names(report)))


def _published(report: Values) -> Table:
    columns: dict[str, Any] = {name: name for name in ("task", "method", "backbone", "preset", "source")}
    rows = [{"preset": None, "here": None, **row} for row in report["published"]]
    if any(row["here"] is not None for row in rows):
        columns = {**columns, "here": _place}
    columns = {**columns, "top-1": lambda row: f"{row['accuracy']:.1f}"}
    if "here" in columns:
        columns |= {"top-1 here": lambda row: percent(row["here"]), "difference": _difference}
    note = "From papers, with their backbones, presets and full test sets: comparable only if all of these agree."
    return table_of("Published", note, columns, rows, words=5 + ("here" in columns))


def _place(row: Values) -> str:
    return "–" if row["here"] is None else f"{row['label']}, {row['backbone_here']}, preset {row['preset_here']}"


def _difference(row: Values) -> str:
    """Points that a run here lies above the published number."""
    return "–" if row["here"] is None else f"{100 * row['here'] - row['accuracy']:+.1f}"


def _agreement(report: Values) -> Table:
    columns: Columns = {
        "task": "task",
        "methods": lambda row: f"{row['first']} / {row['second']}",
        "seed": lambda row: str(row["seed"]),
        "n": lambda row: f"{row['n']:,}",
        "agree": lambda row: percent(row["agreement"]),
        "alone": lambda row: " / ".join(map(percent, row["accuracies"])),
        "ensemble": lambda row: percent(row["ensemble"]),
    }
    note = "Agreement: same predicted class; ensemble: accuracy of the mean of both probabilities."
    return table_of("Agreement", note, columns, report["agreement"])


def _ranks(report: Values) -> Table:
    columns: Columns = {
        "method": "method",
        "mean rank": lambda row: f"{row['mean']:.2f}",
        "95 % interval": lambda row: rank_interval(row) or "–",
        "tasks": lambda row: str(len(row["ranks"])),
    }
    note = (
        "By mean accuracy over the tasks that all methods were run on; 1 is best. The interval is a bootstrap over "
        "tasks: what other tasks of their kind would have given, not the spread of seeds."
    )
    return table_of("Mean rank", note, columns, report["ranks"], words=1)


def rank_interval(row: Values) -> str:
    """The interval of a mean rank (`run_values.ranks_of`); empty where there is none."""
    return "" if row.get("low") is None else f"{row['low']:.2f}–{row['high']:.2f}"


def _protocols(report: Values) -> Table:
    columns: Columns = {
        "task": "task",
        "method": "method",
        "seeds": lambda row: ", ".join(map(str, row["seeds"])),
        "protocol": lambda row: "; ".join(
            f"{key}: {value}" for key, value in (row["protocol"] | row["options"]).items() if value is not None
        ),
        "n": lambda row: f"{row['n']:,}",
        "95 % Wilson": lambda row: f"{100 * row['low']:.1f}–{100 * row['high']:.1f}",
    }
    note = "The interval is that of n images at the mean accuracy."
    return table_of("Protocols", note, columns, _numbers(report), words=4)


def _numbers(report: Values) -> list[Values]:
    return [
        {"backbone": row["backbone"], "method": row["method"], "task": task} | number
        for row in report["methods"]
        for task, number in row["numbers"].items()
    ]


def _range(values: Sequence[int]) -> str:
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,}–{values[-1]:,}"


def csv(report: Values) -> str:
    """Writes one line a method and task, in full precision."""
    keys = ("backbone", "method", "task", "mean", "std", "n", "low", "high")
    rows = [
        {key: row[key] for key in keys} | {"seeds": " ".join(map(str, row["seeds"])), **row["protocol"]}
        for row in _numbers(report)
    ]
    return str(pd.DataFrame(rows).to_csv(index=False))


_NAMED = ("less", "greater", "bar", "asciitilde", "asciicircum", "backslash")
_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {character: f"{{{character}}}" for character in "[]"}  # after a row's end they would be an option
    | {character: rf"\text{name}{{}}" for character, name in zip("<>|~^\\", _NAMED, strict=True)}
    | {"±": r"$\pm$", "–": "--", "·": r"$\cdot$", "\n": " "}
)


def latex(report: Values) -> str:
    """Writes the tables of accuracy and means for LaTeX with booktabs."""
    parts = []
    for table in tables(report)[:2]:
        rows = [[cell.translate(_LATEX) for cell in row] for row in table.rows]
        frame = pd.DataFrame(rows, columns=[column.translate(_LATEX) for column in table.columns])
        note = " ".join(table.note.split())
        parts.append(f"% {table.title}: {note}\n{frame.style.hide(axis='index').to_latex(hrules=True)}")
    return "\n".join(parts)


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
