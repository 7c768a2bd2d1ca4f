"""Each image is decoded once, into a memory-mapped array that runs and processes share.

Decoding happens here, in the main process and before training, so that a damaged file is reported by one sentence
and not out of a loader's worker in the middle of an epoch.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from vpt.data.images import ImageList
from vpt.data.presets import Preset

_FORMAT = 1  # raised when the same key would mean other pixels
_SHOW_PROGRESS_ABOVE = 300  # images; fewer take a second or two


def cache_folder() -> Path:
    """Returns ``$VPT_CACHE``, or ``~/.cache/vpt/images``."""
    return Path(os.environ.get("VPT_CACHE") or "~/.cache/vpt/images").expanduser()


def usage() -> tuple[int, int]:
    """Returns the number of cache files, unfinished ones included, and their bytes."""
    sizes = [path.stat().st_size for path in _files()]
    return len(sizes), sum(sizes)


def clear() -> tuple[int, int]:
    """Removes all cache files, unfinished ones included.

    Returns:
        The number of files and their bytes.
    """
    removed = usage()
    for path in _files():
        path.unlink(missing_ok=True)
    return removed


def _files() -> list[Path]:
    return [path for path in cache_folder().glob("*") if path.suffix in (".npy", ".part")]


def decoded(images: ImageList, preset: Preset, image_size: int) -> NDArray[np.uint8]:
    """Returns all images of a list, resized; decodes them unless an earlier call did.

    Where the cache folder cannot be written, the array is built in memory and a warning says so.

    Args:
        images: The list.
        preset: How images are resized.
        image_size: Side in pixels.

    Returns:
        uint8 (N, 3, image_size, image_size), read-only where it is memory-mapped.

    Raises:
        DataError: An image is missing or cannot be decoded.
    """
    shape = (len(images.paths), 3, image_size, image_size)
    name = f"{images.folder.name}-{images.file.stem}-{preset.name}-{image_size}-{_key(images, preset, image_size)}.npy"
    path = cache_folder() / name
    cached = _open(path, shape)
    if cached is not None:
        return cached
    try:
        _write(path, shape, _rows(images, preset, image_size))
    except OSError as error:
        warnings.warn(
            f"Images of {images.file} are kept in memory because {path.parent} cannot be written ({error}); "
            "set VPT_CACHE to a writable folder.",
            stacklevel=2,
        )
        return np.stack(list(_rows(images, preset, image_size)))
    return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]


def _key(images: ImageList, preset: Preset, image_size: int) -> str:
    """Hashes all that the pixels depend on; sizes and times stand for the contents of the image files."""
    digest = hashlib.sha256()
    digest.update(json.dumps([_FORMAT, images.fingerprint, preset.to_dict(), image_size]).encode())
    digest.update(str(images.folder.resolve()).encode())
    for position, name in enumerate(images.paths):
        try:
            status = (images.folder / name).stat()
        except OSError as error:
            raise images.fault(position, error) from error
        digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _open(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
    """Maps a finished cache file; None if there is none or it is damaged."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return array if array.shape == shape and array.dtype == np.uint8 else None


def _rows(images: ImageList, preset: Preset, image_size: int) -> Iterator[NDArray[np.uint8]]:
    """Yields uint8 (3, image_size, image_size) in list order, decoded by a few threads (PIL releases the lock)."""

    def row(position: int) -> NDArray[np.uint8]:
        return np.ascontiguousarray(preset(images.decode(position), image_size).transpose(2, 0, 1))

    count = len(images.paths)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        yield from track(
            pool.map(row, range(count)),
            description=f"Decoding {images.folder.name}/{images.file.stem}",
            total=count,
            console=Console(stderr=True),
            transient=True,
            disable=count < _SHOW_PROGRESS_ABOVE,
        )


def _write(path: Path, shape: tuple[int, ...], rows: Iterator[NDArray[np.uint8]]) -> None:
    """Writes a .npy file under a name of its own and renames it when it is complete.

    Plain writes and not a writable memory map: on a full disk they raise OSError where a map kills the process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{uuid4().hex}.part")
    try:
        with temporary.open("xb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for row in rows:
                file.write(row.tobytes())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
