"""What every reader of an original gives: its parts, and how what is wrong with an original is said."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vpt.data.catalog.cards import Card
from vpt.data.datasets.published_files import read_text
from vpt.data.images import ImageList
from vpt.errors import DataError

Picture = Path | bytes | NDArray[np.uint8]
"""An image file to be copied, the bytes of one, or pixels (H, W) or (H, W, 3)."""


@dataclass(frozen=True)
class Part:
    """One part of an original, such as its training images, in canonical order.

    The canonical order is that of the array or file where the original is one, else by name.

    Attributes:
        names: Path of each image below ``images/`` of the prepared task, unique.
        labels: int64 (N,).
        picture: Gives image 0..N-1; called from several threads.
    """

    names: Sequence[str]
    labels: NDArray[np.int64]
    picture: Callable[[int], Picture]


Reader = Callable[[Path, Card], dict[str, Part]]


class MissingOriginalError(DataError):
    """A file or folder of an original is not there; `prepare` adds the layout and how to get it."""


def home(source: Path, *markers: str) -> Path:
    """Finds the folder that holds an original: the source, or up to two folders below it.

    Archives differ in their outer folders, and torchvision adds one.

    Args:
        source: What the user named.
        *markers: Files or folders that must lie in it.

    Raises:
        MissingOriginalError: There is no such folder.
    """
    if not source.is_dir():
        raise MissingOriginalError(f"{source} is not a folder")
    for folders in ([source], source.glob("*"), source.glob("*/*")):
        for folder in sorted(folders):
            if all((folder / marker).exists() for marker in markers):
                return folder
    raise MissingOriginalError(f"{source} holds no {' and '.join(markers)}, nor does a folder in it")


def text(file: Path) -> str:
    """Reads a text file.

    Args:
        file: UTF-8.

    Raises:
        MissingOriginalError: It does not exist.
        DataError: It cannot be read.
    """
    if not file.exists():
        raise MissingOriginalError(f"{file} does not exist")
    return read_text(file)


def files(folder: Path, names: Sequence[str], labels: Iterable[int]) -> Part:
    """Makes a part of image files, sorted by name.

    Args:
        folder: What the names are relative to.
        names: Paths with forward slashes.
        labels: One a name.
    """
    pairs = sorted(zip(names, labels, strict=True))
    ordered = [name for name, _ in pairs]
    numbers = np.array([label for _, label in pairs], dtype=np.int64)
    return Part(ordered, numbers, lambda position: folder / ordered[position])


def listed_files(images: ImageList, below: str) -> Part:
    """Makes a part of a published list.

    Args:
        images: The list.
        below: The folder that holds all its images, which their names are then relative to.
    """
    return files(images.folder / below, [path.removeprefix(f"{below}/") for path in images.paths], images.labels)


def pixels(name: str, labels: NDArray[np.integer], picture: Callable[[int], NDArray[np.uint8]]) -> Part:
    """Makes a part of an array of images, in its order.

    Args:
        name: Of the part, the folder of its images.
        labels: (N,).
        picture: Gives the pixels of image 0..N-1, uint8 (H, W) or (H, W, 3).
    """
    names = [f"{name}/{position:06d}.png" for position in range(len(labels))]
    return Part(names, np.asarray(labels, dtype=np.int64), picture)
