"""White shapes on black on the latent grid of dSprites (Matthey et al. 2017), redrawn with antialiasing."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SHAPES = ("square", "ellipse", "heart")
_GRID = {"shape": 3, "scale": 6, "orientation": 40, "x": 32, "y": 32}
_PERIODS = np.array([10, 20, 40])  # orientations after which a square, an ellipse, a heart looks the same
_OVERSAMPLING = 4
Latents = Mapping[str, NDArray[np.int64]]


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
