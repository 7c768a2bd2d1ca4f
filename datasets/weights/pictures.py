"""Generated pictures: seeded shapes, gratings and noise, to widen what 2,000 photographs can teach."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIZE = 224
Pixels = NDArray[np.uint8]


def generate(rng: np.random.Generator, photo: Image.Image) -> Image.Image:
    """Draws one picture of a random kind.

    Args:
        rng: Source of all randomness.
        photo: A training image, pasted into one picture in three.

    Returns:
        RGB, 224 × 224 pixels.
    """
    ground = Image.fromarray((_plain, _noise, _grating)[rng.integers(3)](rng))
    kind = rng.integers(3)
    if kind == 0:
        return _paste(rng, ground, photo)
    return _shapes(rng, ground, count=1 if kind == 1 else int(rng.integers(5, 60)))


def _plain(rng: np.random.Generator) -> Pixels:
    return np.broadcast_to(rng.integers(0, 256, 3, dtype=np.uint8), (SIZE, SIZE, 3)).copy()


def _noise(rng: np.random.Generator) -> Pixels:
    """Coloured noise with spectrum 1/f^a, a in [0.5, 2.5]: from sand to clouds."""
    frequency = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)[None])
    frequency[0, 0] = 1.0
    spectrum = np.fft.rfft2(rng.standard_normal((3, SIZE, SIZE))) / frequency ** rng.uniform(0.5, 2.5)
    field = np.fft.irfft2(spectrum, s=(SIZE, SIZE))
    field /= field.std(axis=(1, 2), keepdims=True)
    # Random mixing of the channels, since natural textures rarely have three independent colours.
    mixed = np.einsum("ij,jhw->hwi", rng.normal(0, 1, (3, 3)), field)
    return _to_pixels(rng.integers(40, 216, 3) + rng.uniform(15, 60) * mixed)


def _grating(rng: np.random.Generator) -> Pixels:
    """Sine or square waves between two colours, period 6-80 pixels, optionally bent."""
    angle, period = rng.uniform(0, np.pi), np.exp(rng.uniform(np.log(6), np.log(80)))
    y, x = np.mgrid[:SIZE, :SIZE]
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    wave = np.sin(2 * np.pi * (along + rng.uniform(0, 20) * np.sin(across / rng.uniform(10, 60))) / period)
    blend = 0.5 + 0.5 * (np.sign(wave) if rng.random() < 0.5 else wave)
    first, second = rng.integers(0, 256, (2, 3))
    return _to_pixels(first + blend[..., None] * (second - first))


def _to_pixels(values: NDArray[np.float64]) -> Pixels:
    return np.clip(values, 0, 255).astype(np.uint8)


def _shapes(rng: np.random.Generator, ground: Image.Image, count: int) -> Image.Image:
    """Draws ``count`` ellipses and polygons over ``ground``: one large one, or many that hide each other."""
    draw = ImageDraw.Draw(ground)
    for _ in range(count):
        corners = int(rng.integers(2, 9))
        radius = rng.uniform(15, 90) / (1 if count == 1 else 1.5)
        centre, colour = rng.uniform(0, SIZE, 2), tuple(int(v) for v in rng.integers(0, 256, 3))
        if count == 1:
            centre = rng.uniform(50, SIZE - 50, 2)
        stretch, turn = rng.uniform(0.3, 1.0), rng.uniform(0, 2 * np.pi)
        # Two corners stand for an ellipse: a polygon with enough of them to look round.
        angles = np.linspace(0, 2 * np.pi, 48 if corners == 2 else corners, endpoint=False)
        reach = radius * (1.0 if corners == 2 else rng.uniform(0.5, 1.0, len(angles)))
        flat = np.stack([reach * np.cos(angles), stretch * reach * np.sin(angles)])
        spin = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        draw.polygon([(float(x), float(y)) for x, y in (spin @ flat).T + centre], fill=colour)
    return ground


def _paste(rng: np.random.Generator, ground: Image.Image, photo: Image.Image) -> Image.Image:
    """Pastes ``photo`` through an elliptic or square mask at a random place and scale."""
    width, height = (int(v) for v in rng.integers(90, 200, 2))
    mask = Image.new("L", (width, height), 0)
    outline = ImageDraw.Draw(mask)
    (outline.ellipse if rng.random() < 0.5 else outline.rectangle)((0, 0, width - 1, height - 1), fill=255)
    place = (int(rng.integers(0, SIZE - width)), int(rng.integers(0, SIZE - height)))
    ground.paste(photo.resize((width, height), Image.Resampling.BICUBIC), place, mask)
    return ground
