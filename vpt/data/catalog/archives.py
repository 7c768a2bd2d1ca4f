"""Unpacks an archive that a stranger may have made: only plain files and folders, only below one folder, only so many.

Nothing is left to the extraction of tarfile or zipfile: tarfile's filter has been outwitted by chains of links
(CVE-2025-4517). Links of any kind are refused, and each file is written here.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import IO, Any

from vpt.errors import DataError

MAX_BYTES = 500 * 10**9
MAX_RATIO = 100
"""Times the archive's own size; images hardly shrink at all."""
_SMALL = 100 * 10**6  # bytes that may come out of any archive, however small
_CHUNK = 1 << 20
_DECOMPRESSORS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, gzip.BadGzipFile, EOFError, RuntimeError)

Entry = tuple[str, IO[bytes] | None]  # name, content; None for a folder


class _RefusedError(Exception):
    """An archive holds what no dataset needs; the message says what."""


def unpack(archive: Path, folder: Path, max_bytes: int = MAX_BYTES) -> dict[str, int]:
    """Unpacks a tar (plain, gz, bz2, xz) or zip file, whose contents say what kind it is, into a folder.

    The folder is created, files in it are written again. No more than `max_bytes`, and than :data:`MAX_RATIO` times the
    archive, may come out. Returns the bytes of each file by its path below the folder. A DataError where the archive is
    damaged, of another kind, or holds a path out of the folder, a link or a device; or the disk is full.
    """
    sizes: dict[str, int] = {}
    left = min(max_bytes, max(_SMALL, MAX_RATIO * archive.stat().st_size))
    try:
        with closing(_entries(archive, left)) as entries:
            for name, content in entries:
                target = _inside(folder, name)
                (target if content is None else target.parent).mkdir(parents=True, exist_ok=True)
                if content is not None:
                    size = _write(content, target, left)
                    sizes[target.relative_to(folder).as_posix()] = size
                    left -= size
    except _RefusedError as error:
        raise DataError(f"{archive} holds {error}: do not trust it, get it from the authors.") from error
    except _DAMAGE as error:
        raise DataError(
            f"{archive} is damaged, or no tar or zip file ({error}); remove it and get it again."
        ) from error
    except OSError as error:
        raise DataError(f"{archive} cannot be unpacked into {folder} ({error}).") from error
    return sizes


def _entries(archive: Path, limit: int) -> Generator[Entry, None, None]:
    with archive.open("rb") as file:
        start = file.read(6)
    if start.startswith(b"PK"):
        yield from _zip_entries(archive)
        return
    decompress = next((opener for magic, opener in _DECOMPRESSORS.items() if start.startswith(magic)), None)
    with decompress(archive) if decompress else archive.open("rb") as stream:
        yield from _tar_entries(_Limited(stream, limit))


def _zip_entries(archive: Path) -> Generator[Entry, None, None]:
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _RefusedError(f"{member.filename!r}, a link or device")
            if member.is_dir():
                yield member.filename, None
            else:
                with file.open(member) as content:
                    yield member.filename, content


def _tar_entries(stream: Any) -> Generator[Entry, None, None]:
    with tarfile.open(fileobj=stream, mode="r|") as file:
        for member in file:
            if not member.isreg() and not member.isdir():
                raise _RefusedError(f"{member.name!r}, a link or device")
            yield member.name, file.extractfile(member)


class _Limited(io.RawIOBase):
    """A stream that gives only so many bytes: what a decompressor makes of a few may be without end."""

    def __init__(self, stream: Any, limit: int) -> None:
        self.stream, self.left = stream, limit

    def read(self, size: int = -1) -> bytes:
        data: bytes = self.stream.read(min(size, self.left + 1) if size >= 0 else self.left + 1)
        self.left -= len(data)
        if self.left < 0:
            raise _RefusedError("more bytes than a dataset of its size")
        return data


def _inside(folder: Path, name: str) -> Path:
    """Returns where an entry belongs; refuses a name that is absolute, climbs, or means something else on Windows."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or any(sign in name for sign in "\\:\0"):
        raise _RefusedError(f"the path {name!r}, which leads out of the folder")
    target = folder.joinpath(*path.parts)
    if not target.parent.resolve().is_relative_to(folder.resolve()):
        raise _RefusedError(f"the path {name!r}, which leads out of the folder by a link that is there")
    return target


def _write(content: IO[bytes], target: Path, limit: int) -> int:
    """Writes one file and returns its length; a link in its place is replaced and not followed."""
    target.unlink(missing_ok=True)
    done = 0
    with target.open("xb") as file:
        while chunk := content.read(_CHUNK):
            done += len(chunk)
            if done > limit:
                raise _RefusedError("more bytes than a dataset of its size")
            file.write(chunk)
    return done
