"""A validation set held out of an official training list: deterministic, stratified, of an exact size."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from vpt.data.images import ImageList
from vpt.data.layout import checked


def take(images: ImageList, positions: NDArray[np.intp]) -> ImageList:
    """Returns a part of a list.

    Args:
        images: The list.
        positions: Which images, in which order.
    """
    paths = [images.paths[position] for position in positions]
    numbers, _, fingerprint = checked(images.file, paths, images.labels[positions])
    lines = [images.lines[position] for position in positions]
    return type(images)(images.file, images.folder, paths, numbers, lines, fingerprint)


def hold_out(images: ImageList, every: int, seed: int = 0) -> tuple[ImageList, ImageList]:
    """Splits validation images off a training list by systematic sampling, without a random generator.

    The images are sorted by class and then by the sha256 of ``"<seed> <path>"``; the first of every ``every`` is held
    out. N images therefore give ``ceil(N / every)``, and each class its share to within one image. For 10 these are
    the sizes of the published FGVC splits, of which no rule is known.

    Args:
        images: The official training list.
        every: One in how many is held out, at least 2.
        seed: Another seed gives another split.

    Returns:
        What is left and what is held out, each in the order of the list.
    """
    digests = [hashlib.sha256(f"{seed} {path}".encode("utf-8", "surrogateescape")).hexdigest() for path in images.paths]
    order = np.lexsort((np.array(digests), images.labels))
    held = np.zeros(len(order), dtype=bool)
    held[order[::every]] = True
    return take(images, np.flatnonzero(~held)), take(images, np.flatnonzero(held))
