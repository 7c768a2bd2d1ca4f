"""Tables that are written row by row, of any length: CSV, Parquet, JSON lines; whole or not there."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from vpt.atomic_write import atomic_write
from vpt.errors import OutputError

Row = dict[str, Any]
_SUFFIXES = (".csv", ".parquet", ".jsonl")
_ROWS = 1024  # of Parquet that are written at once


def check_suffix(path: Path) -> None:
    """Refuses, by an OutputError, a file of another kind."""
    if path.suffix.lower() not in _SUFFIXES:
        raise OutputError(f"{path} is no table that can be written: name a .csv, .parquet or .jsonl.")


@contextmanager
def row_writer(path: Path) -> Iterator[Callable[[Row], None]]:
    """Opens a table for rows that all have the columns of the first: of text, of lists of it, or of numbers and None.

    CSV joins a list by ``|``, with a backslash before one in a text. A file's name that is not text is written byte for
    byte into CSV, and escaped elsewhere.
    """
    check_suffix(path)
    with atomic_write(path) as partial, ExitStack() as stack:
        if path.suffix.lower() == ".parquet":
            yield stack.enter_context(_parquet(partial))
            return
        file = stack.enter_context(partial.open("w", newline="", encoding="utf-8", errors="surrogateescape"))
        if path.suffix.lower() == ".jsonl":
            yield lambda row: print(json.dumps(_plain(row), ensure_ascii=False), file=file)
            return
        writer: list[csv.DictWriter[str]] = []

        def write(row: Row) -> None:
            if not writer:
                writer.append(csv.DictWriter(file, list(row)))
                writer[0].writeheader()
            writer[0].writerow({key: _joined(value) for key, value in row.items()})

        yield write


def _plain(row: Row) -> Row:
    """With all texts in UTF-8: a file's name may be none."""

    def text(value: Any) -> Any:
        return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value

    return {key: text(value) for key, value in row.items()}


def _joined(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return "|".join(each.replace("\\", "\\\\").replace("|", "\\|") for each in value)


@contextmanager
def _parquet(partial: Path) -> Iterator[Callable[[Row], None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    waiting: list[Row] = []
    writer: list[Any] = []

    def flush() -> None:
        if not waiting:
            return
        if not writer:
            texts = (key for key in waiting[0] if any(isinstance(row[key], str) for row in waiting))
            lists = (key for key, value in waiting[0].items() if isinstance(value, list))
            kinds = dict.fromkeys(waiting[0], pa.float64()) | dict.fromkeys(texts, pa.string())
            kinds |= dict.fromkeys(lists, pa.list_(pa.string()))
            writer.append(pq.ParquetWriter(partial, pa.schema(list(kinds.items()))))
        writer[0].write_table(pa.Table.from_pylist(waiting, schema=writer[0].schema))
        waiting.clear()

    def write(row: Row) -> None:
        waiting.append(_plain(row))
        if len(waiting) >= _ROWS:
            flush()

    yield write
    flush()
    if writer:
        writer[0].close()
