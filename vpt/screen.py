"""What is on its way to a reader: tables on the screen that cut nothing, how far work is, Markdown that names keep."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich import table as rich_table
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape as plain
from rich.progress import track

__all__ = ["Table", "console", "markdown", "plain", "progress", "show"]

Answer = TypeVar("Answer")

LINE_EVERY = 5.0  # seconds
_WHOLE = 14  # characters up to which a cell stays on one line, however narrow the screen is


def console(stderr: bool = False) -> Console:
    """A console that prints text as it is: ``[red]`` is no colour in it, and ``:smile:`` no face."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


class Table(rich_table.Table):
    """A table that shows every cell whole, with text as `rich.table.Table` takes it.

    Where the screen is too narrow long cells are folded into lines, the longest first; short ones stay on their line.
    Columns that have no room then come below, in a table of their own behind the `keys` first ones.
    """

    keys = 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Fits the columns into the width that there is."""
        cells = [[column.header, *column.cells] for column in self.columns]
        longest = [max(cell_len(line) for cell in column for line in f"{cell}\n".split("\n")) for column in cells]
        room = options.max_width - len(cells) - 1  # without the rules
        if sum(longest) + 2 * len(cells) > room:
            words = [[*map(str, column[1:]), *str(column[0]).split()] for column in cells]
            widths = [min(_WHOLE, max(map(cell_len, each), default=1)) for each in words]
            here, needed = self.keys, sum(widths[: self.keys]) + self.keys + 1
            while here < len(widths) and (here == self.keys or needed + widths[here] + 1 <= options.max_width):
                needed += widths[here] + 1
                here += 1
            if here < len(widths):
                first, second = copy.copy(self), copy.copy(self)
                first.columns = [copy.copy(column) for column in self.columns[:here]]
                second.columns = [copy.copy(column) for column in self.columns[: self.keys] + self.columns[here:]]
                first.caption = second.title = None
                yield first
                yield second
                return
            for _ in range(room - sum(widths)):
                short = [most - width for most, width in zip(longest, widths, strict=True)]
                widths[short.index(max(short))] += max(short) > 0
            for column, width in zip(self.columns, widths, strict=True):
                column.width, column.overflow = width, "fold"
            self.padding = 0
            options = options.update_width(max(options.max_width, needed))
        yield from super().__rich_console__(console, options)


def show(table: Table) -> None:
    """Prints a table."""
    console().print(table, crop=False)


def progress(answers: Iterable[Answer], description: str, count: int, few: int = 300) -> Iterable[Answer]:
    """Shows on stderr how far it is while `count` answers are iterated over, unless they are `few` or less.

    That is a bar, or off a terminal a line every `LINE_EVERY` seconds.
    """
    shown = console(stderr=True)
    if count > few and not shown.is_terminal:
        return _lines(answers, description, count, shown)
    return track(answers, plain(description), total=count, console=shown, transient=True, disable=count <= few)


def _lines(answers: Iterable[Answer], description: str, count: int, shown: Console) -> Iterator[Answer]:
    told = begun = time.monotonic()
    for done, answer in enumerate(answers, start=1):
        if (now := time.monotonic()) - told >= LINE_EVERY:
            told, left = now, (now - begun) * (count - done) / done
            shown.print(f"{description}: {done:,} of {count:,}, about {left:,.0f} s left", soft_wrap=True)
        yield answer


def markdown(text: str) -> str:
    """Escapes what would be something else than text in a cell or a line of Markdown."""
    marked = re.sub(r"[\\|`*]|<(?=[A-Za-z/!?])", r"\\\g<0>", text)
    return " ".join(marked.split("\n"))
