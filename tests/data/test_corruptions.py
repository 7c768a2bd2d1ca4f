from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow
from torch.utils.data import DataLoader, Dataset

from vpt.data.corruptions import BASIC, CORRUPTIONS, GROUPS, PARAMETERS, SEVERITIES, corrupt, title
from vpt.data.datasets.demo import DigitsDataModule
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


def test_noise_is_what_numpy_makes_of_kind_severity_and_name() -> None:
    grey = np.full((32, 32, 3), 128, dtype=np.uint8)
    seed = int(hashlib.sha256("gaussian_noise 3 bilder/ü.jpg".encode()).hexdigest()[:8], 16)
    noise = np.random.default_rng(seed).normal(scale=0.18, size=grey.shape)
    expected = np.floor(255 * (128 / 255 + noise).clip(0, 1) + 1e-4)
    np.testing.assert_array_equal(corrupt(grey, "gaussian_noise", 3, "bilder/ü.jpg"), expected)


def tiles(height: int, width: int, number: int) -> Image:
    colours = np.random.default_rng(0).integers(0, 256, (number, number, 3), dtype=np.uint8)
    return np.asarray(Pillow.fromarray(colours).resize((width, height), Pillow.Resampling.NEAREST))


# The published parameters do not grow evenly for these: passes of glass blur, what saturate does, flakes, fog, drops.
UNEVEN = {"glass_blur", "saturate", *GROUPS["weather"], "spatter"} - {"brightness"}


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("size", [(56, 56), (224, 224), (84, 126)])
def test_severity_increases_the_distance(kind: str, size: tuple[int, int]) -> None:
    # Whether tiles survive pixelation depends on where its blocks fall.
    measured = distances([smooth(*size) if kind == "pixelate" else tiles(*size, 11)], kind)
    assert measured[0] > 0
    assert kind in UNEVEN or all(weaker < stronger for weaker, stronger in pairwise(measured))


@pytest.mark.parametrize("kind", sorted(set(CORRUPTIONS) - UNEVEN))
def test_severity_increases_the_distance_on_digits(kind: str, digits: list[Image]) -> None:
    measured = distances(digits, kind)
    assert measured[0] > 0
    assert all(weaker < stronger for weaker, stronger in pairwise(measured))


SCALED = {*GROUPS["blur"], *GROUPS["weather"], "elastic_transform", "gaussian_blur", "spatter"}


@pytest.mark.parametrize("kind", sorted(SCALED - {"glass_blur", "brightness"}))
@pytest.mark.parametrize("side", [112, 448])
def test_an_image_of_another_size_shows_the_same(kind: str, side: int) -> None:
    error = change = 0.0
    clean = tiles(side, side, 14)
    how = Pillow.Resampling.BOX if side < 224 else Pillow.Resampling.BILINEAR
    for severity in SEVERITIES:
        native = Pillow.fromarray(corrupt(tiles(224, 224, 14), kind, severity, "a.jpg"))
        expected = np.asarray(native.resize((side, side), how), dtype=float)
        error += np.abs(corrupt(clean, kind, severity, "a.jpg") - expected).mean()
        change += np.abs(clean - expected).mean()
    assert error < 0.3 * change


def test_frost_is_marked() -> None:
    assert [kind for kind in CORRUPTIONS if title(kind) != kind] == ["frost"]
    assert title("frost") == "frost (procedural)"


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


@pytest.mark.parametrize(("kind", "deviation"), [("gaussian_noise", 0.12 * 255), ("speckle_noise", 0.2 * 128)])
def test_noise_has_the_stated_standard_deviation(kind: str, deviation: float) -> None:
    grey = np.full((64, 64, 3), 128, dtype=np.uint8)
    assert corrupt(grey, kind, 2, "a.jpg").std() == pytest.approx(deviation, rel=0.05)


def test_impulses_hit_the_stated_share_of_the_samples() -> None:
    grey = np.full((128, 128, 3), 128, dtype=np.uint8)
    hit = corrupt(grey, "impulse_noise", 5, "a.jpg")
    assert np.isin(hit, (0, 128, 255)).all()
    assert (hit == 0).mean() == pytest.approx(0.135, abs=0.01)
    assert (hit == 255).mean() == pytest.approx(0.135, abs=0.01)


def test_saturating_multiplies_the_saturation_and_keeps_the_value() -> None:
    grey = np.full((8, 8, 3), 77, dtype=np.uint8)
    np.testing.assert_array_equal(corrupt(grey, "saturate", 3, "a.jpg"), grey)
    pale = np.tile(np.array([120, 160, 200], dtype=np.uint8), (8, 8, 1))  # saturation 0.4
    np.testing.assert_allclose(corrupt(pale, "saturate", 1, "a.jpg")[0, 0], [176, 188, 200], atol=1)  # 0.12
    np.testing.assert_allclose(corrupt(pale, "saturate", 3, "a.jpg")[0, 0], [40, 120, 200], atol=1)  # 0.8


@pytest.mark.parametrize("kind", ["defocus_blur", "gaussian_blur", "motion_blur", "zoom_blur"])
def test_a_blur_does_not_change_a_plain_image(kind: str) -> None:
    plain = np.full((224, 224, 3), (30, 120, 210), dtype=np.uint8)
    # The published disc, softened at its edge, has a sum of up to 1.01.
    np.testing.assert_allclose(corrupt(plain, kind, 5, "a.jpg").astype(int), plain, rtol=0.01, atol=1)


def test_brightness_is_added_to_the_value_and_keeps_the_hue() -> None:
    plain = np.full((8, 8, 3), (40, 80, 120), dtype=np.uint8)
    np.testing.assert_allclose(corrupt(plain, "brightness", 2, "a.jpg")[0, 0], [57, 114, 171], atol=2)


@pytest.mark.parametrize("kind", ["snow", "frost", "fog"])
def test_the_weather_covers_each_image_in_its_own_way(kind: str) -> None:
    plain = np.full((64, 64, 3), 60, dtype=np.uint8)
    covers = [corrupt(plain, kind, 3, name)[..., 0].astype(float).ravel() for name in "abcdefgh"]
    assert np.corrcoef(covers)[np.triu_indices(8, 1)].mean() < 0.7


def test_parameters_are_the_published_ones() -> None:
    """Severity 3 in make_imagenet_c.py of github.com/hendrycks/robustness; elastic_transform in imagecorruptions."""
    assert {kind: values[2] for kind, values in PARAMETERS.items()} == {
        "gaussian_noise": (0.18,),
        "shot_noise": (12,),
        "impulse_noise": (0.09,),
        "defocus_blur": (6, 0.5),
        "glass_blur": (1, 2, 3),
        "motion_blur": (15, 8),
        "zoom_blur": (1.21, 0.02),
        "snow": (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        "frost": (0.7, 0.7),
        "fog": (2.5, 1.7),
        "brightness": (0.3,),
        "contrast": (0.2,),
        "elastic_transform": (250 * 0.085,),
        "pixelate": (0.4,),
        "jpeg_compression": (15,),
        "speckle_noise": (0.35,),
        "gaussian_blur": (3,),
        "spatter": (0.65, 0.3, 2, 0.68, 0.5, 0),
        "saturate": (2, 0),
    }


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
