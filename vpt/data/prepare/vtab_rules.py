"""Which images of an original are train800, val200 and test: by rule, without chance.

The reference takes "the first 800" in the order in which TensorFlow Datasets happens to store a dataset, which cannot
be reproduced without it. Here the images of a part are ordered by the SHA-256 of their position in the canonical
order, written as a decimal number. That needs no generator of random numbers, gives the same order everywhere and
forever, and anyone can recompute it. The ranges are those of VTAB (Zhai et al. 2019), applied to that order.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Where the three lists of a task come from.

    Attributes:
        sizes: Number of images of each part of the complete original.
        train: What train800 is taken from: a part, or a range such as ``"train[:90%]"``.
        val: Likewise for val200.
        test: The test list, whole.
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

    def sha256(self) -> str:
        """Hash of the positions, written as decimal numbers with a space between them."""
        return hashlib.sha256(" ".join(map(str, self.positions.tolist())).encode()).hexdigest()


@lru_cache(maxsize=2)
def order(count: int) -> Positions:
    """The positions 0..count-1, ordered by the SHA-256 of their decimal number.

    Args:
        count: Number of images.

    Returns:
        int64 (count,), read-only.
    """
    hashes = b"".join(hashlib.sha256(b"%d" % position).digest() for position in range(count))
    positions = np.lexsort(np.frombuffer(hashes, ">u8").reshape(-1, 4).T[::-1]).astype(np.int64)
    positions.setflags(write=False)
    return positions


def choose(split: Split, sizes: Mapping[str, int]) -> dict[str, Chosen]:
    """Chooses the images of train800, val200 and test.

    Args:
        split: The rule.
        sizes: Number of images of each part; ``split.sizes`` for the complete original.

    Returns:
        The three lists; train800 and val200 in the order of the rule, test in the canonical order. Fewer images than
        800 and 200 only where there are fewer.
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


def manifest(splits: Mapping[str, Split]) -> Iterator[str]:
    """Yields the lines of ``vpt/data/prepare/vtab_splits.tsv``.

    Args:
        splits: Rule of each task.
    """
    yield "task\tlist\tfrom\tpart_size\tcount\tsha256\tpositions"
    for task, split in splits.items():
        rules = {"train800": split.train, "val200": split.val, "test": split.test}
        for name, chosen in choose(split, split.sizes).items():
            positions = "" if name == "test" else " ".join(map(str, chosen.positions.tolist()))
            fields = (task, name, rules[name], split.sizes[chosen.part], len(chosen.positions), chosen.sha256())
            yield "\t".join(map(str, fields)) + f"\t{positions}"


CLEVR_DISTANCES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
KITTI_DISTANCES = (-100.0, 8.0, 20.0, 999.0)
KITTI_VEHICLES = ("Car", "Van", "Truck")
NO_VEHICLE = 1000.0  # metres


def clevr_count(scene: Sequence[Sequence[float]]) -> int:
    """Number of objects, 3 to 10, as label 0 to 7.

    Args:
        scene: ``pixel_coords`` (x, y, distance to the camera) of each object.
    """
    return len(scene) - 3


def clevr_distance(scene: Sequence[Sequence[float]]) -> int:
    """Distance of the nearest object in the classes (0, 8], (8, 8.5], (8.5, 9], (9, 9.5], (9.5, 10], (10, 100].

    Args:
        scene: ``pixel_coords`` (x, y, distance to the camera) of each object, at least one.

    Returns:
        Label 0 to 5; -1 or 6 for a distance outside all classes.
    """
    return _class_of(min(coordinates[2] for coordinates in scene), CLEVR_DISTANCES)


def kitti_distance(objects: Iterable[tuple[str, float]]) -> int:
    """Distance of the nearest car, van or truck: up to 8 m, up to 20 m, farther, and label 3 for no vehicle.

    Args:
        objects: Type and z of the location, in metres in front of the camera, of each object.

    Returns:
        Label 0 to 3.
    """
    return _class_of(min([z for kind, z in objects if kind in KITTI_VEHICLES] + [NO_VEHICLE]), KITTI_DISTANCES)


def dsprites_bin(latent: NDArray[np.integer], values: int) -> NDArray[np.int64]:
    """Sixteen bins of a latent: x positions by 2, orientations by 2.5.

    Args:
        latent: (N,), 0..values-1.
        values: 32 for the x position, 40 for the orientation.

    Returns:
        int64 (N,), 0..15.
    """
    return latent.astype(np.int64) * 16 // values


def smallnorb_azimuth(info: NDArray[np.integer]) -> NDArray[np.int64]:
    """Azimuth, stored as 0, 2, .. 34 in tens of degrees, as label 0 to 17.

    Args:
        info: (N, 4): instance, elevation, azimuth, lighting.

    Returns:
        int64 (N,).
    """
    return info[:, 2].astype(np.int64) // 2


def smallnorb_elevation(info: NDArray[np.integer]) -> NDArray[np.int64]:
    """Elevation, stored as 0 to 8 (30° to 70° by 5°), which is the label.

    Args:
        info: (N, 4): instance, elevation, azimuth, lighting.

    Returns:
        int64 (N,).
    """
    return info[:, 1].astype(np.int64)


def svhn_digit(stored: NDArray[np.integer]) -> NDArray[np.int64]:
    """The digit; 0 is stored as 10.

    Args:
        stored: (N,), 1..10.

    Returns:
        int64 (N,), 0..9.
    """
    return stored.astype(np.int64) % 10


def _class_of(value: float, bounds: Sequence[float]) -> int:
    """Number of the last bound that lies below a value; -1 if none does."""
    return int(np.searchsorted(np.asarray(bounds, np.float32), np.float32(value), side="left")) - 1
