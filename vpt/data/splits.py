"""Splits: named lists of labelled images whose pixels are made on demand, and parts of such lists chosen by class.

Parts (few shots, a fraction, a validation part) are stratified, seeded and nested: the images of a class are put in one
order that depends on the seed and their names alone, on no library's random numbers, and a part takes the first of each
class. A larger part therefore holds every smaller one of the same seed, on any machine.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vpt.data.cache.content_hashes import LARGE, Hashes, as_hashes, content_hash
from vpt.data.cache.image_cache import Images, decoded
from vpt.data.images import ImageSource
from vpt.data.transforms import Preset
from vpt.errors import ConfigError, UnknownNameError, check_number
from vpt.image_size import GivenSize, as_size

Listed = TypeVar("Listed")
Made = TypeVar("Made", bound="Split")


@dataclass(frozen=True)
class Split:
    """One list of labelled images whose pixels are made on demand.

    Attributes:
        source: Where it comes from, relative to the root, e.g. ``"caltech101/test.txt"``.
        paths: Name of each image.
        labels: int64 (N,); or uint8 or float32 (N, C), as :data:`vpt.data.targets.Targets` says.
        pixels: Returns the images, uint8 (3, height, width) each. Called with ``positions``, an int64 array,
            for some of them only, and with ``cropped=False`` for what is there before the preset's centre crop.
        contents: Returns the hash of each image, uint8 (N, 16); None for that of its pixels.
        part_of: How many images `contents` reads where it is of a part of them; None for N.
    """

    source: str
    paths: Sequence[str]
    labels: NDArray[Any]
    pixels: Callable[..., Images]
    contents: Callable[[], Hashes] | None = None
    part_of: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def hashes(self) -> Hashes:
        """The hash of each image, uint8 (N, 16)."""
        if not len(self.labels):
            return as_hashes([])
        if self.contents is not None:
            return self.contents()
        images = self.pixels()
        return as_hashes(content_hash(np.ascontiguousarray(images[i]).tobytes()) for i in range(len(images)))

    @property
    def hashed(self) -> bool:
        """Whether the hashes are at hand, or soon: not before they are asked for where the list is `LARGE`."""
        return (self.part_of or len(self)) <= LARGE or "hashes" in self.__dict__

    @cached_property
    def fingerprint(self) -> str:
        """What the split is: sha256 of its images' contents, labels and names, hexadecimal."""
        return hashlib.sha256(b"\0".join(self._hashed())).hexdigest()

    def contradictions(self) -> list[tuple[int, int]]:
        """Returns the positions of each image that is an earlier one again with another label, and of that one."""
        seen: dict[bytes, int] = {}
        pairs = [(seen.setdefault(row.tobytes(), i), i) for i, row in enumerate(self.hashes) if row.any()]
        return [(first, again) for first, again in pairs if np.any(self.labels[first] != self.labels[again])]

    def _hashed(self) -> list[bytes]:
        names = (path.encode("utf-8", "surrogateescape") for path in self.paths)
        return [self.hashes.tobytes(), self.labels.tobytes(), *names]

    def take(self, positions: NDArray[np.int64]) -> Split:
        """Returns the images at some positions, int64 (M,)."""
        return replace(
            self,
            paths=[self.paths[position] for position in positions],
            labels=self.labels[positions],
            pixels=partial(self.pixels, positions=positions),
            contents=None if self.contents is None else partial(rows_of, self.contents, positions),
            part_of=None if self.contents is None else self.part_of or len(self),
        )


def rows_of(contents: Callable[[], Hashes], positions: NDArray[np.int64]) -> Hashes:
    """Returns the hashes at some positions, int64 (M,), of those of a list."""
    return contents()[positions]


def listed_split(source: str, images: ImageSource, preset: Preset, image_size: GivenSize) -> Split:
    """Makes a split of a list of images that are decoded once and then cached; `source` is relative to the root."""
    pixels = partial(decoded, images, preset, as_size(image_size))
    return Split(source, images.paths, images.labels, pixels, images.contents)


def generated_split(
    task: str,
    stem: str,
    positions: NDArray[np.intp],
    labels: NDArray[np.int64],
    content: NDArray[Any],
    pixels: Callable[..., Images],
) -> Split:
    """Makes a split of images without files, by numbers in a task, labels (N,) and what they are made of, (N, ...)."""
    names = [f"{task}/{position:04d}" for position in positions]
    return Split(f"{task}/{stem}", names, labels, pixels, partial(_row_hashes, content))


def _row_hashes(content: NDArray[Any]) -> Hashes:
    return as_hashes(content_hash(str(row.dtype).encode(), row.tobytes()) for row in content)


def no_split(source: str, reason: str) -> Split:
    """Makes an empty split that refuses to be used, with a ConfigError that gives the reason and a remedy."""
    return Split(source, [], np.zeros(0, dtype=np.int64), partial(_refuse, reason))


def _refuse(reason: str, **_: object) -> NDArray[np.uint8]:
    raise ConfigError(reason)


def chosen_splits(
    lists: Mapping[str, Listed], chosen: Mapping[str, str], make: Callable[[str, Listed], Made], what: str = "list"
) -> dict[str, Made]:
    """Makes of each split's list, which a user has chosen among all `lists` by name, a split.

    An UnknownNameError where there is no such list; `what` it is called in the message.
    """
    for stem in chosen.values():
        if stem not in lists:
            raise UnknownNameError(what, stem, lists)
    return {name: make(stem, lists[stem]) for name, stem in chosen.items()}


def few_shot(
    names: Sequence[str],
    labels: NDArray[np.int64],
    class_names: Sequence[str],
    shots: int | None,
    fraction: float | None,
    seed: int,
) -> NDArray[np.int64]:
    """Chooses some of N images of every class: ascending positions, int64 (M,).

    Args:
        names: Of the images.
        labels: int64 (N,) in 0..C-1.
        class_names: C names.
        shots: Images of each class, ≥ 1; None for a fraction.
        fraction: Share of each class in (0, 1], rounded to the nearest number of images and at least one; None for
            shots. Rounding class by class keeps fractions nested, which shares adjusted to an exact total would not.
        seed: Chooses which, ≥ 0.

    Raises:
        ConfigError: Both or neither are given, one is out of range, there is no image, or a class has fewer than shots;
            of a class without any image none are chosen.
    """
    if (shots is None) == (fraction is None):
        raise ConfigError("Give either shots or fraction, not both.")
    check_number("subset_seed", seed, 0, whole=True)
    if shots is not None:
        check_number("shots", shots, 1, whole=True)
    if fraction is not None and not 0 < fraction <= 1:
        raise ConfigError(f"fraction is {fraction}; it must lie in (0, 1].")
    if not len(labels):
        raise ConfigError("shots and fraction choose among training images, and these data have none.")
    sizes = np.bincount(labels, minlength=len(class_names))
    smallest = min((label for label in range(len(sizes)) if sizes[label]), key=lambda label: int(sizes[label]))
    if shots is not None and shots > sizes[smallest]:
        raise ConfigError(
            f"shots is {shots}, but class {class_names[smallest]!r} has {sizes[smallest]} training images: "
            f"take at most {sizes[smallest]}."
        )
    wanted = [shots or max(1, _round((fraction or 0) * size)) for size in sizes]
    return _first(names, labels, wanted, seed)


def hold_out(
    names: Sequence[str], labels: NDArray[np.int64], fraction: float, seed: int, what: str = "val"
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Splits a list into ascending positions to train on and to hold out, int64, together 0..N-1.

    `fraction` is the share of each class to hold out, in (0, 1), rounded to the nearest number of images and at least
    one. A class of two or more images keeps one to train on; two where `what` is ``"test"``, so that one of them can be
    validated on. The only image of a class is trained on. A ConfigError where the fraction is out of range, or no class
    has enough images.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"{what}_fraction is {fraction}; it must lie in (0, 1).")
    keep = 2 if what == "test" else 1
    wanted = [max(0, min(max(1, _round(fraction * size)), int(size) - keep)) for size in np.bincount(labels)]
    held = _first(names, labels, wanted, seed)
    if not len(held):
        raise ConfigError(
            "No class has three images, so none can be tested on: give more, or set test_fraction to 0."
            if what == "test"
            else "No class has two training images, so none can be validated on: give validation images."
        )
    return np.setdiff1d(np.arange(len(labels), dtype=np.int64), held), held


def hold_out_every(
    names: Sequence[str], labels: NDArray[np.int64], every: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Splits a list of N different names by systematic sampling, so that its length alone says how many are held out.

    The images are sorted by class, then in the order of the seed; the first of every ``every`` ≥ 2 is held out. N
    images therefore give ``ceil(N / every)``, and each class its share to within one image, where :func:`hold_out`
    rounds class by class. Returns positions as that does.
    """
    check_number("every", every, 2, whole=True)
    order = sorted(range(len(names)), key=lambda position: (labels[position], _rank(seed, names[position])))
    held = np.sort(np.array(order[::every], dtype=np.int64))
    return np.setdiff1d(np.arange(len(names), dtype=np.int64), held), held


def position_hash(positions: NDArray[np.int64]) -> str:
    """Returns the sha256 of positions as decimal numbers, one a line, hexadecimal."""
    return hashlib.sha256("\n".join(map(str, positions.tolist())).encode()).hexdigest()


def _round(value: float) -> int:
    return math.floor(value + 0.5)  # halves always upwards: round() takes them to the even number


def _first(names: Sequence[str], labels: NDArray[np.int64], wanted: Sequence[int], seed: int) -> NDArray[np.int64]:
    """Ascending positions of the first images of each class, ``wanted[label]`` of them."""
    order = sorted(range(len(names)), key=lambda position: _rank(seed, names[position]))
    taken = [0] * len(wanted)
    chosen = []
    for position in order:
        label = labels[position]
        if taken[label] < wanted[label]:
            taken[label] += 1
            chosen.append(position)
    return np.array(sorted(chosen), dtype=np.int64)


def _rank(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode("utf-8", "surrogateescape")).digest()
