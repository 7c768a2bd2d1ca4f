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

    Folders above it are made. After an error nothing of it is left, and what was at ``path`` still is. The file has the
    rights that any new file has here, whatever wrote it.
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
    """Refuses, by a ConfigError, to write over what is there, before anything is computed.

    What is to be written must not be, or lie in, a file or folder that is `read` for it; nor any file if that is None.
    """
    if path.exists() and (
        read is None or {path.resolve(), *path.resolve().parents} & {each.resolve() for each in read}
    ):
        raise ConfigError(f"{path} exists already: name another file, or remove it.")


def write_text(path: Path, text: str) -> None:
    """Writes text as UTF-8, as `atomic_write` does."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes plain JSON values, as `atomic_write` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")
