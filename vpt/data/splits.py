"""Splits: named lists of labelled images whose pixels are made on demand, out of files or by drawing them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vpt.data.image_cache import Images, decoded
from vpt.data.images import ImageSource
from vpt.data.subsets import part_fingerprint
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
        fingerprint: sha256 of the list, hexadecimal.
        pixels: Returns the images, uint8 (3, image_size, image_size) each. Called with ``positions``, an int64 array,
            for some of them only, and with ``cropped=False`` for what is there before the preset's centre crop.
    """

    source: str
    paths: Sequence[str]
    labels: NDArray[np.int64]
    fingerprint: str
    pixels: Callable[..., Images]

    def take(self, positions: NDArray[np.int64]) -> Split:
        """Returns a part of the list.

        Args:
            positions: int64 (M,), which images.
        """
        return replace(
            self,
            paths=[self.paths[position] for position in positions],
            labels=self.labels[positions],
            fingerprint=part_fingerprint(self.fingerprint, positions),
            pixels=partial(self.pixels, positions=positions),
        )


def listed_split(source: str, images: ImageSource, preset: Preset, image_size: int) -> Split:
    """Makes a split of a list of images that are decoded once and then cached.

    Args:
        source: Where it comes from, relative to the root.
        images: The list.
        preset: How images are resized.
        image_size: Side in pixels.
    """
    pixels = partial(decoded, images, preset, image_size)
    return Split(source, images.paths, images.labels, images.fingerprint, pixels)


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
        content: (N, ...), what the images are made of; covered by the fingerprint.
        pixels: As of :class:`Split`.
    """
    fingerprint = hashlib.sha256(content.tobytes() + labels.tobytes()).hexdigest()
    return Split(f"{task}/{stem}", [f"{task}/{position:04d}" for position in positions], labels, fingerprint, pixels)


def no_split(source: str, reason: str) -> Split:
    """Makes an empty split that refuses to be used, with a ConfigError.

    Args:
        source: Name, for the record.
        reason: A sentence with a remedy.
    """
    return Split(source, [], np.zeros(0, dtype=np.int64), "", partial(_refuse, reason))


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
