"""Nineteen image corruptions at five severities, for test sets under shift.

The kinds of ImageNet-C (Hendrycks & Dietterich, ICLR 2019, arXiv:1903.12261, section 3 and appendix B), made on the fly
with its published parameters; `elastic_transform` as in the package ``imagecorruptions``, without the original's affine
part. Frost has the published shares of image and ice, but its ice is drawn: :func:`title` says so.

The parameters were made for 224 pixels. At other sizes lengths (blurs, exchanges, displacements) grow with the shorter
side, and what is overlaid on an image (fog, snow, frost, spatter) is made as for 224 pixels and resized. Noise is drawn
for each sample, pixelate keeps a share of the rows, and JPEG has blocks of 8 x 8 at any size.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from vpt.errors import ConfigError, UnknownNameError
from vpt.image_size import sides

Image = NDArray[Any]
"""Floats, (H, W, 3) from 0 to 1; (H, W) of what is overlaid on an image."""
Random = np.random.Generator

_NATIVE = 224
_WATER, _MUD = np.array([175, 238, 238]) / 255, np.array([63, 42, 20]) / 255
_ICE = np.array([146, 166, 179]) / 255


def impulse_noise(image: Image, random: Random, scale: float, share: float) -> Image:
    """Sets samples to 0 or 1, each channel for itself (albumentations' SaltAndPepper takes whole pixels)."""
    hit, white = random.random(image.shape) <= share, random.random(image.shape) <= 0.5
    return np.where(hit, white, image)


def defocus_blur(image: Image, random: Random, scale: float, radius: int, soft: float) -> Image:
    """Averages over a disc (albumentations' Defocus shifts the brightness)."""
    import cv2

    reach = max(8, radius)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = (x**2 + y**2 <= radius**2).astype(np.float64)
    disc = cv2.GaussianBlur(disc / disc.sum(), (3, 3) if radius <= 8 else (5, 5), soft)
    side = 2 * round(reach * scale) + 1
    kernel = _resized(disc, (side, side))
    return np.asarray(cv2.filter2D(image, -1, kernel * (disc.sum() / kernel.sum())))


def glass_blur(image: Image, random: Random, scale: float, deviation: float, reach: int, times: int) -> Image:
    """Blurs, lets pixels take the value of others within a reach, and blurs again."""
    deviation, reach = deviation * scale, max(1, round(reach * scale))
    pixels = np.floor(255 * _blurred(image, deviation)).reshape(-1, 3) / 255
    for _ in range(times):
        pixels = pixels[_exchange(image.shape[0], image.shape[1], reach, random)]
    return _blurred(pixels.reshape(image.shape), deviation)


def _exchange(height: int, width: int, reach: int, random: Random) -> NDArray[np.int64]:
    """Says from which pixel each takes its value.

    The published loop goes from the last pixel to the first and copies a neighbour to each, so that neighbours further
    on in the image have been replaced already. Here such references are followed until none leads on.
    """
    rows, columns = np.arange(height - reach, reach, -1), np.arange(width - reach, reach, -1)
    here = (rows[:, None] * width + columns).ravel()
    across, down = random.integers(-reach, reach, (len(here), 2)).T
    there, pixels = here + down * width + across, height * width
    source = np.arange(2 * pixels)  # of the pixels after the loop, then of those before it
    source[:pixels] += pixels
    source[here] = np.where(there > here, there, there + pixels)
    while (source != (further := source[source])).any():
        source = further
    return source[:pixels] - pixels


def motion_blur(image: Image, random: Random, scale: float, radius: int, deviation: float) -> Image:
    """Smears in a direction."""
    return _smeared(image, max(1, round(radius * scale)), deviation * scale, random.uniform(-45, 45))


def zoom_blur(image: Image, random: Random, scale: float, stop: float, step: float) -> Image:
    """Averages over enlargements."""
    height, width = image.shape[:2]
    factors = np.arange(1, stop, step)
    layers = [image, *(_enlarged(image, factor)[:height, :width] for factor in factors)]
    return np.asarray(np.mean(layers, axis=0))


def snow(image: Image, random: Random, scale: float, *parameter: Any) -> Image:
    """Bleaches the image and lets flakes drift over it, all in one direction."""
    mean, deviation, zoom, least, radius, blur, kept = parameter
    height, width = _native(image, scale)
    flakes = _enlarged(random.normal(mean, deviation, (height, width)), zoom)
    flakes = np.where(flakes < least, 0, flakes.clip(0, 1))
    flakes = np.rint(255 * _smeared(flakes, radius, blur, random.uniform(-135, -45)))[:height, :width] / 255
    cover = _resized(flakes + np.rot90(flakes, 2), image.shape)[..., None]
    grey = (image @ [0.299, 0.587, 0.114])[..., None]
    return np.asarray(kept * image + (1 - kept) * np.maximum(image, 1.5 * grey + 0.5) + cover)


def frost(image: Image, random: Random, scale: float, kept: float, share: float) -> Image:
    """Lays ice over the image, feathers on a milky layer about as bright and as uneven as the published photographs."""
    shape = _native(image, scale)
    directions = (degrees + random.uniform(-20, 20) for degrees in (25, 85, 145))
    feathers = np.max([_smeared(random.normal(size=shape), 7, 12, degrees) for degrees in directions], axis=0)
    layers = (_cloud(shape, 1.4, random), feathers)
    uneven = sum(0.08 * (layer - layer.mean()) / layer.std() for layer in layers)
    ice = random.uniform(0.7, 1.3) * _ICE + _resized(np.asarray(uneven), image.shape)[..., None]
    return np.asarray(kept * image + share * ice.clip(0, 1))


def fog(image: Image, random: Random, scale: float, thickness: float, decay: float) -> Image:
    """Lays a white of uneven thickness over the image, and brings both back to the image's brightest value."""
    veil = thickness * _resized(_cloud(_native(image, scale), decay, random), image.shape)
    return np.asarray((image + veil[..., None]) * image.max() / (image.max() + thickness))


def _cloud(shape: tuple[int, int], decay: float, random: Random) -> Image:
    """Draws a fractal landscape by the midpoints of squares and diamonds; a corner of it, from 0 to 1."""
    side = 1 << math.ceil(math.log2(max(shape)))
    heights, step, rough = np.zeros((side, side)), side, 1e4
    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        right, below = corners + np.roll(corners, -1, 1), corners + np.roll(corners, -1, 0)
        centres = _displaced(below + np.roll(below, -1, 1), rough, random)
        heights[half::step, half::step] = centres
        heights[::step, half::step] = _displaced(centres + np.roll(centres, 1, 0) + right, rough, random)
        heights[half::step, ::step] = _displaced(centres + np.roll(centres, 1, 1) + below, rough, random)
        step, rough = half, rough / decay**2
    heights -= heights.min()
    return np.asarray(heights / heights.max())[: shape[0], : shape[1]]


def _displaced(four: Image, rough: float, random: Random) -> Image:
    return four / 4 + random.uniform(-rough, rough, four.shape)


def elastic_transform(image: Image, random: Random, scale: float, strength: float) -> Image:
    """Displaces pixels by smooth noise."""
    import cv2

    shape, most, deviation = _native(image, scale), 0.005 * _NATIVE, 0.01 * _NATIVE
    noise = [_blurred(random.uniform(-most, most, shape), deviation, 3, cv2.BORDER_REFLECT) for _ in "xy"]
    x, y = (strength * scale * _resized(part, image.shape) for part in noise)
    rows, columns = np.indices(image.shape[:2])
    places = (columns + x).astype(np.float32), (rows + y).astype(np.float32)
    return np.asarray(cv2.remap(image, *places, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT))


def spatter(image: Image, random: Random, scale: float, *parameter: Any) -> Image:
    """Splashes water or mud on the image."""
    mean, deviation, blur, least, strength, mud = parameter
    layer = _blurred(random.normal(mean, deviation, _native(image, scale)), blur)
    layer[layer < least] = 0
    if mud:
        cover = _blurred((layer > least).astype(np.float64), strength)
        cover = _resized(np.where(cover < 0.8, 0, cover), image.shape)[..., None]
        return np.asarray(image * (1 - cover) + cover * _MUD)
    cover = _resized(strength * _drops((255 * layer).astype(np.uint8)), image.shape)[..., None]
    return np.asarray(image + cover * _WATER)


def _drops(layer: NDArray[np.uint8]) -> Image:
    """Gives drops a relief by their distance to outlines; (H, W) from 0 to 1."""
    import cv2

    distance = cv2.distanceTransform(255 - cv2.Canny(layer, 50, 150), cv2.DIST_L2, 5).clip(0, 20)
    relief = cv2.equalizeHist(cv2.blur(distance, (3, 3)).astype(np.uint8))
    relief = cv2.filter2D(relief, cv2.CV_8U, np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]))
    drops = layer * cv2.blur(relief, (3, 3)).astype(np.float64)
    return np.asarray(drops / max(drops.max(), 1))


def jpeg_compression(image: Image, random: Random, scale: float, quality: int) -> Image:
    """Writes and reads a JPEG."""
    file = io.BytesIO()
    _picture(image).save(file, "JPEG", quality=quality)
    return np.asarray(Pillow.open(file)) / 255


def pixelate(image: Image, random: Random, scale: float, share: float) -> Image:
    """Keeps a share of the rows and columns."""
    height, width = image.shape[:2]
    small = _picture(image).resize((int(width * share), int(height * share)), Pillow.Resampling.BOX)
    return np.asarray(small.resize((width, height), Pillow.Resampling.NEAREST)) / 255


def _picture(image: Image) -> Pillow.Image:
    return Pillow.fromarray(np.rint(255 * image).astype(np.uint8))


def _hsv(image: Image, channel: int, factor: float, added: float) -> Image:
    """Multiplies saturation (1) or value (2) and adds to it, within 0 and 1."""
    import cv2

    hsv = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2HSV)
    hsv[..., channel] = (factor * hsv[..., channel] + added).clip(0, 1)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


def _native(image: Image, scale: float) -> tuple[int, int]:
    """Height and width of the image if its shorter side were 224."""
    return round(image.shape[0] / scale), round(image.shape[1] / scale)


def _resized(layer: Image, shape: tuple[int, ...]) -> Image:
    import cv2

    how = cv2.INTER_AREA if shape[0] < layer.shape[0] else cv2.INTER_LINEAR
    return layer if layer.shape == shape[:2] else np.asarray(cv2.resize(layer, shape[1::-1], interpolation=how))


def _blurred(image: Image, deviation: float, truncate: float = 4, border: int = 1) -> Image:
    """Blurs with a Gaussian that ends after so many deviations; OpenCV's border 1 repeats the last row."""
    import cv2

    side = 2 * int(truncate * deviation + 0.5) + 1
    return np.asarray(cv2.GaussianBlur(image, (side, side), deviation, borderType=border))


def _smeared(image: Image, radius: int, deviation: float, degrees: float) -> Image:
    """Averages along a stroke that begins at each pixel, weighted with half a Gaussian."""
    import cv2

    steps, angle = np.arange(2 * radius + 1), math.radians(degrees)
    x, y = (np.ceil(steps * part - 0.5).astype(int) for part in (math.cos(angle), math.sin(angle)))
    weights = np.exp(-((steps / deviation) ** 2) / 2)
    kernel = np.zeros((4 * radius + 1, 4 * radius + 1))
    np.add.at(kernel, (2 * radius + y, 2 * radius + x), weights / weights.sum())
    return np.asarray(cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REPLICATE))


def _enlarged(image: Image, factor: float) -> Image:
    """Enlarges the centre to the image's size or some pixels more; corners stay corners, as in scipy.ndimage.zoom."""
    import cv2

    old = [math.ceil(side / factor) for side in image.shape[:2]]
    new = [round(side * factor) for side in old]
    down, across = ((before - 1) / max(1, after - 1) for before, after in zip(old, new, strict=True))
    top, left = ((side - part) // 2 for side, part in zip(image.shape, old, strict=False))
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(image, np.array([[across, 0, left], [0, down, top]]), new[::-1], flags=how))


#: What makes each kind, called with the image, a generator, the shorter side / 224, and the parameters of a severity.
EFFECTS: dict[str, Callable[..., Image]] = {
    **{each.__name__: each for each in (impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, snow, frost)},
    **{each.__name__: each for each in (fog, elastic_transform, pixelate, jpeg_compression, spatter)},
    "gaussian_noise": lambda image, random, _, deviation: image + random.normal(scale=deviation, size=image.shape),
    "shot_noise": lambda image, random, _, photons: random.poisson(image * photons) / photons,
    "brightness": lambda image, random, _, added: _hsv(image, 2, 1, added),
    "contrast": lambda image, random, _, factor: image.mean((0, 1)) + factor * (image - image.mean((0, 1))),
    "speckle_noise": lambda image, random, _, deviation: image * (1 + random.normal(scale=deviation, size=image.shape)),
    "gaussian_blur": lambda image, random, scale, deviation: _blurred(image, deviation * scale),
    "saturate": lambda image, random, _, factor, added: _hsv(image, 1, factor, added),
}

SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST = 8
"""Least side in pixels: in less, blocks, clouds and crystals have no room."""
PUBLISHED = "imagenet-c"
"""What the parameters are, as records say it; version 0.1 had its own and said nothing."""

#: Parameters of each kind at severities 1 to 5; lengths in pixels of an image whose shorter side is 224.
PARAMETERS: dict[str, tuple[tuple[float, ...], ...]] = {
    "gaussian_noise": ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,)),  # standard deviation, in units of full scale
    "shot_noise": ((60,), (25,), (12,), (5,), (3,)),  # photons that full scale stands for
    "impulse_noise": ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,)),  # share of the samples that become 0 or 1
    # radius of the disc, standard deviation that softens its edge
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    # standard deviation of both blurs, reach, passes
    "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),  # half the length of the stroke, standard deviation
    # end of the magnifications from 1 on, step
    "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    # mean and deviation of noise, its enlargement, least flake, half stroke and its deviation, share of the image kept
    "snow": (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    "frost": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),  # factors of image and ice
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),  # thickness, decay of roughness
    "brightness": ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,)),  # added to the value of HSV
    "contrast": ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,)),  # factor on the distance to the mean colour
    "elastic_transform": ((12.5,), (16.25,), (21.25,), (25,), (30,)),  # factor on smooth noise
    "pixelate": ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,)),  # share of the rows that are kept
    "jpeg_compression": ((25,), (18,), (15,), (10,), (7,)),  # JPEG quality
    "speckle_noise": ((0.15,), (0.2,), (0.35,), (0.45,), (0.6,)),  # standard deviation of the noise that multiplies
    "gaussian_blur": ((1,), (2,), (3,), (4,), (6,)),  # standard deviation
    # mean and deviation of noise, its blur, least drop, strength of water or blur of mud, whether it is mud
    "spatter": (
        (0.65, 0.3, 4, 0.69, 0.6, 0),
        (0.65, 0.3, 3, 0.68, 0.6, 0),
        (0.65, 0.3, 2, 0.68, 0.5, 0),
        (0.65, 0.3, 1, 0.65, 1.5, 1),
        (0.67, 0.4, 1, 0.65, 1.5, 1),
    ),
    # factor on the saturation of HSV, added to it: less colour at 1 and 2, more at 3 to 5
    "saturate": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
}
#: The kinds by the paper's groups, in its order and that of ImageNet-C; ``extra`` is its validation set.
GROUPS: dict[str, tuple[str, ...]] = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),
}
CORRUPTIONS: tuple[str, ...] = tuple(kind for kinds in GROUPS.values() for kind in kinds)
#: One or two of each group but the weather: what an evaluation uses unless it is told otherwise.
BASIC: tuple[str, ...] = ("gaussian_noise", "gaussian_blur", "contrast", "jpeg_compression", "pixelate")


def title(kind: str) -> str:
    """Names a corruption wherever a number of it is shown; frost is marked, as the published ice may not be shipped."""
    return f"{kind} (procedural)" if kind == "frost" else kind


def can_corrupt(data: Any) -> bool:
    """Whether the images of a data module can be corrupted: colours of 8 bits, no smaller than `SMALLEST`."""
    return data.preset.channels is None and min(sides(data.image_size)) >= SMALLEST


def corrupt(image: NDArray[np.uint8], kind: str, severity: int, name: str) -> NDArray[np.uint8]:
    """Corrupts one image; a pure function of its arguments, whatever was corrupted before.

    Args:
        image: uint8 (H, W, 3), both sides at least :data:`SMALLEST`.
        kind: One of :data:`CORRUPTIONS`.
        severity: 1 (weak) to 5 (strong).
        name: The image's own, such as its path in the list; seeds the noise, in any part or order of the list.

    Returns:
        uint8 (H, W, 3); fractions are cut off, as in the published images.

    Raises:
        UnknownNameError: There is no such corruption.
        ConfigError: There is no such severity, or the image is too small.
    """
    if kind not in PARAMETERS:
        raise UnknownNameError("corruption", kind, CORRUPTIONS)
    if severity not in SEVERITIES:
        raise ConfigError(f"Corruption severity is {severity}; it must be one of 1, 2, 3, 4, 5.")
    height, width = image.shape[:2]
    if min(height, width) < SMALLEST:
        raise ConfigError(
            f"Corruptions need images of at least {SMALLEST}×{SMALLEST} pixels, not {width}×{height}: raise image_size."
        )
    random = np.random.default_rng(_seed(kind, severity, name))
    changed = EFFECTS[kind](image / 255, random, min(height, width) / _NATIVE, *PARAMETERS[kind][severity - 1])
    # What float arithmetic loses of a whole number must not cost the number.
    return np.asarray((255 * changed.clip(0, 1) + 1e-4).astype(np.uint8))


def _seed(kind: str, severity: int, name: str) -> int:
    key = f"{kind} {severity} {name}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "big")
