"""Five image corruptions at five severities, for test sets under shift.

In the manner of Hendrycks & Dietterich (ICLR 2019, arXiv:1903.12261), made with albumentations and with parameters of
our own (the table below): numbers are not comparable with ImageNet-C. Lengths are shares of the image's shorter side,
so that a severity means about the same at 64 and at 224 pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpt.data.presets import import_albumentations
from vpt.errors import ConfigError, UnknownNameError

SEVERITIES = (1, 2, 3, 4, 5)

#: Parameter of each corruption at severities 1 to 5.
PARAMETERS: dict[str, tuple[float, float, float, float, float]] = {
    "gaussian_noise": (0.04, 0.08, 0.12, 0.18, 0.26),  # standard deviation, in units of full scale
    "gaussian_blur": (0.006, 0.010, 0.016, 0.024, 0.036),  # standard deviation, as a share of the shorter side
    "contrast": (0.6, 0.45, 0.3, 0.2, 0.1),  # distance to the mean grey level that remains
    "jpeg": (35, 22, 14, 9, 5),  # JPEG quality
    # Side of the reduced image, as a share of the side; blocks of uneven width (0.6, 0.3) distort more than larger.
    "pixelate": (0.5, 0.4, 0.25, 0.2, 0.15),
}
CORRUPTIONS: tuple[str, ...] = tuple(PARAMETERS)


def corrupt(image: NDArray[np.uint8], kind: str, severity: int, index: int) -> NDArray[np.uint8]:
    """Corrupts one image; a pure function of its arguments, whatever was corrupted before.

    Args:
        image: uint8 (H, W, 3).
        kind: One of :data:`CORRUPTIONS`.
        severity: 1 (weak) to 5 (strong).
        index: Position of the image in its list; seeds the noise.

    Returns:
        uint8 (H, W, 3).

    Raises:
        UnknownNameError: There is no such corruption.
        ConfigError: There is no such severity.
    """
    if kind not in PARAMETERS:
        raise UnknownNameError("corruption", kind, CORRUPTIONS)
    if severity not in SEVERITIES:
        raise ConfigError(f"Corruption severity is {severity}; it must be one of 1, 2, 3, 4, 5.")
    seed = int(np.random.SeedSequence([CORRUPTIONS.index(kind), severity, index]).generate_state(1)[0])
    transform = _transform(kind, PARAMETERS[kind][severity - 1], min(image.shape[:2]))
    # A Compose gives other pixels on its second call, so each image gets its own.
    corrupted: NDArray[np.uint8] = import_albumentations().Compose([transform], seed=seed)(image=image)["image"]
    return corrupted


def _transform(kind: str, parameter: float, side: int) -> Any:
    """Returns the albumentations transform of a kind, applied with certainty."""
    A = import_albumentations()  # noqa: N806
    import cv2

    if kind == "gaussian_noise":
        return A.GaussNoise(std_range=(parameter, parameter), p=1)
    if kind == "gaussian_blur":
        sigma = parameter * side
        return A.GaussianBlur(sigma_limit=(sigma, sigma), blur_limit=0, p=1)  # 0: the kernel follows sigma
    if kind == "contrast":
        same = (1, 1)
        return A.ColorJitter(contrast=(parameter, parameter), brightness=same, saturation=same, hue=(0, 0), p=1)
    if kind == "jpeg":
        return A.ImageCompression(quality_range=(int(parameter), int(parameter)), p=1)
    blocks = {"downscale": cv2.INTER_AREA, "upscale": cv2.INTER_NEAREST}
    return A.Downscale(scale_range=(parameter, parameter), interpolation_pair=blocks, p=1)
