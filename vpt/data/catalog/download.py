"""Fetches one file: from the first mirror that has it, resumed where it stopped, and believed only after its checksum.

Until it is whole it is ``NAME.part``, with the address and version that it came from in ``NAME.part.json``.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from vpt.data.catalog.archives import unpack
from vpt.data.catalog.cards import Card, Download, card_names, find_card
from vpt.data.catalog.overview import check_images, image_lists, parts
from vpt.data.prepare import prepare
from vpt.errors import DataError
from vpt.screen import console
from vpt.version import __version__

_CHUNK = 1 << 20
_ATTEMPTS = 4  # in a row that bring nothing new
_LARGEST = 500 * 10**9  # bytes; of files whose size no card states
_FOR_NOW = {408, 425, 429, 500, 502, 503, 504}  # statuses after which a server may be asked again


class _FailedError(Exception):
    """A mirror did not give the file; the message says why."""


class _BrokenError(_FailedError):
    """It may be worth another attempt."""


def fetch(download: Download, folder: Path, timeout: float = 60.0, pause: float = 1.0) -> Path:
    """Fetches a file to a folder, which is created, unless it is there, and returns its path.

    A connection is stalled after `timeout` seconds without a byte; `pause`, in seconds, doubles after each attempt. A
    DataError where no mirror gave it with its checksum, the folder cannot be written, or another file has its name.
    """
    target = folder / download.file
    if target.exists():
        if fault := _mismatch(download, target):
            raise DataError(f"{target} {fault}; remove it to fetch it again.")
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _from_a_mirror(download, target, timeout, pause)
    except OSError as error:
        raise DataError(f"{target} cannot be written ({error}); the same call goes on when that is mended.") from error


def _from_a_mirror(download: Download, target: Path, timeout: float, pause: float) -> Path:
    part, reasons = _Part(target.with_name(target.name + ".part")), []
    with _progress() as progress:
        bar = progress.add_task(download.file, total=download.size)
        for url in download.urls:
            transfer = _Transfer(download, url, part, timeout, partial(progress.update, bar))
            try:
                _persist(transfer, pause)
            except _FailedError as error:
                reasons.append(f"{url}: {error}")
                continue
            part.path.replace(target)
            part.forget()
            return target
    raise DataError(f"{download.file} could not be fetched ({'; '.join(reasons)}); fetch it by hand to {target}.")


@dataclass(frozen=True)
class _Part:
    """What has arrived so far, and where it came from."""

    path: Path

    @property
    def note(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def version_from(self, url: str) -> str | None:
        """What an address called its version of the bytes that are here; None if they are not from there."""
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
            return str(note["version"]) if note["url"] == url and note["version"] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Transfer:
    """One mirror's file on its way into a part."""

    download: Download
    url: str
    part: _Part
    timeout: float
    show: Callable[..., None]

    def once(self) -> None:
        """Asks for what is missing and appends it; also an OSError where the disk cannot be written."""
        try:
            with self._open() as response:
                self._receive(response)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # there is nothing beyond what is here: all of it, or another file
                if self.part.size == _total(error.headers, 0):
                    return
                self.part.forget()
                raise _BrokenError("the server's file has another length") from error
            kind = _BrokenError if error.code in _FOR_NOW else _FailedError
            raise kind(f"HTTP {error.code} {error.reason}") from error
        except TimeoutError as error:
            raise _BrokenError(f"no byte in {self.timeout:g} s") from error
        except urllib.error.URLError as error:
            raise _BrokenError(str(error.reason)) from error
        except (http.client.HTTPException, ConnectionError, ssl.SSLError) as error:
            raise _BrokenError(f"the connection broke ({type(error).__name__})") from error

    def _open(self) -> Any:
        if not self.url.startswith(("https://", "http://")):
            raise _FailedError("not an http address")
        headers = {"User-Agent": f"vpt/{__version__}", "Accept-Encoding": "identity"}
        version = self.part.version_from(self.url)
        # Bytes of another mirror are gone on with only where a checksum will judge the whole.
        if self.part.size and (version or self.download.sha256 or self.download.md5):
            headers["Range"] = f"bytes={self.part.size}-"
            if version:
                headers["If-Range"] = version
        return urllib.request.urlopen(urllib.request.Request(self.url, headers=headers), timeout=self.timeout)  # noqa: S310

    def _receive(self, response: Any) -> None:
        start = self.part.size if response.status == 206 else 0
        if response.status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            self.part.forget()
            raise _BrokenError("the server sent another range than it was asked for")
        total = _total(response.headers, start)
        self._check_size(total, start)
        strong = response.headers.get("ETag", "")
        version = strong if strong.startswith('"') else response.headers.get("Last-Modified", "")
        limit, done = total or self.download.size or _LARGEST, start
        with self.part.path.open("ab" if start else "wb") as file:
            if not start:
                self.part.note.write_text(json.dumps({"url": self.url, "version": version}), encoding="utf-8")
            while chunk := response.read1(_CHUNK):  # what is there: a stall loses nothing
                done += len(chunk)
                if done > limit:
                    self.part.forget()
                    raise _FailedError(f"more than the {limit:,} bytes that it should have")
                file.write(chunk)
                self.show(completed=done, total=total)
        if total is not None and done < total:
            raise _BrokenError(f"the connection broke after {done:,} of {total:,} bytes")

    def _check_size(self, total: int | None, start: int) -> None:
        stated = self.download.size
        if total is not None and stated is not None and total != stated:
            raise _FailedError(f"{total:,} bytes, where {stated:,} were expected")
        if total is not None and total > _LARGEST:
            raise _FailedError(f"{total:,} bytes, which is no dataset of ours")
        needed, free = (total or stated or 0) - start, shutil.disk_usage(self.part.path.parent).free
        if needed > free:
            raise OSError(f"{needed / 1e9:.1f} GB are missing and {free / 1e9:.1f} GB are free")


def _persist(transfer: _Transfer, pause: float) -> None:
    """Repeats a transfer while it advances, then checks what has come; what an earlier call began may be wrong once."""
    left, resumed = _ATTEMPTS, transfer.part.size > 0
    while True:
        before = transfer.part.size
        try:
            transfer.once()
        except _BrokenError as error:
            left = _ATTEMPTS if transfer.part.size > before else left - 1
            if not left:
                raise _FailedError(str(error)) from error
            time.sleep(pause * 2 ** (_ATTEMPTS - left))
            continue
        fault = _mismatch(transfer.download, transfer.part.path)
        if fault is None:
            return
        transfer.part.forget()
        if not resumed:
            raise _FailedError(fault)
        resumed = False


def _mismatch(download: Download, path: Path) -> str | None:
    size = path.stat().st_size
    if download.size is not None and size != download.size:
        return f"has {size:,} bytes, where {download.size:,} were expected"
    for name, stated in (("sha256", download.sha256), ("md5", download.md5)):
        if stated and (found := _digest(path, name)) != stated.lower():
            return f"has {name} {found}, where {stated} was expected"
    return None


def _digest(path: Path, name: str) -> str:
    digest = hashlib.new(name, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _total(headers: Any, start: int) -> int | None:
    """Reads the length of the whole file; None if the server does not say."""
    stated = headers.get("Content-Range", "").rpartition("/")[2]
    if stated.isdigit():
        return int(stated)
    length = headers.get("Content-Length", "")
    return start + int(length) if length.isdigit() else None


def _progress() -> Progress:
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress("Fetching {task.description}", *columns, console=console(stderr=True), transient=True)


DOWNLOADS = "downloads"
"""Folder below the root for what is fetched and unpacked."""


def obtain(name: str, root: Path, source: Path | None = None, allow_partial: bool = False) -> Path:
    """Makes a dataset that has a card ready below the root, and returns its folder.

    VTAB tasks are written to ``<root>/<name>/`` by :func:`vpt.data.prepare.prepare` from `source`, or from an original
    that is fetched and unpacked below ``<root>/downloads/``. All others are only fetched and unpacked, and their lists
    read. An UnknownNameError where there is no such dataset, and a DataError where it can only be got by hand (the
    message says how), cannot be fetched, unpacked or read, or has too few images without `allow_partial`.
    """
    card = find_card(name)
    if card.suite != "vtab":
        if source is not None and card.suite != "demo":
            raise DataError(_as_published(card, root / card.name))
        if not card.downloads:
            raise DataError(_by_hand(card, f"put the folder at {root / card.name}"))
        fetched = _fetch(card, root, root / card.name)
        for part in parts(card.name, root):
            check_images(image_lists(part, root))
        return fetched
    if source is None:
        if not card.downloads:
            raise DataError(_by_hand(card, f"run `vpt data prepare {card.name} --source FOLDER`"))
        source = _fetch(card, root, root / DOWNLOADS / _shared(card))
    return prepare(card.name, source, root, allow_partial)


def _fetch(card: Card, root: Path, folder: Path) -> Path:
    """Fetches all files of a card and unpacks them into a folder; each only once, unless what it held is gone."""
    archives = root / DOWNLOADS / _shared(card)
    for download in card.downloads:
        done = archives / f"{download.file}.unpacked"
        if download.extract and _whole(folder, done):
            continue
        file = fetch(download, archives if download.extract else folder)
        if download.extract:
            done.unlink(missing_ok=True)
            with console(stderr=True).status(f"Unpacking {download.file}"):
                sizes = unpack(file, folder)
            done.write_text(json.dumps(sizes), encoding="utf-8")
    return folder


def _whole(folder: Path, done: Path) -> bool:
    """Says whether a folder holds every file that an archive was noted to have put there, at its size."""
    try:
        sizes = json.loads(done.read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _shared(card: Card) -> str:
    """Names the folder of an original: tasks that are made of the same files have the same."""
    cards = map(find_card, card_names())
    return min([card.name, *(other.name for other in cards if other.downloads == card.downloads)])


def _as_published(card: Card, folder: Path) -> str:
    fetched = ", or leave --source out to fetch it" if card.downloads else ""
    layout = f", laid out as\n{card.layout.rstrip()}" if card.layout else "."
    return (
        f"--source is for VTAB tasks only: {card.name} is read as its authors publish it; put the folder at "
        f"{folder}{fetched}{layout}"
    )


def _by_hand(card: Card, then: str) -> str:
    if card.suite == "demo":
        return f"{card.name} is made by this package: there is nothing to prepare."
    steps = card.obtain.strip() or f"Get it from {card.source}."
    layout = f"\nIt is laid out as\n{card.layout.rstrip()}" if card.layout else ""
    return f"{card.title} is not fetched by this package. By hand: {steps}\nThen {then}.{layout}"
