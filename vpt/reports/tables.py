"""A table of text cells, and what it is written as: the same in Markdown and on a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A table of text cells, with a note on how to read it.

    The first `words` columns from the left are words, the others are numbers.
    """

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 2


def percent(value: float | None, std: float | None = None) -> str:
    """Writes a share in [0, 1], and its standard deviation, in percent with one digit; a dash for None."""
    if value is None:
        return "–"
    return f"{100 * value:.1f}" + ("" if std is None else f" ± {100 * std:.1f}")


def p_value(value: float) -> str:
    """Writes the p of a test with three digits, or that it lies below all that three digits can say."""
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def markdown(title: str, notes: Sequence[str], tables: Sequence[Table]) -> str:
    """Writes a report as Markdown: a paragraph a note, a section a table."""
    lines = [f"# {title}", "", *(f"{note}\n" for note in notes)]
    for table in tables:
        rule = ["---" if place < table.words else "--:" for place in range(len(table.columns))]
        lines += [f"## {table.title}", "", table.note, ""]
        lines += [f"| {' | '.join(map(_escaped, cells))} |" for cells in (table.columns, rule, *table.rows)] + [""]
    return "\n".join(lines)


def _escaped(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
