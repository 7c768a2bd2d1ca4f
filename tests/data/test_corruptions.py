from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from vpt.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from vpt.data.demo import DigitsDataModule
from vpt.errors import ConfigError, UnknownNameError


@pytest.fixture(scope="module")
def digits() -> list[NDArray[np.uint8]]:
    split = DigitsDataModule().split("test")
    return [np.ascontiguousarray(split.images[index].transpose(1, 2, 0)) for index in range(6)]


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_pixels_do_not_depend_on_order_or_on_what_came_before(kind: str, digits: list[NDArray[np.uint8]]) -> None:
    keys = [(index, severity) for index in range(len(digits)) for severity in SEVERITIES]
    forwards = {key: corrupt(digits[key[0]], kind, key[1], key[0]) for key in keys}
    for key in reversed(keys):
        np.testing.assert_array_equal(corrupt(digits[key[0]], kind, key[1], key[0]), forwards[key])


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("size", [None, (80, 100)])
def test_severity_increases_the_distance(
    kind: str, size: tuple[int, int] | None, digits: list[NDArray[np.uint8]]
) -> None:
    images = digits
    if size is not None:  # not square, and textured
        images = [np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8) for index in range(3)]
    distances = [
        np.mean([np.square(corrupt(image, kind, severity, 0).astype(float) - image).mean() for image in images])
        for severity in SEVERITIES
    ]
    assert distances[0] > 0
    assert all(weaker < stronger for weaker, stronger in pairwise(distances))


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_shape_and_type_are_kept_and_the_input_untouched(kind: str, digits: list[NDArray[np.uint8]]) -> None:
    image = digits[0][:50].copy()
    before = image.copy()
    corrupted = corrupt(image, kind, 5, 0)
    assert corrupted.shape == image.shape
    assert corrupted.dtype == np.uint8
    np.testing.assert_array_equal(image, before)


def test_noise_differs_between_images_and_severities(digits: list[NDArray[np.uint8]]) -> None:
    grey = np.full((32, 32, 3), 128, dtype=np.uint8)
    noise = [corrupt(grey, "gaussian_noise", severity, index).astype(float) for severity in (1, 2) for index in (0, 1)]
    correlations = np.corrcoef(np.stack([values.ravel() for values in noise]))
    assert abs(correlations - np.eye(4)).max() < 0.1


def test_noise_has_the_stated_standard_deviation() -> None:
    grey = np.full((64, 64, 3), 128, dtype=np.uint8)
    assert corrupt(grey, "gaussian_noise", 2, 0).std() == pytest.approx(0.08 * 255, rel=0.05)


def test_unknown_kind_and_severity_are_refused(digits: list[NDArray[np.uint8]]) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'gaussian_blur'"):
        corrupt(digits[0], "gaussian_blurr", 1, 0)
    for severity in (0, 6):
        with pytest.raises(ConfigError, match=f"severity is {severity}"):
            corrupt(digits[0], "jpeg", severity, 0)
