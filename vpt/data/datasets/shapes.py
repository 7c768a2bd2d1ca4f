"""White shapes on black on the latent grid of dSprites (Matthey et al. 2017), redrawn with antialiasing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vpt.data.catalog.cards import load_card
from vpt.data.datasets.digits import chosen_splits, generated_split
from vpt.data.module import ImageDataModule, Split
from vpt.errors import UnknownNameError

SHAPES = ("square", "ellipse", "heart")
_GRID = {"shape": 3, "scale": 6, "orientation": 40, "x": 32, "y": 32}
_PERIODS = np.array([10, 20, 40])  # orientations after which a square, an ellipse, a heart looks the same
_OVERSAMPLING = 4
_SEED = 0
Latents = Mapping[str, NDArray[np.int64]]


class ShapesDataModule(ImageDataModule):
    """Generated white shapes on black in the manner of dSprites: 800 / 200 / 1,000, no image twice.

    Labels as in VTAB: 16 bins of the x position or of the orientation, or the three shapes. A square turned by 90°
    and an ellipse turned by 180° are the same image, so that no method can exceed (¼ + ½ + 1)/3 = 58 % on
    orientation.
    """

    def __init__(
        self,
        label: str = "x_position",
        train: str = "train800val200",
        val: str = "val200",
        test: str = "test",
        preset: str = "square",
        image_size: int = 64,
        **options: Any,
    ) -> None:
        """Chooses the shapes; they are drawn, at the size that is asked for, when a split is.

        Args:
            label: ``"x_position"``, ``"orientation"`` or ``"shape"``.
            train: ``"train800"`` or ``"train800val200"``.
            val: List to validate on.
            test: List to test on.
            preset: Name of the preprocessing; images are drawn at the final size, only its normalization counts.
            image_size: Side of the square images in pixels.
            **options: See :class:`ImageDataModule`. The images do not depend on its seed; any augmentation changes
                position and orientation.

        Raises:
            UnknownNameError: The label, a list, preset or augmentation is unknown.
            ConfigError: A number is out of range.
        """
        table = latents(2000, seed=_SEED)
        kinds = {
            "x_position": (table["x"] // 2, [f"x bin {bin_}" for bin_ in range(16)]),
            "orientation": ((table["orientation"] / 2.5).astype(np.int64), [f"angle bin {bin_}" for bin_ in range(16)]),
            "shape": (table["shape"], list(SHAPES)),
        }
        if label not in kinds:
            raise UnknownNameError("label of the shapes", label, kinds)
        labels, names = kinds[label]
        rows = np.stack(list(table.values()), axis=1)

        def split(stem: str, positions: NDArray[np.intp]) -> Split:
            chosen = {key: values[positions] for key, values in table.items()}
            pixels = partial(_draw, chosen, image_size)
            return generated_split(
                "shapes", stem, positions, labels[positions].astype(np.int64), rows[positions], pixels
            )

        parts = np.split(np.arange(2000, dtype=np.intp), [800, 1000])
        positions = {"train800": parts[0], "val200": parts[1], "train800val200": np.arange(1000), "test": parts[2]}
        splits = chosen_splits(positions, {"train": train, "val": val, "test": test}, split)
        name = f"shapes_{label}"
        super().__init__(name, names, splits, preset, image_size, card=load_card("shapes"), **options)


def _draw(
    points: Mapping[str, NDArray[np.int64]],
    image_size: int,
    positions: NDArray[np.int64] | None = None,
    cropped: bool = True,
) -> NDArray[np.uint8]:
    """Draws shapes at the final size, where no preset's crop cuts anything off."""
    return draw(points if positions is None else {key: values[positions] for key, values in points.items()}, image_size)


def latents(count: int, seed: int) -> dict[str, NDArray[np.int64]]:
    """Draws points of the grid whose images all differ.

    Args:
        count: Number of points, at most 50,000.
        seed: Seed of the draw.

    Returns:
        ``shape`` in 0..2 (:data:`SHAPES`), ``scale`` in 0..5, ``orientation`` in 0..39 (steps of 9°), ``x`` and
        ``y`` in 0..31, each int64 (count,).
    """
    sides = tuple(_GRID.values())
    points = np.stack(np.unravel_index(np.random.default_rng(seed).permutation(math.prod(sides))[: 2 * count], sides))
    images = points.copy()
    images[2] %= _PERIODS[images[0]]
    first = np.sort(np.unique(images, axis=1, return_index=True)[1])[:count]
    return {name: values[first].astype(np.int64) for name, values in zip(_GRID, points, strict=True)}


def draw(points: Latents, image_size: int) -> NDArray[np.uint8]:
    """Draws the shapes.

    Args:
        points: As from :func:`latents`, N of each.
        image_size: Side in pixels.

    Returns:
        uint8 (N, 3, image_size, image_size), the three channels equal.
    """
    names = list(_GRID)
    table = zip(*(points[name].tolist() for name in names), strict=True)
    grey = np.stack([_draw_one(**dict(zip(names, row, strict=True)), image_size=image_size) for row in table])
    return np.repeat(grey[:, None], 3, axis=1)


def _draw_one(shape: int, scale: int, orientation: int, x: int, y: int, image_size: int) -> NDArray[np.uint8]:
    """Draws one shape four times too large and averages, uint8 (image_size, image_size)."""
    side = image_size * _OVERSAMPLING
    radius = side * 0.16 * (0.5 + 0.1 * scale)
    angle = 2 * math.pi * orientation / _GRID["orientation"]
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    # The centre runs over the middle 60 % of the image: the largest shape still fits in any orientation.
    centre = side * (0.2 + 0.6 * np.array([x, y]) / (_GRID["x"] - 1))
    outline = radius * _outline(SHAPES[shape]) @ turn + centre
    canvas = Image.new("L", (side, side))
    ImageDraw.Draw(canvas).polygon([(float(px), float(py)) for px, py in outline], fill=255)
    return np.asarray(canvas.reduce(_OVERSAMPLING))


def _outline(shape: str) -> NDArray[np.float64]:
    """Returns the outline (V, 2) of a shape within the unit circle, y pointing down."""
    if shape == "square":
        return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * math.sqrt(0.5)
    t = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    if shape == "ellipse":
        return np.stack([np.cos(t), 0.5 * np.sin(t)], axis=1)
    heart_x = 16 * np.sin(t) ** 3
    heart_y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([heart_x, heart_y], axis=1) / 17.1
