"""The one way in which a file comes into being: whole, or not at all; and whether it can, before work begins."""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError

from vpt.errors import ConfigError, OutputError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Error numbers of a full disk, which nothing but writing meets."""
_ABANDONED_AFTER = 24 * 3600.0  # seconds, after which an unfinished file belongs to a process that was killed


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives a place to write to, beside a file that is replaced when the block ends without an error.

    Folders above it are made. After an error nothing of it is left, and what was at ``path`` still is. The file has the
    rights that any new file has here, whatever wrote it. Raises an OutputError where the system refuses, a full disk
    included.
    """
    check_writable(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _claimed(path)
        rights = stat.S_IMODE(partial.stat().st_mode)  # as the process's mask leaves them
        try:
            yield partial
            partial.chmod(rights)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes what the system refuses while a file or folder is written an OutputError that names it."""
    try:
        yield
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:
        name, code = getattr(error, "filename", None), getattr(error, "errno", None)
        if name and code not in FULL and not {path, *path.parents} & {Path(name), Path(name).parent}:
            raise  # of another file, which is read
        refused = OutputError(f"{_short(path)} cannot be written: {getattr(error, 'strerror', None) or error}.")
        refused.errno = code
        raise refused from error


def make_folder(path: Path) -> Path:
    """Makes a folder and those above it, and returns it; an OutputError where the system refuses."""
    check_writable(path, folder=True)
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def check_writable(path: Path, folder: bool = False) -> None:
    """Refuses a place where no file, or no `folder`, can come to be, by an OutputError before anything is computed.

    Nothing is written. That a disk is full shows only when it is written to.
    """
    name = _short(path)
    if "\0" in str(path):
        raise OutputError(f"{name!r} is no name of a file or folder: it has a NUL.")
    try:
        if path.is_dir() and not folder:
            raise OutputError(f"{name} is a folder: name a file.")
        if path.is_file() and folder:
            raise OutputError(f"{name} is a file: name a folder.")
        above = path if path.is_dir() else next(each for each in path.absolute().parents if os.path.lexists(each))
        if not above.is_dir():
            raise OutputError(f"{name} cannot be written: {above} is not a folder.")
        if not os.access(above, os.W_OK | os.X_OK):
            raise OutputError(f"{name} cannot be written: {above} is read-only.")
        longest = max(len(os.fsencode(part)) for part in path.absolute().parts) + len("..part")
        if longest > os.pathconf(above, "PC_NAME_MAX"):
            raise OutputError(f"{name} cannot be written: its name is too long.")
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{name} cannot be written: {error.strerror}.") from error


def reserve(file: int, size: int) -> None:
    """Takes room for so many bytes, at least one, for an open file: a disk that fills under a map kills the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)


def _short(path: Path) -> str:
    return str(path) if len(path.name) < 80 and len(str(path)) < 400 else f"{str(path)[:40]}…"


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
    """Writes text as UTF-8, as `atomic_write` does; a file's name that is no text is escaped in it."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Writes plain JSON values, as `atomic_write` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")
