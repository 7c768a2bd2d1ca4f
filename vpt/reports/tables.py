"""A table of text cells, and what it is written as: the same in Markdown and on a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: What it shows.
        note: How to read it.
        columns: Headings.
        rows: A cell for each heading.
        words: How many columns from the left are words, the others are numbers.
    """

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 2


def percent(value: float | None, std: float | None = None) -> str:
    """Writes a share in percent.

    Args:
        value: In [0, 1], or None.
        std: Its standard deviation, or None.

    Returns:
        Percent with one digit; a dash for None.
    """
    if value is None:
        return "–"
    return f"{100 * value:.1f}" + ("" if std is None else f" ± {100 * std:.1f}")


def p_value(value: float) -> str:
    """Writes the p of a test.

    Args:
        value: In [0, 1].

    Returns:
        Three digits, or that it lies below all that three digits can say.
    """
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def markdown(title: str, notes: Sequence[str], tables: Sequence[Table]) -> str:
    """Writes a report as Markdown.

    Args:
        title: Its heading.
        notes: A paragraph each.
        tables: A section each.

    Returns:
        Headings, notes and tables.
    """
    lines = [f"# {title}", "", *(f"{note}\n" for note in notes)]
    for table in tables:
        rule = ["---" if place < table.words else "--:" for place in range(len(table.columns))]
        lines += [f"## {table.title}", "", table.note, ""]
        lines += [f"| {' | '.join(map(_escaped, cells))} |" for cells in (table.columns, rule, *table.rows)] + [""]
    return "\n".join(lines)


def _escaped(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
