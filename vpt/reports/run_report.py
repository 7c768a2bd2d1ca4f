"""`vpt report`: tables and figures of tested runs, also as CSV and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from vpt.reports.page import Report
from vpt.reports.run_figures import CAPTIONS, figures
from vpt.reports.tables import Table, percent

Values = dict[str, Any]
TITLE = "Tuned models on their tasks"


def run_report(values: Values) -> Report:
    """Lays out what `vpt.reports.run_values.report` gave, or was read back from its JSON; also as CSV and LaTeX."""
    others = {"csv": csv(values), "tex": latex(values)}
    return Report(values, TITLE, notes(values), tables(values), figures(values), CAPTIONS, others)


def tables(report: Values) -> list[Table]:
    """All tables that a report has values for: accuracy, means, published numbers, agreement, ranks and protocols."""
    found = [
        _accuracy(report),
        _means(report),
        _published(report),
        _agreement(report),
        _ranks(report),
        _protocols(report),
    ]
    return [table for table in found if table.rows]


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
    return said


def _backbones(report: Values) -> list[str]:
    return list(dict.fromkeys(row["backbone"] for row in report["methods"]))


def _partial(report: Values, task: str) -> bool:
    numbers = [row["numbers"][task] for row in report["methods"] if task in row["numbers"]]
    return any(number["protocol"]["partial data"] for number in numbers)


def _accuracy(report: Values) -> Table:
    tasks = [row["task"] for row in report["tasks"]]
    rows = []
    for row in report["methods"]:
        numbers = [row["numbers"].get(task) for task in tasks]
        shown = ["–" if each is None else percent(each["mean"], each["std"]) for each in numbers]
        rows.append(
            [*_names(report, row), _range(row["trainable"]), _range(row["epochs"]), _range(row["seeds"]), *shown]
        )
    sizes = ", ".join(f"{row['task']} {_range(row['n'])}" for row in report["tasks"])
    columns = [*_heads(report), "trained", "epochs", "seeds", *tasks]
    return Table("Accuracy by task", f"Test images: {sizes}.", columns, rows, words=len(_heads(report)))


def _heads(report: Values) -> list[str]:
    """A backbone that all share is said once, above."""
    return ["backbone", "method"] if len(_backbones(report)) > 1 else ["method"]


def _names(report: Values, row: Values) -> list[str]:
    return [row[head] for head in _heads(report)]


def _means(report: Values) -> Table:
    names = list(dict.fromkeys(name for row in report["methods"] for name in row["means"]))
    rows = [
        [*_names(report, row), *(percent(row["means"].get(name)) for name in names)]
        for row in report["methods"]
        if row["means"]
    ]
    note = "VTAB-1k has two means: of its 19 tasks, and of its three groups' means. Others are of the tasks at hand."
    return Table("Means", note, [*_heads(report), *names], rows, words=len(_heads(report)))


def _published(report: Values) -> Table:
    rows = [
        [row["task"], row["method"], row["backbone"], row.get("preset") or "–", row["source"], f"{row['accuracy']:.1f}"]
        for row in report["published"]
    ]
    note = "From papers, on their backbones, presets and whole test sets: not comparable unless all of them agree."
    return Table("Published", note, ["task", "method", "backbone", "preset", "source", "top-1"], rows, words=5)


def _agreement(report: Values) -> Table:
    rows = [
        [
            row["task"],
            f"{row['first']} / {row['second']}",
            str(row["seed"]),
            f"{row['n']:,}",
            percent(row["agreement"]),
            " / ".join(map(percent, row["accuracies"])),
            percent(row["ensemble"]),
        ]
        for row in report["agreement"]
    ]
    columns = ["task", "methods", "seed", "n", "agree", "alone", "ensemble"]
    return Table("Agreement", "Same predicted class; the ensemble is the mean of both's probabilities.", columns, rows)


def _ranks(report: Values) -> Table:
    rows = [[row["method"], f"{row['mean']:.2f}", str(len(row["ranks"]))] for row in report["ranks"]]
    note = "By mean accuracy on the tasks that all methods were run on; 1 is best."
    return Table("Mean rank", note, ["method", "mean rank", "tasks"], rows, words=1)


def _protocols(report: Values) -> Table:
    rows = []
    for row in report["methods"]:
        for task, number in row["numbers"].items():
            told = [
                f"{key}: {value}"
                for key, value in (number["protocol"] | number["options"]).items()
                if value is not None
            ]
            seeds = ", ".join(map(str, number["seeds"]))
            rows.append(
                [
                    task,
                    row["method"],
                    seeds,
                    "; ".join(told),
                    f"{number['n']:,}",
                    f"{100 * number['low']:.1f}–{100 * number['high']:.1f}",
                ]
            )
    columns = ["task", "method", "seeds", "protocol", "n", "95 % Wilson"]
    return Table("Protocols", "The interval is that of n images at the mean accuracy.", columns, rows, words=4)


def _range(values: Sequence[int]) -> str:
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,}–{values[-1]:,}"


def csv(report: Values) -> str:
    """Writes one line a method and task, in full precision."""
    rows = [
        {"backbone": row["backbone"], "method": row["method"], "task": task}
        | {key: number[key] for key in ("mean", "std", "n", "low", "high")}
        | {"seeds": " ".join(map(str, number["seeds"])), **number["protocol"]}
        for row in report["methods"]
        for task, number in row["numbers"].items()
    ]
    return str(pd.DataFrame(rows).to_csv(index=False))


_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"±": r"$\pm$", "–": "--", "·": r"$\cdot$", "\\": r"\textbackslash{}"}
)


def latex(report: Values) -> str:
    """Writes the tables of accuracy and means for LaTeX with booktabs."""
    parts = []
    for table in tables(report)[:2]:
        rows = [[cell.translate(_LATEX) for cell in row] for row in table.rows]
        frame = pd.DataFrame(rows, columns=[column.translate(_LATEX) for column in table.columns])
        parts.append(f"% {table.title}: {table.note}\n{frame.style.hide(axis='index').to_latex(hrules=True)}")
    return "\n".join(parts)
