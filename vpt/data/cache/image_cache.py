"""Each image is decoded once, into a memory-mapped file that runs and processes share.

Decoding happens here, before training and in several processes, so that a damaged file is reported by one sentence
and not in the middle of an epoch. Images of a list that is `LARGE` are decoded when they are first read instead
(:mod:`vpt.data.cache.growing_cache`). Where a list is too large for the disk, or the disk cannot be written, its images
are decoded each time they are asked for.

A file holds the pixels of all images, one after the other, and then a table of their heights and widths; images of
different sizes, which a random crop is cut from, need no padding. It is written under another name and renamed when
it is complete: what a killed build leaves is no cache, and of two builds at once the later one replaces an equal file.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from vpt.atomic_write import FULL, atomic_write, make_folder
from vpt.data.cache.content_hashes import LARGE, NUMBERS, cache_folder
from vpt.data.cache.content_hashes import SUFFIX as HASHES
from vpt.data.cache.growing_cache import GrowingCache
from vpt.data.images import ImageList, ImageSource
from vpt.data.transforms import Preset
from vpt.errors import DataError, OutputError, VPTWarning
from vpt.image_size import ImageSize, plain_size, sides, size_text
from vpt.screen import progress
from vpt.version import pixel_versions

DISK_SHARE = 0.5
"""A list whose pixels need more than this share of the free disk is decoded on demand."""

_FORMAT = 5  # raised when the same key would mean other pixels
_SUFFIX = ".pixels"
_PART = ".part"
_IMAGES_PER_PROCESS = 100  # fewer are not worth starting a process for
_ABANDONED_AFTER = 3600.0  # seconds without a write, after which an unfinished file belongs to nobody


class Images(Protocol):
    """Images uint8 (3, H, W), or float32 (C, H, W), by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> Any: ...


@dataclass(frozen=True)
class Ragged:
    """Images of different sizes in one array `flat`, each with its height and width (N, 2) and where it ends (N,)."""

    flat: NDArray[Any]
    shapes: NDArray[np.int64]
    ends: NDArray[np.int64]
    channels: int

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, position: int) -> NDArray[Any]:
        shape = (self.channels, *self.shapes[position])
        end = self.ends[position]
        return self.flat[end - math.prod(shape) : end].reshape(shape)


@dataclass(frozen=True)
class OnDemand:
    """Images of one size that are decoded each time they are asked for.

    Where `cropped` is False they are what is there before the preset's centre crop.
    """

    source: ImageSource
    preset: Preset
    image_size: ImageSize
    cropped: bool = True

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> NDArray[Any]:
        resize = self.preset if self.cropped else self.preset.scale
        return np.ascontiguousarray(resize(self.source.decode(position), self.image_size).transpose(2, 0, 1))

    def state(self, position: int) -> bytes | None:
        """See `vpt.data.cache.growing_cache.Decoder`."""
        return self.source.state(position) if isinstance(self.source, ImageList) else None

    def num_bytes(self) -> int:
        """Returns the size of all when decoded; where shapes differ, at an aspect ratio of 3:2."""
        area = math.prod(sides(self.image_size)) / (1 if self.cropped else self.preset.crop_fraction**2)
        pixel = self.preset.num_channels * np.dtype(self.preset.dtype).itemsize
        return math.ceil(len(self) * pixel * area * (1 if self.cropped else 1.5))


def usage() -> tuple[int, int]:
    """Returns the number of cache files, unfinished ones included, and their bytes."""
    sizes = [_on_disk(status) for _, status in _files()]
    return len(sizes), sum(sizes)


def clear() -> tuple[int, int]:
    """Removes all cache files, unfinished ones too, whose builds end without a cache; their number and bytes."""
    removed = _files()
    for path, _ in removed:
        path.unlink(missing_ok=True)
    return len(removed), sum(_on_disk(status) for _, status in removed)


def _on_disk(status: os.stat_result) -> int:
    """Bytes of a file, without the rows that a growing one lacks."""
    return min(status.st_size, 512 * getattr(status, "st_blocks", status.st_size))


def decoded(
    source: ImageSource,
    preset: Preset,
    image_size: ImageSize,
    positions: NDArray[np.int64] | None = None,
    cropped: bool = True,
) -> Images:
    """Returns all images of a list, resized; decodes them unless an earlier call did.

    Args:
        source: The list.
        preset: How images are resized.
        image_size: Pixels, or (height, width).
        positions: int64 (M,), some of the list, which have a cache file of their own; None for all.
        cropped: False for what is there before the preset's centre crop.

    Returns:
        A read-only array uint8 (N, 3, H, W), or float32 (N, C, H, W), if all images have one size, else
        :class:`Ragged`; :class:`GrowingCache` of a `LARGE` list of files; or :class:`OnDemand`, with a warning that
        says why, if they need more than `DISK_SHARE` of the free disk, the cache folder cannot be written, or a `LARGE`
        list has images of different sizes.

    Raises:
        DataError: An image is missing or cannot be decoded, the decoding processes lack memory or open files, or the
            disk is full.
    """
    source = source if positions is None else source.take(positions)
    images = OnDemand(source, preset, image_size, cropped)
    if len(source) > LARGE and isinstance(source, ImageList):
        return _growing(images, source)
    path = cache_folder() / f"{source.title}-{preset.name}-{size_text(image_size)}-{_key(images)}{_SUFFIX}"
    if (cached := _open(path, images)) is not None:
        return cached
    try:
        make_folder(path.parent)
        free = shutil.disk_usage(path.parent).free
        if images.num_bytes() > DISK_SHARE * free:
            return _on_demand(images, f"they need {_gb(images.num_bytes())} of the {_gb(free)} free there")
        _write(path, _rows(images))
    except OutputError as error:
        if error.errno in FULL:
            raise DataError(
                f"The disk of {path.parent} is full: the images of {source.title} need {_gb(images.num_bytes())}. "
                "Free space, run `vpt data cache --clear`, or set VPT_CACHE to a folder on another disk."
            ) from error
        return _on_demand(images, str(error).rstrip("."))
    cached = _open(path, images)
    return images if cached is None else cached  # None: another process has cleared the cache


def _growing(images: OnDemand, source: ImageList) -> GrowingCache | OnDemand:
    """A cache that is known by the paths of its images; each row knows the state of its file."""
    if not images.cropped:
        return _on_demand(images, f"they are more than {LARGE:,}, of different sizes")
    form = [_FORMAT, images.preset.to_dict(), plain_size(images.image_size), pixel_versions(), str(source.folder)]
    digest = hashlib.sha256(json.dumps(form).encode())
    digest.update("\n".join(source.paths).encode("utf-8", "surrogateescape"))
    size = size_text(images.image_size)
    path = cache_folder() / f"{source.title}-{images.preset.name}-{size}-{digest.hexdigest()[:16]}-growing{_SUFFIX}"
    height, width = sides(images.image_size)
    try:
        make_folder(path.parent)
        there = _on_disk(path.stat()) if path.is_file() else 0
        free = shutil.disk_usage(path.parent).free
        if images.num_bytes() - there > DISK_SHARE * free:
            return _on_demand(images, f"they need {_gb(images.num_bytes())}, and {_gb(free)} are free there")
        shape = (images.preset.num_channels, height, width)
        return GrowingCache(path, images, shape, np.dtype(images.preset.dtype))
    except OutputError as error:
        return _on_demand(images, str(error).rstrip("."))


def _on_demand(images: OnDemand, reason: str) -> OnDemand:
    warnings.warn(
        f"Images of {images.source.title} are decoded anew in every epoch and not kept in {cache_folder()} ({reason}); "
        "set VPT_CACHE to another folder, or num_workers to the number of cores.",
        VPTWarning,
        stacklevel=3,
    )
    return images


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def _files(endings: tuple[str, ...] = (_SUFFIX, _PART, HASHES, NUMBERS)) -> list[tuple[Path, os.stat_result]]:
    found = []
    for path in chain(*(cache_folder().glob(f"*{suffix}*") for suffix in (_SUFFIX, HASHES, NUMBERS))):
        with suppress(FileNotFoundError):  # a build that ended meanwhile has renamed it
            if path.name.endswith(endings):
                found.append((path, path.stat()))
    return found


def _key(images: OnDemand) -> str:
    """Hashes all that the pixels depend on: what the images are, how they are resized, and by which libraries."""
    hashes = images.source.contents()
    for position in np.flatnonzero(~hashes.any(axis=1)):
        images.source.decode(int(position))  # says what is wrong with a file that cannot be read
    form = [_FORMAT, images.preset.to_dict(), plain_size(images.image_size), images.cropped, pixel_versions()]
    return hashlib.sha256(json.dumps(form).encode() + hashes.tobytes()).hexdigest()[:16]


def _open(path: Path, images: OnDemand) -> NDArray[Any] | Ragged | None:
    """Maps a finished cache file of images; None if there is none or it is damaged."""
    count, channels, dtype = len(images), images.preset.num_channels, np.dtype(images.preset.dtype)
    try:
        flat = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError):  # absent; empty
        return None
    table = flat[len(flat) - 8 * count :] if len(flat) > 8 * count else flat[:0]
    shapes = np.frombuffer(table.tobytes(), dtype="<i4").astype(np.int64).reshape(-1, 2)
    ends = np.cumsum(channels * shapes.prod(axis=1))
    if len(shapes) != count or shapes.min() < 1 or dtype.itemsize * ends[-1] + 8 * count != len(flat):
        return None
    pixels = flat[: dtype.itemsize * ends[-1]].view(dtype)
    if (shapes == shapes[0]).all():
        return pixels.reshape(count, channels, *shapes[0])
    return Ragged(pixels, shapes, ends, channels)


class _Answers(Dataset[Any]):
    """Images or the error in their place: a worker process would hand an error over as a whole traceback."""

    def __init__(self, images: OnDemand) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> NDArray[Any] | DataError:
        try:
            return self.images[position]
        except DataError as error:
            return error


def end_with_parent(worker: int) -> None:
    """Ends a loader's process when the process that started it is gone, however that ended (a ``worker_init_fn``).

    Else it would wait for ever to hand over its images: of several, each holds the others' pipes open.
    """
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _rows(images: OnDemand) -> Iterator[NDArray[Any]]:
    """Yields the images in list order, decoded by as many processes as there are cores."""
    count = len(images)
    alone = multiprocessing.current_process().daemon  # a loader's worker may not have workers
    loader = DataLoader(
        _Answers(images),
        batch_size=16,
        collate_fn=list,  # arrays travel through a pipe: tensors would need shared memory, which containers lack
        num_workers=0 if alone else min(_cores(), count // _IMAGES_PER_PROCESS),
        worker_init_fn=end_with_parent,
        generator=torch.Generator(),  # leaves the global one as it is: a run is the same with and without a cache
    )
    try:
        for answer in progress(chain.from_iterable(loader), f"Decoding {images.source.title}", count):
            if isinstance(answer, DataError):
                raise answer
            yield answer
    except (OSError, RuntimeError, MemoryError) as error:  # of the processes: an image's own error is an answer
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"The processes that decode {images.source.title} have failed ({reason[-1].rstrip('.')}): "
            "give them more memory or open files (`ulimit -n`), or fewer cores (`taskset -c 0 vpt ...`)."
        ) from error


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write(path: Path, rows: Iterable[NDArray[Any]]) -> None:
    """Writes a cache file; not by a writable memory map, which on a full disk kills the process."""
    for left, status in _files((_PART,)):
        if time.time() - status.st_mtime > _ABANDONED_AFTER:  # by a killed build: one that is alive has written lately
            left.unlink(missing_ok=True)
    shapes = []
    with atomic_write(path) as partial, partial.open("wb") as file:
        for row in rows:
            file.write(row.tobytes())
            shapes.append(row.shape[1:])
        file.write(np.array(shapes, dtype="<i4").tobytes())
        file.flush()
        os.fsync(file.fileno())
