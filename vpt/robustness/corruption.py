"""Corruption error of ImageNet-C, in units of AlexNet's (Hendrycks & Dietterich, ICLR 2019, section 4.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum
from statistics import fmean

from vpt.errors import ConfigError, UnknownNameError

ALEXNET: dict[str, float] = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""AlexNet's error on ImageNet-C, the mean of five severities over 50,000 images of 1000 classes. Source: the AugMix
reference code (Hendrycks et al., ICLR 2020). Keyed by name: a list is silently wrong once the names are reordered."""

_SEVERITIES = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class CorruptionError:
    """What corruption costs.

    Attributes:
        relative: CE of each corruption, in percent of AlexNet's error.
        mce: Their mean; 100 is AlexNet.
        error: The unnormalised mean error in percent, which some papers print under the same name.
    """

    relative: Mapping[str, float]
    mce: float
    error: float


def corruption_error(errors: Mapping[str, Mapping[int, float]]) -> CorruptionError:
    """Normalises top-1 errors on ImageNet-C.

    AlexNet's errors belong to the published ImageNet-C images. This package's own corruptions share some of the names
    but not the pixels, so their errors are not to be normalised by these.

    Args:
        errors: Error in [0, 1] of each of the 15 corruptions at severities 1 to 5.

    Returns:
        Relative errors in the order of `ALEXNET`, and both means.

    Raises:
        UnknownNameError: A corruption is not one of the 15.
        ConfigError: A corruption or a severity is missing, or an error is not a share.
    """
    for kind in errors:
        if kind not in ALEXNET:
            raise UnknownNameError("corruption of ImageNet-C", kind, ALEXNET)
    missing = [kind for kind in ALEXNET if kind not in errors]
    if missing:
        raise ConfigError(f"mCE is the mean over all 15 corruptions: evaluate {', '.join(missing)} as well.")
    for kind, by_severity in errors.items():
        if sorted(by_severity) != list(_SEVERITIES):
            raise ConfigError(f"{kind} has severities {sorted(by_severity)}: CE is the mean over 1, 2, 3, 4, 5.")
        if not all(0 <= error <= 1 for error in by_severity.values()):
            raise ConfigError(f"Errors on {kind} are shares between 0 and 1, got {list(by_severity.values())}.")
    sums = {kind: fsum(errors[kind].values()) for kind in ALEXNET}
    relative = {kind: 100 * (total / (len(_SEVERITIES) * ALEXNET[kind])) for kind, total in sums.items()}
    return CorruptionError(relative, fmean(relative.values()), 100 * fmean(sums.values()) / len(_SEVERITIES))
