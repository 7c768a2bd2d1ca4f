"""Nineteen image corruptions at five severities, for test sets under shift.

The kinds of Hendrycks & Dietterich (ICLR 2019, arXiv:1903.12261, section 3 and appendix B), made on the fly with the
parameters of :data:`PARAMETERS`, which are ours: numbers are not comparable with those on the published image files.
Lengths are shares of the image's shorter side, so that a severity means about the same at 64 and at 224 pixels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpt.data.transforms import import_albumentations
from vpt.errors import ConfigError, UnknownNameError

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


SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST = 8
"""Least side in pixels: in less, blocks, clouds and crystals have no room."""

#: Parameter of each corruption at severities 1 to 5.
PARAMETERS: dict[str, tuple[float, float, float, float, float]] = {
    "gaussian_noise": (0.04, 0.08, 0.12, 0.18, 0.26),  # standard deviation, in units of full scale
    "gaussian_blur": (0.006, 0.010, 0.016, 0.024, 0.036),  # standard deviation, as a share of the shorter side
    "contrast": (0.6, 0.45, 0.3, 0.2, 0.1),  # distance to the mean grey level that remains
    "jpeg_compression": (35, 22, 14, 9, 5),  # JPEG quality
    # Side of the reduced image, as a share of the side; blocks of uneven width (0.6, 0.3) distort more than larger.
    "pixelate": (0.5, 0.4, 0.25, 0.2, 0.15),
    "shot_noise": (0.01, 0.025, 0.05, 0.1, 0.2),  # reciprocal of the photons that full scale stands for
    "impulse_noise": (0.02, 0.05, 0.09, 0.16, 0.26),  # share of the samples that become 0 or 255
    "defocus_blur": (0.010, 0.016, 0.024, 0.034, 0.046),  # radius of the disc
    "glass_blur": (0.012, 0.024, 0.040, 0.055, 0.072),  # farthest exchange of pixels
    "motion_blur": (0.03, 0.06, 0.10, 0.15, 0.22),  # length of the stroke
    "zoom_blur": (1.08, 1.14, 1.20, 1.28, 1.38),  # largest magnification
    "snow": (0.02, 0.04, 0.065, 0.10, 0.15),  # share of the image under small flakes; half of it under large ones
    "frost": (0.35, 0.5, 0.62, 0.74, 0.86),  # opacity of the ice, which spreads with it; procedural
    "fog": (0.3, 0.45, 0.6, 0.72, 0.84),  # opacity where it is thickest
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),  # added to the value of HSV, in units of full scale
    "elastic_transform": (0.005, 0.009, 0.014, 0.020, 0.028),  # standard deviation of the displacement
    "speckle_noise": (0.12, 0.2, 0.3, 0.42, 0.6),  # standard deviation of the noise that multiplies
    "spatter": (2.0, 1.6, 1.2, 0.8, 0.4),  # height from which smooth noise is a drop, in standard deviations
    "saturate": (1.6, 2.4, 3.6, 6.0, 12.0),  # factor on the distance to grey
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


def corrupt(image: NDArray[np.uint8], kind: str, severity: int, name: str) -> NDArray[np.uint8]:
    """Corrupts one image; a pure function of its arguments, whatever was corrupted before.

    Args:
        image: uint8 (H, W, 3), both sides at least :data:`SMALLEST`.
        kind: One of :data:`CORRUPTIONS`.
        severity: 1 (weak) to 5 (strong).
        name: The image's own, such as its path in the list; seeds the noise, in any part or order of the list.

    Returns:
        uint8 (H, W, 3).

    Raises:
        UnknownNameError: There is no such corruption.
        ConfigError: There is no such severity, or the image is too small.
    """
    if kind not in PARAMETERS:
        raise UnknownNameError("corruption", kind, CORRUPTIONS)
    if severity not in SEVERITIES:
        raise ConfigError(f"Corruption severity is {severity}; it must be one of 1, 2, 3, 4, 5.")
    if min(image.shape[:2]) < SMALLEST:
        height, width = image.shape[:2]
        raise ConfigError(
            f"Corruptions need images of at least {SMALLEST}×{SMALLEST} pixels, not {width}×{height}: raise image_size."
        )
    seed = _seed(kind, severity, name)
    parameter = PARAMETERS[kind][severity - 1]
    if kind in EFFECTS:
        changed = EFFECTS[kind](image.astype(np.float32), parameter, np.random.default_rng(seed))
        rounded: NDArray[np.uint8] = np.rint(changed.clip(0, 255)).astype(np.uint8)
        return rounded
    transform = _transform(kind, parameter, min(image.shape[:2]))
    # A Compose gives other pixels on its second call, so each image gets its own.
    corrupted: NDArray[np.uint8] = import_albumentations().Compose([transform], seed=seed)(image=image)["image"]
    return corrupted


def _seed(kind: str, severity: int, name: str) -> int:
    """Hashes what the noise depends on to 32 bits."""
    key = f"{kind} {severity} {name}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "big")


def _transform(kind: str, parameter: float, side: int) -> Any:
    """Returns the albumentations transform of a kind, applied with certainty."""
    A = import_albumentations()  # noqa: N806
    import cv2

    exactly = (parameter, parameter)
    length = parameter * side
    match kind:
        case "gaussian_noise":
            return A.GaussNoise(std_range=exactly, p=1)
        case "shot_noise":
            return A.ShotNoise(scale_range=exactly, p=1)
        case "gaussian_blur":
            return A.GaussianBlur(sigma_limit=(length, length), blur_limit=0, p=1)  # 0: the kernel follows sigma
        case "glass_blur":
            return A.GlassBlur(sigma=0.004 * side, max_delta=max(1, round(length)), iterations=1, mode="fast", p=1)
        case "motion_blur":
            stroke = max(3, 2 * round(length / 2) + 1)  # odd
            return A.MotionBlur((stroke, stroke), False, angle_range=(0, 180), direction_range=(0, 0), p=1)
        case "zoom_blur":
            return A.ZoomBlur(max_factor=exactly, step_factor=(0.02, 0.02), p=1)
        case "brightness":
            added = (255 * parameter, 255 * parameter)
            return A.HueSaturationValue(hue_shift_limit=(0, 0), sat_shift_limit=(0, 0), val_shift_limit=added, p=1)
        case "contrast":
            same = (1, 1)
            return A.ColorJitter(contrast=exactly, brightness=same, saturation=same, hue=(0, 0), p=1)
        case "elastic_transform":
            sigma = max(1.0, 0.04 * side)
            # Uniform noise has deviation 1/√3, of which smoothing leaves the 2√π σ-th part.
            alpha = length * math.sqrt(3) * 2 * math.sqrt(math.pi) * sigma
            edge = cv2.BORDER_REFLECT_101
            return A.ElasticTransform(alpha, sigma, noise_distribution="uniform", border_mode=edge, p=1)
        case "jpeg_compression":
            return A.ImageCompression(quality_range=(int(parameter), int(parameter)), p=1)
        case "pixelate":
            blocks = {"downscale": cv2.INTER_AREA, "upscale": cv2.INTER_NEAREST}
            return A.Downscale(scale_range=exactly, interpolation_pair=blocks, p=1)
        case _:  # spatter
            sigma, smoothed = max(1.0, 0.018 * side), 0.02  # the latter is the deviation after smoothing by sigma
            drawn, height = smoothed * 2 * math.sqrt(math.pi) * sigma, 0.65 + smoothed * parameter
            return A.Spatter((0.65, 0.65), (drawn, drawn), (sigma, sigma), (height, height), (0.6, 0.6), p=1)
