"""The corruptions that albumentations lacks, or has in another sense: per-sample noise, saturation and the weather.

Each takes a float32 image (H, W, 3) from 0 to 255, its parameter in :data:`vpt.data.corruptions.PARAMETERS` and the
generator of all its randomness. What it returns has the same shape and may leave that range.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]
Effect = Callable[[Image, float, np.random.Generator], Image]

_ICE = np.array([196, 214, 232], dtype=np.float32)
_FOG = 224.0


def impulse(image: Image, share: float, random: np.random.Generator) -> Image:
    """Sets samples to 0 or 255, each channel for itself (albumentations' SaltAndPepper takes whole pixels)."""
    chance = random.random(image.shape, dtype=np.float32)
    return np.where(chance < share / 2, 0, np.where(chance < share, 255, image)).astype(np.float32)


def speckle(image: Image, deviation: float, random: np.random.Generator) -> Image:
    """Adds noise in proportion to the sample."""
    return image * (1 + deviation * random.standard_normal(image.shape, dtype=np.float32))


def saturate(image: Image, factor: float, random: np.random.Generator) -> Image:
    """Moves colours away from their grey level; a grey image stays as it is."""
    grey = _grey(image)
    return grey + factor * (image - grey)


def defocus(image: Image, share: float, random: np.random.Generator) -> Image:
    """Averages over a disc; its radius need not be a whole number (albumentations' Defocus shifts the brightness)."""
    import cv2

    radius = share * min(image.shape[:2])
    reach = int(np.ceil(radius + 0.5))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = np.clip(radius + 0.5 - np.hypot(x, y), 0, 1).astype(np.float32)
    blurred: Image = cv2.filter2D(image, -1, disc / disc.sum(), borderType=cv2.BORDER_REFLECT_101)
    return blurred


def fog(image: Image, opacity: float, random: np.random.Generator) -> Image:
    """Lays a white of uneven thickness over the image."""
    veil = opacity * (0.45 + 0.55 * _cloud(image.shape[:2], random))[..., None]
    return image + veil * (_FOG - image)


def snow(image: Image, share: float, random: np.random.Generator) -> Image:
    """Bleaches the image and lets flakes of two sizes drift over it, all in one direction."""
    height, width = image.shape[:2]
    side, direction = min(height, width), random.uniform(40, 140)
    far = _flakes((height, width), 0.010 * side, share, 0.02 * side, direction, random)
    near = _flakes((height, width), 0.024 * side, share / 2, 0.035 * side, direction, random)
    white = np.maximum(0.8 * far, near)[..., None]
    bleached: Image = image + min(0.6, 3 * share) * (np.maximum(image, 0.5 * _grey(image) + 128) - image)
    covered: Image = bleached + white * (255 - bleached)
    return covered


def frost(image: Image, opacity: float, random: np.random.Generator) -> Image:
    """Lays ice over the image, thickest at its edges: feathers on a milky layer. Procedural, no photograph of ice."""
    shape = image.shape[:2]
    y, x = np.abs(np.linspace(-1, 1, shape[0]))[:, None], np.abs(np.linspace(-1, 1, shape[1]))[None]
    layer = 0.9 * _cloud(shape, random) + 0.7 * np.maximum(y, x) ** 2
    covered = np.clip((layer - 0.97 + 0.75 * opacity) / 0.35, 0, 1)
    ice = opacity * covered * (0.55 + 0.45 * _feathers(shape, random))
    return (image + ice.astype(np.float32)[..., None] * (_ICE - image)).astype(np.float32)


def _grey(image: Image) -> Image:
    grey: Image = image @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    return grey[..., None]


def _cloud(shape: tuple[int, int], random: np.random.Generator) -> Image:
    """Draws smooth noise in which each octave has half the height of the one before; (H, W) from 0 to 1."""
    import cv2

    cloud = np.zeros(shape, dtype=np.float32)
    for octave in range(1, 7):
        grid = random.random((2**octave + 1, 2**octave + 1), dtype=np.float32)
        cloud += cv2.resize(grid, shape[::-1], interpolation=cv2.INTER_CUBIC) / 2**octave
    low, high = float(cloud.min()), float(cloud.max())
    return (cloud - low) / (high - low)


def _stroke(length: float, degrees: float) -> Image:
    """Draws a straight line through the centre of a square, as a kernel whose sum is 1."""
    import cv2

    half = max(1, round(length / 2))
    kernel = np.zeros((2 * half + 1, 2 * half + 1), dtype=np.float32)
    dx, dy = half * np.cos(np.deg2rad(degrees)), half * np.sin(np.deg2rad(degrees))
    ends = [(round(half + sign * dx), round(half + sign * dy)) for sign in (-1, 1)]
    cv2.line(kernel, ends[0], ends[1], 1.0)
    return kernel / np.float32(kernel.sum())


def _flakes(
    shape: tuple[int, int], size: float, share: float, streak: float, degrees: float, random: np.random.Generator
) -> Image:
    """Draws dots of random brightness that drift along a direction; (H, W) from 0 to 1."""
    import cv2

    size = max(1.0, size)
    cells = (max(1, round(shape[0] / size)), max(1, round(shape[1] / size)))
    dots = np.where(random.random(cells) < share, random.uniform(0.4, 1, cells), 0).astype(np.float32)
    dots = cv2.resize(dots, shape[::-1], interpolation=cv2.INTER_CUBIC)
    drifting: Image = cv2.filter2D(dots, -1, _stroke(streak, degrees), borderType=cv2.BORDER_REFLECT)
    return (2.5 * drifting).clip(0, 1)


def _feathers(shape: tuple[int, int], random: np.random.Generator) -> Image:
    """Draws crystals as ridges of noise that is drawn out along a direction which varies; (H, W) from 0 to 1."""
    import cv2

    height, width = shape
    side = min(shape)
    warp = 0.25 * side
    y, x = np.mgrid[:height, :width].astype(np.float32)
    map_x = x + warp * (_cloud(shape, random) - 0.5)
    map_y = y + warp * (_cloud(shape, random) - 0.5)
    feathers = np.zeros(shape, dtype=np.float32)
    for degrees in (25, 85, 145):
        grain = random.standard_normal(shape, dtype=np.float32)
        stroke = _stroke(0.12 * side, degrees + random.uniform(-20, 20))
        drawn = cv2.filter2D(grain, -1, stroke, borderType=cv2.BORDER_REFLECT)
        drawn = cv2.remap(drawn, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        feathers = np.maximum(feathers, drawn / drawn.std())
    return (feathers / 2.5).clip(0, 1)


EFFECTS: dict[str, Effect] = {
    "impulse_noise": impulse,
    "defocus_blur": defocus,
    "speckle_noise": speckle,
    "saturate": saturate,
    "snow": snow,
    "frost": frost,
    "fog": fog,
}
