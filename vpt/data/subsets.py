"""Parts of a training list: few shots, a fraction, a validation part. Stratified, seeded and nested.

The images of a class are put in one order that depends on the seed and their names alone, on no library's random
numbers, and a part takes the first of each class. A larger part therefore holds every smaller one of the same seed,
on any machine.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vpt.errors import ConfigError


def few_shot(
    names: Sequence[str],
    labels: NDArray[np.int64],
    class_names: Sequence[str],
    shots: int | None,
    fraction: float | None,
    seed: int,
) -> NDArray[np.int64]:
    """Chooses some images of every class.

    Args:
        names: N names of images.
        labels: int64 (N,) in 0..C-1.
        class_names: C names.
        shots: Images of each class, ≥ 1; None for a fraction.
        fraction: Share of each class in (0, 1], rounded to the nearest number of images and at least one; None for
            shots. Rounding class by class keeps fractions nested, which shares adjusted to an exact total would not.
        seed: Chooses which, ≥ 0.

    Returns:
        int64 (M,), ascending positions.

    Raises:
        ConfigError: Both or neither are given, one is out of range, there is no image, or a class has fewer than shots.
    """
    if (shots is None) == (fraction is None):
        raise ConfigError("Give either shots or fraction, not both.")
    if shots is not None and shots < 1:
        raise ConfigError(f"shots is {shots}; it must be at least 1.")
    if fraction is not None and not 0 < fraction <= 1:
        raise ConfigError(f"fraction is {fraction}; it must lie in (0, 1].")
    if not len(labels):
        raise ConfigError("shots and fraction choose among training images, and these data have none.")
    sizes = np.bincount(labels, minlength=len(class_names))
    smallest = int(sizes.argmin())
    if shots is not None and shots > sizes[smallest]:
        raise ConfigError(
            f"shots is {shots}, but class {class_names[smallest]!r} has {sizes[smallest]} training images: "
            f"take at most {sizes[smallest]}."
        )
    wanted = [shots or max(1, _round((fraction or 0) * size)) for size in sizes]
    return _first(names, labels, wanted, seed)


def hold_out(
    names: Sequence[str], labels: NDArray[np.int64], fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Splits a list into a part to train on and a part to validate on.

    Args:
        names: N names of images.
        labels: int64 (N,), ≥ 0.
        fraction: Share of each class to validate on, in (0, 1). A class of two or more images keeps one on each side;
            the only image of a class is trained on.
        seed: Chooses which, ≥ 0.

    Returns:
        Ascending positions for training and for validation, int64, together 0..N-1.

    Raises:
        ConfigError: The fraction is out of range, or no class has two images.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"val_fraction is {fraction}; it must lie in (0, 1).")
    wanted = [min(max(1, _round(fraction * size)), int(size) - 1) if size else 0 for size in np.bincount(labels)]
    held = _first(names, labels, wanted, seed)
    if not len(held):
        raise ConfigError("No class has two training images, so none can be validated on: give validation images.")
    return np.setdiff1d(np.arange(len(labels), dtype=np.int64), held), held


def hold_out_every(
    names: Sequence[str], labels: NDArray[np.int64], every: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Splits a list by systematic sampling, so that its length alone says how many are held out.

    The images are sorted by class, then in the order of the seed; the first of every ``every`` is held out. N images
    therefore give ``ceil(N / every)``, and each class its share to within one image, where :func:`hold_out` rounds
    class by class.

    Args:
        names: N names of images, all different.
        labels: int64 (N,).
        every: One in how many is held out, at least 2.
        seed: Chooses which, ≥ 0.

    Returns:
        Ascending positions of what is left and of what is held out, int64, together 0..N-1.
    """
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
