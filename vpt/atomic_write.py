"""The one way in which a file comes into being: whole, or not at all."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any
from uuid import uuid4

_ABANDONED_AFTER = 24 * 3600.0  # seconds; one that is being written has changed lately


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives a place to write to, beside a file that is replaced when the block ends without an error.

    Args:
        path: The file; folders above it are made.

    Yields:
        Where to write. After an error nothing of it is left, and what was at ``path`` still is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{escape(path.name)}.*.part"):  # by a process that was killed
        if time.time() - left.stat().st_mtime > _ABANDONED_AFTER:
            left.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.{uuid4().hex}.part")  # two processes may write one file
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes text as UTF-8.

    Args:
        path: The file; folders above it are made, one that exists is replaced.
        text: Its content.
    """
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes plain values.

    Args:
        path: The file; folders above it are made, one that exists is replaced.
        value: Plain JSON values.
    """
    write_text(path, json.dumps(value, indent=2) + "\n")
