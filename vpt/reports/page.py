"""Reports as files: plain values, Markdown, and one page of tables and figures that needs nothing beside itself."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import ImageOps
from PIL.Image import Image

from vpt.atomic_write import write_text
from vpt.reports.style import rendered
from vpt.screen import markdown as plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Values = dict[str, Any]
"""Plain values for JSON."""
Columns = Mapping[str, str | Callable[[Values], str]]
"""Headings of a table, each above a key of its rows' values or what a function says of these."""
_PIXELS = 100  # that an inch of a figure takes on the page, where it fits
_LEGIBLE = 0.8  # of these: on a narrower screen the figure scrolls, or its letters were too small
_LONG = 80  # characters of a cell that would be a column of single words on a narrow screen
_CSS = """
:root { color: #1f2937; background: #fff; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 78rem; margin: 0 auto; padding: 1rem; }
h1, h2, p { overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 1rem 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem; }
p { max-width: 46rem; margin: .3rem 0 .7rem; color: #4b5563; }
figure { margin: .5rem 0 0; overflow-x: auto; }
img { max-width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; border: 1px solid #e5e7eb; border-radius: 4px; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .3rem .55rem; text-align: left; vertical-align: top; }
th { font-weight: 600; background: #f3f4f6; }
td { border-top: 1px solid #e5e7eb; }
td:not(.number) { min-width: 7.5rem; }
td.long:not(.number) { min-width: 22rem; }
td:first-child:not(.number) { min-width: 5rem; }
.number { text-align: right; white-space: nowrap; }
"""


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


def table_of(title: str, note: str, columns: Columns, rows: Iterable[Values], words: int = 2) -> Table:
    """Makes a table of rows of values; None is a dash, and numbers have three digits."""
    cells = [[_text(row[each]) if isinstance(each, str) else each(row) for each in columns.values()] for row in rows]
    return Table(title, note, list(columns), cells, words)


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


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
    lines = [f"# {plain(title)}", "", *(f"{plain(note)}\n" for note in notes)]
    for table in tables:
        rule = ["---" if place < table.words else "--:" for place in range(len(table.columns))]
        lines += [f"## {plain(table.title)}", "", plain(table.note), ""]
        lines += [f"| {' | '.join(map(plain, cells))} |" for cells in (table.columns, rule, *table.rows)] + [""]
    return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """What was measured, laid out for readers: plain JSON values, and what is shown of them.

    Below the title stand notes, a paragraph each; figures have a sentence each as caption, by their name. `others` are
    further forms of the tables by the suffix of their file.
    """

    values: Mapping[str, Any]
    title: str
    notes: Sequence[str]
    tables: Sequence[Table]
    figures: Mapping[str, Figure]
    captions: Mapping[str, str]
    others: Mapping[str, str] = field(default_factory=dict)

    def write(self, out: Path) -> list[Path]:
        """Writes ``report.json`` (which refuses NaN), ``report.md``, the others and ``report.html``; returns paths.

        What has figures comes last: where one cannot be drawn or written (OutputError), the tables are there.
        """
        texts = {
            "json": json.dumps(self.values, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
            "md": markdown(self.title, self.notes, self.tables),
            **self.others,
        }
        for suffix, text in texts.items():
            write_text(out / f"report.{suffix}", text)
        page = document(self.title, self.notes, self.tables, self.figures, self.captions)
        write_text(out / "report.html", page)
        return [out / f"report.{suffix}" for suffix in (*texts, "html")]


def document(
    title: str,
    notes: Sequence[str],
    tables: Sequence[Table],
    figures: Mapping[str, Figure],
    captions: Mapping[str, str],
    rest: str = "",
) -> str:
    """Writes a page that refers to nothing else: the first table, the captioned figures, the other tables; HTML.

    What is HTML already, the `rest`, stands at its end.
    """
    parts = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(note)}</p>" for note in notes), *map(_table, tables[:1])]
    parts += [_figure(name, figure, captions[name]) for name, figure in figures.items()]
    parts += [*(_table(table) for table in tables[1:]), rest]
    head = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
    )
    return head + "\n".join(parts) + "\n</body>\n</html>\n"


def pictures(shown: Iterable[tuple[Image, str, str]], side: int = 128) -> str:
    """Lays small copies of images in a row, of at most so many pixels, each with a caption and a hidden title; HTML."""
    cells = []
    for image, caption, title in shown:
        small, file = ImageOps.contain(image, (side, side)), io.BytesIO()
        small.save(file, "JPEG", quality=80)
        data = base64.b64encode(file.getvalue()).decode()
        picture = f'<img alt="{escape(caption)}" width="{small.width}" src="data:image/jpeg;base64,{data}">'
        text = f'<figcaption title="{escape(title)}">{escape(caption)}</figcaption>'
        cells.append(f'<figure style="width: {side}px; font-size: .75rem">{picture}{text}</figure>')
    return f'<div style="display: flex; flex-wrap: wrap; gap: .6rem; align-items: end">{"".join(cells)}</div>'


def _figure(name: str, figure: Figure, caption: str) -> str:
    data = base64.b64encode(rendered(figure, "png", f"The figure {name!r}")).decode()
    width = round(_PIXELS * figure.get_figwidth())
    least = f"min-width: {round(_LEGIBLE * width)}px"
    image = f'<img alt="{escape(name)}" width="{width}" style="{least}" src="data:image/png;base64,{data}">'
    return f"<h2>{escape(name)}</h2>\n<p>{escape(caption)}</p>\n<figure>{image}</figure>"


def _table(table: Table) -> str:
    lines = [f"<h2>{escape(table.title)}</h2>", f"<p>{escape(table.note)}</p>", '<div class="scroll"><table>']
    lines += [f"<thead>{_row('th', table.columns, table.words)}</thead>", "<tbody>"]
    lines += [_row("td", cells, table.words) for cells in table.rows]
    return "\n".join([*lines, "</tbody></table></div>"])


def _row(tag: str, cells: Sequence[str], words: int) -> str:
    inner = ""
    for place, cell in enumerate(cells):
        kind = ' class="number"' if place >= words else ' class="long"' if len(cell) > _LONG else ""
        inner += f"<{tag}{kind}>{escape(cell)}</{tag}>"
    return f"<tr>{inner}</tr>"
