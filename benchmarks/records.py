"""The records that the tables of the documentation are made of: one file of JSON lines a table, a line for each key."""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch

from vpt.atomic_write import write_text

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


class Records:
    """The lines of a file, told apart by some of their fields, so that an interrupted benchmark goes on."""

    def __init__(self, path: Path, *key: str) -> None:
        """Reads nothing yet.

        Args:
            path: The file, which may not exist yet.
            *key: Names of the fields that no two lines share all of.
        """
        self.path, self.key = path, key

    def rows(self) -> list[Row]:
        """All lines, in the order in which they were first written."""
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        return [json.loads(line) for line in text.splitlines()]

    def find(self, *values: Any) -> Row | None:
        """The line whose key has these values, or None."""
        return next((row for row in self.rows() if self._of(row) == values), None)

    def put(self, *rows: Row) -> None:
        """Writes lines: each in the place of that with its key, or at the end. Processes may write at once."""
        with _alone(self.path):
            kept = {self._of(row): row for row in self.rows()} | {self._of(row): row for row in rows}
            lines = (json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in kept.values())
            write_text(self.path, "".join(f"{line}\n" for line in lines))

    def _of(self, row: Row) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in self.key)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keeps other processes from writing the file meanwhile; its folder is what they wait for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]], words: int = 1) -> str:
    """A table whose columns from `words` on are numbers, at the right."""
    rule = "|".join("---" if place < words else "--:" for place in range(len(head)))
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def machine(device: str) -> Row:
    """What the numbers belong to."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    versions = {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()}
    return {"device": name, "threads": torch.get_num_threads(), "versions": versions}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
