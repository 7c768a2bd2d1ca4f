"""What an image is: the hash of its content, whatever its file is called and wherever it lies.

Pixel cache, kept features, records of evaluations, `describe` and `verify` all know images by these hashes. Those of a
list of files are kept beside the pixel cache, under path, size, times and number of each file.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vpt.atomic_write import atomic_write, make_folder, write_json
from vpt.errors import OutputError
from vpt.screen import progress

Hashes = NDArray[np.uint8]
"""uint8 (N, 16), one row an image; of zeros where a file cannot be read."""

LARGE = 10_000
"""Images in a list above which contents are read, and pixels decoded, when they are needed and not before."""

WIDTH = 16
SUFFIX, NUMBERS = ".hashes", ".numbers"
_SETTLED_AFTER = 2.0  # seconds: a file that is younger may change again without another time

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def cache_folder() -> Path:
    """Returns ``$VPT_CACHE``, or ``~/.cache/vpt/images``."""
    return home_path(os.environ.get("VPT_CACHE") or "~/.cache/vpt/images")


def home_path(path: str | Path) -> Path:
    """Returns a path with ``~`` for the home folder; as it is where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def content_hash(*parts: bytes) -> bytes:
    """Returns the hash of one image, 16 bytes, of the parts that its pixels are made of."""
    digest = hashlib.blake2b(digest_size=WIDTH)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def as_hashes(rows: Iterable[bytes]) -> Hashes:
    """Returns hashes of 16 bytes each as uint8 (N, 16)."""
    return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, WIDTH)


def file_state(file: str | Path) -> tuple[bytes, float]:
    """Returns what changes with a file, as text, and when it changed last; an OSError where there is none."""
    status = os.stat(file)  # noqa: PTH116  a Path for each of a million files takes longer than the call
    state = f" {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}".encode()
    return state, max(status.st_mtime, status.st_ctime)


def is_settled(changed: float) -> bool:
    """Says whether a file that changed at a time cannot change again at that time."""
    return time.time() - changed > _SETTLED_AFTER


def kept_hashes(
    title: str, about: str, files: Iterable[str | Path], count: int, content: Callable[[int], bytes]
) -> Hashes:
    """Returns the hashes of N images; computes them unless they were kept for files of the same state.

    Args:
        title: For the progress bar.
        about: What the images are made of beside their files.
        files: All that are read, in order; a missing one has no state but its path.
        count: N.
        content: The hash of the image at a position; a file that it cannot read raises an OSError.
    """
    digest, youngest = hashlib.sha256(about.encode("utf-8", "surrogateescape")), 0.0
    for file in files:
        digest.update(f"\n{file}".encode("utf-8", "surrogateescape"))
        with suppress(OSError):
            state, changed = file_state(file)
            digest.update(state)
            youngest = max(youngest, changed)
    path = cache_folder() / f"{digest.hexdigest()[:32]}{SUFFIX}"
    with suppress(OSError):
        if len(found := path.read_bytes()) == count * WIDTH:
            return as_hashes([found])

    def answer(position: int) -> bytes:
        try:
            return content(position)
        except OSError:
            return bytes(WIDTH)

    settled = is_settled(youngest)
    hashes = as_hashes(in_threads(answer, range(count), f"Reading {title}"))
    if settled:
        with suppress(OutputError), atomic_write(path) as partial:
            partial.write_bytes(hashes.tobytes())
    return hashes


def kept_numbers(key: Any, compute: Callable[[], dict[str, list[float]]]) -> dict[str, list[float]]:
    """Returns what was kept for a key of plain values, all that it depends on; else computes and keeps it."""
    path = cache_folder() / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}{NUMBERS}"
    with suppress(OSError, ValueError):
        found: dict[str, list[float]] = json.loads(path.read_text(encoding="utf-8"))
        return found
    numbers = compute()
    with suppress(OutputError, OSError):
        make_folder(path.parent)
        write_json(path, numbers)
    return numbers


def in_threads(work: Callable[[Item], Answer], items: Sequence[Item], description: str) -> Iterator[Answer]:
    """Yields the answer to each item, one an image, in order, by threads (PIL releases the lock), with `progress`."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        yield from progress(pool.map(work, items), description, len(items))
