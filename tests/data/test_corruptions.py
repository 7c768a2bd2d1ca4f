from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from vpt.data.corruptions import BASIC, CORRUPTIONS, GROUPS, PARAMETERS, SEVERITIES, corrupt
from vpt.data.datasets.demo import DigitsDataModule
from vpt.data.transforms import import_albumentations
from vpt.errors import ConfigError, UnknownNameError

Image = NDArray[np.uint8]


@pytest.fixture(scope="module")
def digits() -> list[Image]:
    split = DigitsDataModule().split("test")
    return [np.ascontiguousarray(split.images[index].transpose(1, 2, 0)) for index in range(6)]


def smooth(height: int, width: int) -> Image:
    """Slow waves of all colours."""
    y, x = np.mgrid[:height, :width].astype(float) / max(height, width)
    waves = [np.sin(6 * x) * np.cos(5 * y), np.cos(7 * x * y), np.sin(4 * (x + y))]
    return (128 + 90 * np.stack(waves, axis=-1)).astype(np.uint8)


def distances(images: list[Image], kind: str) -> list[float]:
    """Mean absolute difference to the clean images at each severity; of the weather to 12, as it is uneven."""
    names = [str(number) for number in range(12 // len(images) if kind in GROUPS["weather"] else 1)]
    pairs = [(image, name) for image in images for name in names]
    return [
        float(
            np.mean(
                [np.abs(corrupt(image, kind, severity, name).astype(float) - image).mean() for image, name in pairs]
            )
        )
        for severity in SEVERITIES
    ]


def test_there_are_the_fifteen_kinds_of_the_paper_and_its_four_of_validation() -> None:
    assert len(CORRUPTIONS) == len(set(CORRUPTIONS)) == 19
    assert set(CORRUPTIONS) == set(PARAMETERS)
    assert GROUPS["extra"] == CORRUPTIONS[15:] == ("speckle_noise", "gaussian_blur", "spatter", "saturate")


def test_what_is_evaluated_by_default_are_five_of_them() -> None:
    assert set(BASIC) < set(CORRUPTIONS)
    assert len(set(BASIC)) == 5


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_pixels_do_not_depend_on_order_or_on_what_came_before(kind: str, digits: list[Image]) -> None:
    keys = [(index, severity) for index in range(3) for severity in SEVERITIES]
    forwards = {key: corrupt(digits[key[0]], kind, key[1], f"{key[0]}.jpg") for key in keys}
    np.random.seed(7)  # noqa: NPY002  # a global generator that somebody else has used
    for key in reversed(keys):
        np.testing.assert_array_equal(corrupt(digits[key[0]], kind, key[1], f"{key[0]}.jpg"), forwards[key])


class EveryKind(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return len(CORRUPTIONS)

    def __getitem__(self, position: int) -> torch.Tensor:
        return torch.from_numpy(corrupt(smooth(32, 32), CORRUPTIONS[position], 3, str(position)))


def test_pixels_do_not_depend_on_the_process_that_makes_them() -> None:
    here = torch.stack([EveryKind()[position] for position in range(len(EveryKind()))])
    assert torch.equal(torch.cat(list(DataLoader(EveryKind(), batch_size=4, num_workers=2))), here)


def test_noise_is_what_albumentations_makes_of_kind_severity_and_name() -> None:
    A, grey = import_albumentations(), np.full((32, 32, 3), 128, dtype=np.uint8)  # noqa: N806
    seed = int(hashlib.sha256("gaussian_noise 3 bilder/ü.jpg".encode()).hexdigest()[:8], 16)
    expected = A.Compose([A.GaussNoise(std_range=(0.12, 0.12), p=1)], seed=seed)(image=grey)["image"]
    np.testing.assert_array_equal(corrupt(grey, "gaussian_noise", 3, "bilder/ü.jpg"), expected)


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("size", [(64, 64), (224, 224), (80, 128)])
def test_severity_increases_the_distance_on_a_smooth_image(kind: str, size: tuple[int, int]) -> None:
    measured = distances([smooth(*size)], kind)
    assert measured[0] > 0
    assert all(weaker < stronger for weaker, stronger in pairwise(measured))


@pytest.mark.parametrize("kind", sorted(set(CORRUPTIONS) - {"saturate"}))
def test_severity_increases_the_distance_on_digits(kind: str, digits: list[Image]) -> None:
    measured = distances(digits, kind)
    assert measured[0] > 0
    assert all(weaker < stronger for weaker, stronger in pairwise(measured))


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("size", [(64, 50), (8, 8)])
def test_shape_and_type_are_kept_and_the_input_untouched(kind: str, size: tuple[int, int]) -> None:
    image = smooth(*size)
    before = image.copy()
    corrupted = corrupt(image, kind, 5, "a.jpg")
    assert corrupted.shape == image.shape
    assert corrupted.dtype == np.uint8
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("kind", [kind for kind in CORRUPTIONS if kind.endswith("_noise")])
def test_noise_differs_between_images_and_severities(kind: str) -> None:
    grey = np.full((32, 32, 3), 128, dtype=np.uint8)
    noise = [corrupt(grey, kind, severity, name).astype(float) for severity in (3, 4) for name in "ab"]
    correlations = np.corrcoef(np.stack([values.ravel() for values in noise]))
    assert abs(correlations - np.eye(4)).max() < 0.1


@pytest.mark.parametrize(("kind", "deviation"), [("gaussian_noise", 0.08 * 255), ("speckle_noise", 0.2 * 128)])
def test_noise_has_the_stated_standard_deviation(kind: str, deviation: float) -> None:
    grey = np.full((64, 64, 3), 128, dtype=np.uint8)
    assert corrupt(grey, kind, 2, "a.jpg").std() == pytest.approx(deviation, rel=0.05)


def test_impulses_hit_the_stated_share_of_the_samples() -> None:
    grey = np.full((128, 128, 3), 128, dtype=np.uint8)
    hit = corrupt(grey, "impulse_noise", 5, "a.jpg")
    assert np.isin(hit, (0, 128, 255)).all()
    assert (hit == 0).mean() == pytest.approx(0.13, abs=0.01)
    assert (hit == 255).mean() == pytest.approx(0.13, abs=0.01)


def test_saturating_leaves_grey_alone_and_keeps_the_grey_level_of_a_colour() -> None:
    grey = np.full((8, 8, 3), 77, dtype=np.uint8)
    np.testing.assert_array_equal(corrupt(grey, "saturate", 5, "a.jpg"), grey)
    pale = np.tile(np.array([120, 128, 132], dtype=np.uint8), (8, 8, 1))
    weights = np.array([0.299, 0.587, 0.114])
    assert corrupt(pale, "saturate", 2, "a.jpg")[0, 0] @ weights == pytest.approx(pale[0, 0] @ weights, abs=1)


@pytest.mark.parametrize("kind", ["defocus_blur", "gaussian_blur", "motion_blur", "zoom_blur"])
def test_a_blur_does_not_change_a_plain_image(kind: str) -> None:
    plain = np.full((224, 224, 3), (30, 120, 210), dtype=np.uint8)
    assert np.abs(corrupt(plain, kind, 5, "a.jpg").astype(int) - plain).max() <= 1


def test_brightness_is_added_to_the_value_and_keeps_the_hue() -> None:
    plain = np.full((8, 8, 3), (40, 80, 120), dtype=np.uint8)
    np.testing.assert_allclose(corrupt(plain, "brightness", 2, "a.jpg")[0, 0], [57, 114, 171], atol=2)


@pytest.mark.parametrize("kind", ["snow", "frost", "fog"])
def test_the_weather_covers_each_image_in_its_own_way(kind: str) -> None:
    plain = np.full((64, 64, 3), 60, dtype=np.uint8)
    covers = [corrupt(plain, kind, 3, name)[..., 0].astype(float).ravel() for name in "abcdefgh"]
    assert np.corrcoef(covers)[np.triu_indices(8, 1)].mean() < 0.7


def test_unknown_kind_and_severity_are_refused(digits: list[Image]) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'gaussian_blur'"):
        corrupt(digits[0], "gaussian_blurr", 1, "a.jpg")
    for severity in (0, 6):
        with pytest.raises(ConfigError, match=f"severity is {severity}"):
            corrupt(digits[0], "jpeg_compression", severity, "a.jpg")


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (7, 40)])
def test_an_image_without_room_is_refused_in_one_sentence(kind: str, size: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=rf"at least 8×8 pixels, not {size[1]}×{size[0]}: raise image_size\.$"):
        corrupt(smooth(*size), kind, 5, "a.jpg")


def test_names_that_are_no_unicode_seed_as_well() -> None:
    grey = np.full((8, 8, 3), 128, dtype=np.uint8)
    assert corrupt(grey, "gaussian_noise", 1, "a\udcff.jpg").std() > 0
