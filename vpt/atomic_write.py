"""The one way in which a file comes into being: whole, or not at all."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from vpt.errors import ConfigError

_ABANDONED_AFTER = 24 * 3600.0  # seconds, after which an unfinished file belongs to a process that was killed


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives a place to write to, beside a file that is replaced when the block ends without an error.

    Args:
        path: The file; folders above it are made.

    Yields:
        Where to write. After an error nothing of it is left, and what was at ``path`` still is. The file has the rights
        that any new file has here, whatever wrote it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _claimed(path)
    rights = stat.S_IMODE(partial.stat().st_mode)  # as the process's mask leaves them
    try:
        yield partial
        partial.chmod(rights)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _claimed(path: Path) -> Path:
    """An empty file beside a file, of the same name each time unless another process is writing there."""
    partial = path.with_name(f".{path.name}.part")
    with suppress(FileNotFoundError):
        if time.time() - partial.stat().st_mtime > _ABANDONED_AFTER:
            partial.unlink()
    try:
        partial.touch(exist_ok=False)
    except FileExistsError:
        partial = path.with_name(f".{path.name}.{uuid4().hex}.part")
        partial.touch(exist_ok=False)
    return partial


def check_unused(path: Path, read: Iterable[Path] | None = None) -> None:
    """Refuses to write over what is there, before anything is computed.

    Args:
        path: The file to be written.
        read: The files and folders that it must not be, or lie in, for what it is made of; None for any file.

    Raises:
        ConfigError: It exists already.
    """
    if path.exists() and (
        read is None or {path.resolve(), *path.resolve().parents} & {each.resolve() for each in read}
    ):
        raise ConfigError(f"{path} exists already: name another file, or remove it.")


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
