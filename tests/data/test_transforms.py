from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torchvision import transforms as T  # type: ignore[import-untyped]

from vpt.data.augmentation import Augmentation
from vpt.data.transforms import PRESETS, Preset, get_preset, resize_bilinear_legacy
from vpt.errors import ConfigError, UnknownNameError


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def legacy_by_loops(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.float64]:
    """The definition, pixel by pixel in float64."""
    result = np.zeros((height, width, image.shape[2]))
    for row in range(height):
        for column in range(width):
            y, x = row * image.shape[0] / height, column * image.shape[1] / width
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, image.shape[0] - 1), min(x0 + 1, image.shape[1] - 1)
            for weight, source in (
                ((1 - y + y0) * (1 - x + x0), image[y0, x0]),
                ((1 - y + y0) * (x - x0), image[y0, x1]),
                ((y - y0) * (1 - x + x0), image[y1, x0]),
                ((y - y0) * (x - x0), image[y1, x1]),
            ):
                result[row, column] += weight * source
    return result


# The first three are the fixtures of TensorFlow's own kernel test for align_corners=false.
@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ((2, 2), (3, 3), [3, 5, 6, 7, 9, 10, 9, 11, 12]),
        ((2, 2), (4, 4), [3, 4.5, 6, 6, 6, 7.5, 9, 9, 9, 10.5, 12, 12, 9, 10.5, 12, 12]),
        ((4, 4), (3, 3), [3, 7, 11, 19, 23, 27, 35, 39, 43]),
        ((2, 2), (1, 1), [3]),
    ],
)
def test_legacy_bilinear_gives_tensorflow_1_values(
    source: tuple[int, int], target: tuple[int, int], expected: list[float]
) -> None:
    image = np.arange(1, 1 + source[0] * source[1], dtype=np.uint8).reshape(*source, 1)
    np.testing.assert_allclose(3 * resize_bilinear_legacy(image, *target).ravel(), expected, rtol=1e-6)


# By hand from src = dst · scale in exact fractions: pixel (i, j) of the source is (17i² + 5j² + 31ij) mod 256. The
# scales 5/4, 10/4, 3/4 and 5/8 make every value a finite binary fraction.
DOWN = [[0, 32.5, 125, 154.5], [29.75, 127.125, 92.5, 154.875], [110.5, 144.75, 239, 142.25],
        [50.25, 117.375, 244.5, 84.625]]  # fmt: skip
UP = [[0, 3.125, 8.75, 18.125, 32.5, 49.375, 71.25, 80],
      [12.75, 30.40625, 50.5625, 74.46875, 103.375, 134.78125, 171.1875, 185.75],
      [42.5, 74.6875, 109.375, 147.8125, 127.25, 109.1875, 160.125, 180.5],
      [68, 109.875, 154.25, 202.375, 127.5, 55.125, 115.75, 140]]  # fmt: skip


@pytest.mark.parametrize(("source", "expected"), [((5, 10), DOWN), ((3, 5), UP)], ids=["down", "up"])
def test_legacy_bilinear_gives_the_stored_values_down_and_up(source: tuple[int, int], expected: list[Any]) -> None:
    i, j = np.mgrid[: source[0], : source[1]]
    image = ((17 * i * i + 5 * j * j + 31 * i * j) % 256).astype(np.uint8)[..., None]
    golden = np.array(expected)
    np.testing.assert_array_equal(resize_bilinear_legacy(image, *golden.shape)[..., 0], golden)
    np.testing.assert_array_equal(legacy_by_loops(image, *golden.shape)[..., 0], golden)


@pytest.mark.parametrize("size", [(32, 32), (37, 23), (12, 61), (64, 64), (48, 31)])
def test_legacy_bilinear_follows_its_definition(size: tuple[int, int]) -> None:
    image = np.asarray(picture(*size))
    np.testing.assert_allclose(resize_bilinear_legacy(image, 24, 31), legacy_by_loops(image, 24, 31), atol=1e-3)


def test_legacy_bilinear_is_another_resize_than_pil() -> None:
    image = picture(96, 64)
    legacy = PRESETS["vpt"](image, 32).astype(float)
    pil = Preset("", "square", "bilinear", "none")(image, 32).astype(float)
    assert abs(legacy - pil).mean() > 10


@pytest.mark.parametrize("size", [(300, 200), (200, 333), (224, 224), (31, 57)])
def test_timm_preset_is_torchvision_resize_and_centre_crop(size: tuple[int, int]) -> None:
    image = picture(*size)
    reference = T.Compose([T.Resize(248, T.InterpolationMode.BICUBIC), T.CenterCrop(224)])(image)
    np.testing.assert_array_equal(PRESETS["timm"](image, 224), np.asarray(reference))


@pytest.mark.parametrize("size", [(300, 200), (200, 333), (31, 57)])
@pytest.mark.parametrize(("image_size", "shorter"), [(224, 256), (384, 438), (448, 512)])
def test_fgvc_preset_is_the_resize_and_centre_crop_of_vpt(size: tuple[int, int], image_size: int, shorter: int) -> None:
    image = picture(*size)
    scaled = T.Resize(shorter)(image)
    np.testing.assert_array_equal(PRESETS["fgvc"].scale(image, image_size), np.asarray(scaled))
    np.testing.assert_array_equal(PRESETS["fgvc"](image, image_size), np.asarray(T.CenterCrop(image_size)(scaled)))


def test_fgvc_augmentation_takes_every_window_of_the_scaled_image_and_its_mirror_image() -> None:
    scaled = PRESETS["fgvc"].scale(picture(60, 45), 7)
    assert scaled.shape == (8, 10, 3)
    windows = {scaled[top : top + 7, left : left + 7].tobytes(): False for top in range(2) for left in range(4)}
    windows |= {np.frombuffer(w, np.uint8).reshape(7, 7, 3)[:, ::-1].tobytes(): True for w in windows}
    augment = Augmentation("fgvc", 0, 7)
    seen = [augment(scaled, epoch, index).tobytes() for epoch in range(20) for index in range(20)]
    assert set(seen) == windows.keys()
    assert min(map(seen.count, windows)) > 10  # 25 expected: a window and whether it is mirrored are independent


def test_whether_an_image_is_mirrored_does_not_follow_from_where_it_was_cut() -> None:
    ramp = np.zeros((32, 32, 3), dtype=np.uint8) + 8 * np.arange(32, dtype=np.uint8)[None, :, None]
    cuts = [Augmentation("crop_flip", 0, 32)(ramp, 0, index)[0, :, 0].astype(int) for index in range(400)]
    widths, mirrored = np.array([[np.ptp(cut), cut[0] > cut[-1]] for cut in cuts]).T
    assert abs(np.corrcoef(widths, mirrored)[0, 1]) < 0.15
    assert 160 < mirrored.sum() < 240


def test_presets_are_those_of_the_table() -> None:
    assert {name: (preset.resize, preset.interpolation, preset.normalization) for name, preset in PRESETS.items()} == {
        "vpt": ("square", "bilinear_legacy", "imagenet"),
        "adapter_plus": ("square", "bilinear_legacy", "inception"),
        "noah": ("square", "bicubic", "imagenet"),
        "fgvc": ("shorter_crop", "bilinear", "imagenet"),
        "timm": ("shorter_crop", "bicubic", "weights"),
        "square": ("square", "bicubic", "weights"),
        "pad": ("pad", "bicubic", "weights"),
    }
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert [name for name, preset in PRESETS.items() if f"\n| `{name}` | {preset.source} |" not in page] == []


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("size", [(1, 1), (500, 3), (64, 64)])
def test_every_preset_gives_uint8_of_the_size_that_is_asked_for(name: str, size: tuple[int, int]) -> None:
    for asked, shape in ((40, (40, 40, 3)), ((20, 40), (20, 40, 3)), ((40, 13), (40, 13, 3))):
        result = PRESETS[name](picture(*size), asked)
        assert result.shape == shape
        assert result.dtype == np.uint8


def test_a_crop_that_is_not_square_is_cut_from_what_covers_it() -> None:
    image = picture(300, 200)
    for asked, scaled in (((90, 45), (150, 100)), ((45, 90), (100, 66)), ((90, 90), (150, 100))):
        whole = np.asarray(image.resize(scaled, Image.Resampling.BICUBIC))
        top, left = round((scaled[1] - asked[0]) / 2), round((scaled[0] - asked[1]) / 2)
        expected = whole[top : top + asked[0], left : left + asked[1]]
        assert np.array_equal(PRESETS["timm"](image, asked), expected)


@pytest.mark.parametrize(
    ("size", "asked", "box"), [((40, 20), 16, (0, 4, 16, 8)), ((10, 40), (20, 30), (12, 0, 5, 20))]
)
def test_padding_keeps_the_whole_image_and_its_shape(
    size: tuple[int, int], asked: int | tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    image, (left, top, width, height) = picture(*size), box
    padded = PRESETS["pad"](image, asked)
    inside = padded[top : top + height, left : left + width].copy()
    assert np.array_equal(inside, np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)))
    padded[top : top + height, left : left + width] = PRESETS["pad"].fill
    assert (padded == PRESETS["pad"].fill).all()


def test_square_presets_keep_an_image_that_has_the_size_already() -> None:
    image = picture(48, 48)
    for name in ("vpt", "adapter_plus", "noah", "square"):
        np.testing.assert_array_equal(PRESETS[name](image, 48), np.asarray(image))


@pytest.mark.parametrize("preset", PRESETS.values(), ids=str)
def test_preset_survives_its_dict(preset: Preset) -> None:
    values = preset.to_dict()
    assert all(type(value) in {str, float, list} for value in values.values())
    assert Preset.from_dict(values) == preset


def test_malformed_preset_is_refused() -> None:
    with pytest.raises(ConfigError, match="description of a preset"):
        Preset.from_dict({"name": "x"})
    with pytest.raises(UnknownNameError, match="did you mean 'bicubic'"):
        Preset("x", "square", "bicubik", "none")
    with pytest.raises(ConfigError, match="crop_fraction 0"):
        Preset("x", "shorter_crop", "bicubic", "none", crop_fraction=0)


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'adapter_plus'"):
        get_preset("adapterplus")
    with pytest.raises(UnknownNameError, match="did you mean 'crop_flip'"):
        Augmentation("cropflip", 0, 8)


@pytest.mark.parametrize("name", ["flip", "crop_flip"])
def test_augmentation_depends_on_seed_epoch_and_index_alone(name: str) -> None:
    image = np.asarray(picture(32, 32))
    keys = [(seed, epoch, index) for seed in range(2) for epoch in range(2) for index in range(8)]
    first = {key: Augmentation(name, key[0], 32)(image, *key[1:]) for key in keys}
    for key in reversed(keys):
        np.testing.assert_array_equal(Augmentation(name, key[0], 32)(image, *key[1:]), first[key])
    distinct = {pixels.tobytes() for pixels in first.values()}
    assert len(distinct) == (2 if name == "flip" else len(keys))
    assert all(pixels.shape == image.shape and pixels.dtype == np.uint8 for pixels in first.values())


def test_no_augmentation_is_the_image_itself() -> None:
    image = np.asarray(picture(8, 8))
    np.testing.assert_array_equal(Augmentation("none", 0, 8)(image, 1, 2), image)


@pytest.mark.parametrize("name", ["timm", "fgvc"])
@pytest.mark.parametrize("size", [(5000, 1), (1, 5000), (170, 10)])
def test_the_ends_of_a_very_long_image_are_cut_off_before_it_grows(name: str, size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    preset, short = PRESETS[name], min(size)
    left, top = ((side - min(side, 16 * short)) // 2 for side in size)
    middle = image.crop((left, top, left + min(size[0], 16 * short), top + min(size[1], 16 * short)))
    scaled = preset.scale(image, 224)
    assert max(scaled.shape) == 16 * min(scaled.shape[:2])
    np.testing.assert_array_equal(scaled, preset.scale(middle, 224))
    assert preset(image, 224).shape == (224, 224, 3)


def test_an_image_sixteen_times_as_long_as_wide_is_kept_whole() -> None:
    assert PRESETS["fgvc"].scale(Image.new("RGB", (160, 10)), 14).shape == (16, 256, 3)


def test_what_the_papers_read_and_split_is_said_but_is_no_part_of_the_preprocessing() -> None:
    assert PRESETS["noah"].splits == "both to test, which chose the epoch"
    assert PRESETS["timm"].source == "any"
    assert set(PRESETS["vpt"].to_dict()) == {"name", "resize", "interpolation", "normalization", "crop_fraction"}
