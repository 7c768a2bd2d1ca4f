"""What every reader of an original gives: its parts, and which images of them are train800, val200 and test.

The reference takes "the first 800" in TensorFlow Datasets' order of storage, which cannot be reproduced without it.
Here the images of a part are ordered by the SHA-256 of their position in the canonical order, written as a decimal
number, which anyone can recompute. The ranges are VTAB's (Zhai et al. 2019); ``vtab_splits.tsv`` has the result.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vpt.data.catalog.cards import Card
from vpt.data.images import ImageList
from vpt.data.list_files import read_text
from vpt.errors import DataError

Positions = NDArray[np.int64]
Picture = Path | bytes | NDArray[np.uint8]
"""An image file to be copied, the bytes of one, or pixels (H, W) or (H, W, 3)."""


@dataclass(frozen=True)
class Part:
    """One part of an original, such as its training images, in the order of the array or file that it is, else by name.

    `names` are unique paths below ``images/`` of the prepared task, `labels` int64 (N,); `picture` gives image 0..N-1,
    and is called from several threads.
    """

    names: Sequence[str]
    labels: NDArray[np.int64]
    picture: Callable[[int], Picture]


Reader = Callable[[Path, Card], dict[str, Part]]


class MissingOriginalError(DataError):
    """A file or folder of an original is not there; `prepare` adds the layout and how to get it."""


def home(source: Path, *markers: str) -> Path:
    """Finds the folder that holds all markers, files or folders: the source, or up to two folders below it.

    Archives differ in their outer folders, and torchvision adds one. A MissingOriginalError where there is none.
    """
    if not source.is_dir():
        raise MissingOriginalError(f"{source} is not a folder")
    for folders in ([source], source.glob("*"), source.glob("*/*")):
        for folder in sorted(folders):
            if all((folder / marker).exists() for marker in markers):
                return folder
    raise MissingOriginalError(f"{source} holds no {' and '.join(markers)}, nor does a folder in it")


def text(file: Path) -> str:
    """Reads a text file in UTF-8; a MissingOriginalError where there is none."""
    if not file.exists():
        raise MissingOriginalError(f"{file} does not exist")
    return read_text(file)


def files(folder: Path, names: Sequence[str], labels: Iterable[int]) -> Part:
    """Makes a part of image files, sorted by name: paths with forward slashes, relative to the folder."""
    pairs = sorted(zip(names, labels, strict=True))
    ordered = [name for name, _ in pairs]
    numbers = np.array([label for _, label in pairs], dtype=np.int64)
    return Part(ordered, numbers, lambda position: folder / ordered[position])


def listed_files(images: ImageList, below: str) -> Part:
    """Makes a part of a published list, whose images all lie in the folder `below`, and are named relative to it."""
    return files(images.folder / below, [path.removeprefix(f"{below}/") for path in images.paths], images.labels)


def pixels(name: str, labels: NDArray[np.integer], picture: Callable[[int], NDArray[np.uint8]]) -> Part:
    """Makes a part of an array of images, named by part and number; `picture` gives uint8 (H, W) or (H, W, 3)."""
    names = [f"{name}/{position:06d}.png" for position in range(len(labels))]
    return Part(names, np.asarray(labels, dtype=np.int64), picture)


@dataclass(frozen=True)
class SplitRule:
    """Where the three lists of a task come from; `test` is a whole part.

    `sizes` counts the images of each part of the complete original; `train` and `val` are what train800 and val200 are
    taken from: a part, or a range such as ``"train[:90%]"``.
    """

    sizes: Mapping[str, int]
    train: str
    val: str
    test: str


@dataclass(frozen=True)
class Chosen:
    """A list of a task: positions in the canonical order of a part."""

    part: str
    positions: Positions


@lru_cache(maxsize=2)
def order(count: int) -> Positions:
    """The positions 0..count-1, ordered by the SHA-256 of their decimal number: int64 (count,), read-only."""
    hashes = b"".join(hashlib.sha256(b"%d" % position).digest() for position in range(count))
    positions = np.lexsort(np.frombuffer(hashes, ">u8").reshape(-1, 4).T[::-1]).astype(np.int64)
    positions.setflags(write=False)
    return positions


def choose(split: SplitRule, sizes: Mapping[str, int]) -> dict[str, Chosen]:
    """Chooses the images of train800, val200 and test, from the number of images of each part.

    Train800 and val200 in the order of the rule, fewer only where there are fewer; test in the canonical order.
    """
    train, val, test = (_range(rule, sizes) for rule in (split.train, split.val, split.test))
    return {
        "train800": Chosen(train.part, train.positions[:800]),
        "val200": Chosen(val.part, val.positions[:200]),
        "test": Chosen(test.part, np.sort(test.positions)),
    }


def _range(rule: str, sizes: Mapping[str, int]) -> Chosen:
    part, start, stop = re.fullmatch(r"(\w+)(?:\[(?:(\d+)%)?:(?:(\d+)%)?\])?", rule).groups()  # type: ignore[union-attr]
    count = sizes[part]
    return Chosen(part, order(count)[count * int(start or 0) // 100 : count * int(stop or 100) // 100])
