"""A generated segmentation task: coloured shapes over a textured background, and the class of every pixel."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vpt.data.catalog.cards import load_card
from vpt.data.masks import MaskDataModule, MaskSplit
from vpt.errors import UnknownNameError

CLASSES = ("background", "circle", "square", "triangle", "star")
_VERSION = 1  # raised when the same numbers would give other images
_SPLIT_SEED = 0
_LISTS = {"train800": (0, 800), "val200": (800, 1000), "train800val200": (0, 1000), "test": (1000, 2000)}
_OVERSAMPLING = 4
Pixels = NDArray[np.uint8]


class ShapeScenesDataModule(MaskDataModule):
    """Two to four coloured shapes over a textured background: 800 / 200 / 1,000 images of five classes.

    Colours say nothing about the class, shapes may hide each other, and edges are antialiased; a pixel belongs to the
    shape that covers at least half of it.
    """

    def __init__(
        self,
        train: str = "train800val200",
        val: str = "val200",
        test: str = "test",
        preset: str = "square",
        image_size: int = 64,
        **options: Any,
    ) -> None:
        """Chooses the images; they are drawn, at the size that is asked for, when a split is.

        Args:
            train: ``"train800"`` or ``"train800val200"``.
            val: List to validate on.
            test: List to test on.
            preset: Name of the preprocessing; images are drawn at the final size, only its normalization counts.
            image_size: Side of the square images in pixels.
            **options: See :class:`MaskDataModule`. The images do not depend on its seed.

        Raises:
            UnknownNameError: A list or preset is unknown.
            ConfigError: A number is out of range.
        """
        splits = {name: _split(stem, image_size) for name, stem in (("train", train), ("val", val), ("test", test))}
        card = load_card("shape_scenes")
        super().__init__("shape_scenes", CLASSES, splits, preset, image_size, card=card, **options)


@dataclass(frozen=True)
class _Scenes:
    """A run of numbered images."""

    first: int
    end: int
    image_size: int

    def images(self, positions: NDArray[np.int64] | None = None, cropped: bool = True) -> Pixels:
        return _chosen(_drawn(self)[0], positions)

    def masks(self, positions: NDArray[np.int64] | None = None) -> Pixels:
        return _chosen(_drawn(self)[1], positions)


def _chosen(values: Pixels, positions: NDArray[np.int64] | None) -> Pixels:
    return values if positions is None else values[positions]


@lru_cache(maxsize=4)
def _drawn(scenes: _Scenes) -> tuple[Pixels, Pixels]:
    """Images (N, 3, H, W) and masks (N, H, W); read-only, as several data modules share them."""
    drawn = [draw_scene(number, scenes.image_size) for number in range(scenes.first, scenes.end)]
    images, masks = (np.stack(part) for part in zip(*drawn, strict=True))
    for array in (images, masks):
        array.flags.writeable = False
    return images, masks


def _split(stem: str, image_size: int) -> MaskSplit:
    if stem not in _LISTS:
        raise UnknownNameError("list", stem, _LISTS)
    first, end = _LISTS[stem]
    scenes = _Scenes(first, end, image_size)
    fingerprint = hashlib.sha256(f"shape_scenes {_VERSION} {_SPLIT_SEED} {first} {end}".encode()).hexdigest()
    paths = [f"shape_scenes/{number:04d}" for number in range(first, end)]
    labels = np.zeros(end - first, dtype=np.int64)
    return MaskSplit(f"shape_scenes/{stem}", paths, labels, fingerprint, scenes.images, scenes.masks)


def draw_scene(number: int, image_size: int) -> tuple[Pixels, Pixels]:
    """Draws one image.

    Args:
        number: Which, ≥ 0; it alone decides what is seen.
        image_size: Side in pixels.

    Returns:
        The image, uint8 (3, image_size, image_size), and its mask, uint8 (image_size, image_size): positions in
        `CLASSES`.
    """
    random = np.random.default_rng([_SPLIT_SEED, number])
    image = _background(random, image_size)
    mask = np.zeros((image_size, image_size), dtype=np.uint8)
    for _ in range(random.integers(2, 5)):
        kind = int(random.integers(1, len(CLASSES)))
        outline = _outline(CLASSES[kind], random.uniform(0, 2 * math.pi))
        outline = outline * random.uniform(0.14, 0.24) + random.uniform(0.16, 0.84, size=2)
        colour, cover = random.uniform(0, 255, size=3), _coverage(outline, image_size)
        image += cover[..., None] * (colour - image)
        mask[cover >= 0.5] = kind
    image += random.normal(0, 6, size=image.shape)
    return np.rint(image.clip(0, 255)).astype(np.uint8).transpose(2, 0, 1), mask


def _background(random: np.random.Generator, image_size: int) -> NDArray[np.float64]:
    """Two colours mixed by three gratings of random direction and width, (image_size, image_size, 3)."""
    rows, columns = np.mgrid[0 : 1 : image_size * 1j, 0 : 1 : image_size * 1j]
    share = np.zeros_like(rows)
    for _ in range(3):
        angle, phase = random.uniform(0, 2 * math.pi, size=2)
        waves = random.uniform(2, 9)
        share += np.sin(2 * math.pi * waves * (math.cos(angle) * columns + math.sin(angle) * rows) + phase) / 6
    one, other = random.uniform(30, 225, size=(2, 3))
    mixed: NDArray[np.float64] = one + (share + 0.5)[..., None] * (other - one)
    return mixed


def _coverage(outline: NDArray[np.float64], image_size: int) -> NDArray[np.float64]:
    """Share of each pixel that a polygon (V, 2) in the unit square covers, (image_size, image_size)."""
    side = image_size * _OVERSAMPLING
    canvas = Image.new("L", (side, side))
    ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in outline * side], fill=255)
    return np.asarray(canvas.reduce(_OVERSAMPLING), dtype=np.float64) / 255


def _outline(name: str, turn: float) -> NDArray[np.float64]:
    """Corners (V, 2) of a shape within the unit circle."""
    corners = {"circle": 48, "square": 4, "triangle": 3, "star": 10}[name]
    angle = turn + 2 * math.pi * np.arange(corners) / corners
    radius = np.where(np.arange(corners) % 2, 0.45, 1.0) if name == "star" else np.ones(corners)
    points: NDArray[np.float64] = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return points
