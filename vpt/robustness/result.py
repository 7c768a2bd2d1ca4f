"""What an evaluation found: one row per test set and strength, made of records alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from vpt.robustness import scores
from vpt.robustness.records import Record
from vpt.robustness.shifts import CLEAN, SHIFT

RESULT_FILE = "robustness.json"


@dataclass(frozen=True)
class Row:
    """Scores of one test set at one strength; accuracies lie in [0, 1].

    Attributes:
        set: Name of the set.
        kind: ``"clean"``, ``"shift"`` or the corruption.
        severity: Of a corruption, else None.
        n: Images.
        alpha: Strength.
        top1: Share classified rightly.
        low: Lower bound of its 95 % Wilson interval.
        high: Upper bound.
        mean_per_class: Mean over the classes present.
        record: The record's file name.
    """

    set: str
    kind: str
    severity: int | None
    n: int
    alpha: float
    top1: float
    low: float
    high: float
    mean_per_class: float
    record: str


def score(record: Record, name: str) -> Row:
    """Scores a record.

    Args:
        record: Complete.
        name: Its file name.

    Returns:
        The row.
    """
    protocol, n = record.protocol, len(record.label)
    logits = record.scored
    low, high = scores.wilson(int(scores.correct(logits, record.label).sum()), n)
    return Row(
        set=protocol["set"],
        kind=protocol["kind"],
        severity=protocol["severity"],
        n=n,
        alpha=protocol["alpha"],
        top1=scores.top1(logits, record.label),
        low=low,
        high=high,
        mean_per_class=scores.mean_per_class(logits, record.label),
        record=name,
    )


@dataclass(frozen=True)
class RobustnessResult:
    """All rows of an evaluation.

    Attributes:
        rows: By set, then by strength.
        protocol: What all rows have in common.
        out: The folder of ``robustness.json`` and ``records/``.
    """

    rows: Sequence[Row]
    protocol: Mapping[str, Any]
    out: Path

    def write(self) -> Path:
        """Writes ``robustness.json``.

        Returns:
            Its path.
        """
        content = {"protocol": self.protocol, "rows": [asdict(row) for row in self.rows]}
        path = self.out / RESULT_FILE
        partial = path.with_name(RESULT_FILE + ".part")
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
        return path

    def table(self) -> Table:
        """Top-1 in percent: clean, each shift, the mean over severities of each corruption, and over all of them.

        Returns:
            A table for `rich.print`.
        """
        alphas = sorted({row.alpha for row in self.rows})
        table = Table(title=self._title(), caption=self._caption(), title_justify="left", caption_justify="left")
        table.add_column("test set")
        table.add_column("n", justify="right")
        for alpha in alphas:
            table.add_column(f"α = {alpha:g}", justify="right")
        for label, rows, ends in self._groups():
            means = [fmean(row.top1 for row in rows if row.alpha == alpha) for alpha in alphas]
            cells = [f"{100 * mean:.1f}" for mean in means]
            table.add_row(label, str(rows[0].n), *cells, end_section=ends)
        return table

    def _groups(self) -> list[tuple[str, list[Row], bool]]:
        """The table's lines: label, rows to average at each strength, whether a rule follows."""
        plain = [row for row in self.rows if row.kind in (CLEAN, SHIFT)]
        corrupted = [row for row in self.rows if row.kind not in (CLEAN, SHIFT)]
        names = list(dict.fromkeys(row.set for row in plain))
        kinds = list(dict.fromkeys(row.kind for row in corrupted))
        suffix = _severities(sorted({row.severity for row in corrupted if row.severity is not None}))
        groups = [(name, [row for row in plain if row.set == name], name == names[-1]) for name in names]
        groups += [(kind + suffix, [row for row in corrupted if row.kind == kind], kind == kinds[-1]) for kind in kinds]
        return groups + ([("mean of corruptions", corrupted, True)] if kinds else [])

    def _title(self) -> str:
        counts = {row.n for row in self.rows if row.kind != SHIFT}
        return f"Top-1 (%) on {self.protocol['data']['name']}, n = {', '.join(map(str, sorted(counts)))}"

    def _caption(self) -> str:
        if not self.protocol["delta"]["specs"]:
            return "No prompts, so there is nothing to interpolate: the trained model only."
        if self.protocol["head"] == "interpolated":
            return "α = 0: backbone without prompts under the linear probe's head; α = 1: tuned model."
        return "α = 0: backbone without prompts; α = 1: tuned model; the tuned head at every α."


def _severities(numbers: Sequence[int]) -> str:
    if len(numbers) < 2:
        return "".join(f" (severity {number})" for number in numbers)
    whole = list(numbers) == list(range(numbers[0], numbers[-1] + 1))
    return f" (mean of severities {f'{numbers[0]}-{numbers[-1]}' if whole else ', '.join(map(str, numbers))})"
