"""Splits: named lists of labelled images whose pixels are made on demand, out of files or by drawing them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vpt.data.content_hashes import Hashes, as_hashes, content_hash
from vpt.data.image_cache import Images, decoded
from vpt.data.images import ImageSource
from vpt.data.transforms import Preset
from vpt.errors import ConfigError, UnknownNameError

Listed = TypeVar("Listed")
Made = TypeVar("Made", bound="Split")


@dataclass(frozen=True)
class Split:
    """One list of labelled images whose pixels are made on demand.

    Attributes:
        source: Where it comes from, relative to the root, e.g. ``"caltech101/test.txt"``.
        paths: Name of each image.
        labels: int64 (N,).
        pixels: Returns the images, uint8 (3, image_size, image_size) each. Called with ``positions``, an int64 array,
            for some of them only, and with ``cropped=False`` for what is there before the preset's centre crop.
        contents: Returns the hash of each image, uint8 (N, 16); None for that of its pixels.
    """

    source: str
    paths: Sequence[str]
    labels: NDArray[np.int64]
    pixels: Callable[..., Images]
    contents: Callable[[], Hashes] | None = None

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

    @cached_property
    def fingerprint(self) -> str:
        """What the split is: sha256 of its images' contents, labels and names, hexadecimal."""
        return hashlib.sha256(b"\0".join(self._hashed())).hexdigest()

    def contradictions(self) -> list[tuple[int, int]]:
        """Returns the positions of each image that is an earlier one again with another label, and of that one."""
        seen: dict[bytes, int] = {}
        pairs = [(seen.setdefault(row.tobytes(), i), i) for i, row in enumerate(self.hashes) if row.any()]
        return [(first, again) for first, again in pairs if self.labels[first] != self.labels[again]]

    def _hashed(self) -> list[bytes]:
        names = (path.encode("utf-8", "surrogateescape") for path in self.paths)
        return [self.hashes.tobytes(), self.labels.tobytes(), *names]

    def take(self, positions: NDArray[np.int64]) -> Split:
        """Returns a part of the list.

        Args:
            positions: int64 (M,), which images.
        """
        return replace(
            self,
            paths=[self.paths[position] for position in positions],
            labels=self.labels[positions],
            pixels=partial(self.pixels, positions=positions),
            contents=None if self.contents is None else partial(rows_of, self.contents, positions),
        )


def rows_of(contents: Callable[[], Hashes], positions: NDArray[np.int64]) -> Hashes:
    """Returns some of the hashes of a list.

    Args:
        contents: Returns all, uint8 (N, 16).
        positions: int64 (M,), which.
    """
    return contents()[positions]


def listed_split(source: str, images: ImageSource, preset: Preset, image_size: int) -> Split:
    """Makes a split of a list of images that are decoded once and then cached.

    Args:
        source: Where it comes from, relative to the root.
        images: The list.
        preset: How images are resized.
        image_size: Side in pixels.
    """
    pixels = partial(decoded, images, preset, image_size)
    return Split(source, images.paths, images.labels, pixels, images.contents)


def generated_split(
    task: str,
    stem: str,
    positions: NDArray[np.intp],
    labels: NDArray[np.int64],
    content: NDArray[Any],
    pixels: Callable[..., Images],
) -> Split:
    """Makes a split of a task without files.

    Args:
        task: Name of the task.
        stem: Name of the list.
        positions: (N,), numbers of the images in the task, which name them.
        labels: int64 (N,).
        content: (N, ...), what the images are made of.
        pixels: As of :class:`Split`.
    """
    names = [f"{task}/{position:04d}" for position in positions]
    return Split(f"{task}/{stem}", names, labels, pixels, partial(_row_hashes, content))


def _row_hashes(content: NDArray[Any]) -> Hashes:
    return as_hashes(content_hash(str(row.dtype).encode(), row.tobytes()) for row in content)


def no_split(source: str, reason: str) -> Split:
    """Makes an empty split that refuses to be used, with a ConfigError.

    Args:
        source: Name, for the record.
        reason: A sentence with a remedy.
    """
    return Split(source, [], np.zeros(0, dtype=np.int64), partial(_refuse, reason))


def _refuse(reason: str, **_: object) -> NDArray[np.uint8]:
    raise ConfigError(reason)


def chosen_splits(
    lists: Mapping[str, Listed], chosen: Mapping[str, str], make: Callable[[str, Listed], Made], what: str = "list"
) -> dict[str, Made]:
    """Makes the lists that a user has chosen into splits.

    Args:
        lists: All lists by name.
        chosen: Name of the list of each split.
        make: Makes a split of a list and its name.
        what: What is chosen, for the message.

    Raises:
        UnknownNameError: There is no such list.
    """
    for stem in chosen.values():
        if stem not in lists:
            raise UnknownNameError(what, stem, lists)
    return {name: make(stem, lists[stem]) for name, stem in chosen.items()}
