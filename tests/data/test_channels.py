"""Images of any number of channels: as the numbers that a file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from vpt.data import PRESETS, FolderDataModule, Preset
from vpt.data.channels import (
    Raster,
    as_channels,
    as_raster,
    channel_statistics,
    false_colours,
    read_channels,
)
from vpt.data.inference import read_photos
from vpt.errors import ConfigError, DataError, UnknownNameError

DTYPES = (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.float16, np.float32)


def drawn(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> NDArray[Any]:
    random = np.random.default_rng(seed)
    if np.issubdtype(dtype, np.floating):
        return random.normal(0, 5, shape).astype(dtype)
    most = min(np.iinfo(dtype).max, 2**24)
    return random.integers(max(np.iinfo(dtype).min, -most), most, shape).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [False, True])
def test_numpy_files_are_read_as_they_are(tmp_path: Path, dtype: Any, first: bool) -> None:
    pixels = drawn((19, 17, 5), dtype)
    np.save(tmp_path / "x.npy", pixels.transpose(2, 0, 1) if first else pixels)
    found = read_channels(tmp_path / "x.npy", 5).pixels
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, pixels.astype(np.float32))
    np.testing.assert_array_equal(read_channels(tmp_path / "x.npy", (4, 0)).pixels, found[:, :, [4, 0]])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_tiff_files_are_read_as_they_are(tmp_path: Path, dtype: Any, planes: str, compression: str | None) -> None:
    tifffile = pytest.importorskip("tifffile")
    pixels = drawn((6, 8, 12), dtype)
    stored = pixels if planes == "contig" else pixels.transpose(2, 0, 1)
    tifffile.imwrite(tmp_path / "x.tif", stored, photometric="minisblack", planarconfig=planes, compression=compression)
    np.testing.assert_array_equal(read_channels(tmp_path / "x.tif", 12).pixels, pixels.astype(np.float32))


def test_what_tifffile_has_not_been_told_follows_from_the_number(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    pixels = drawn((24, 30, 12), np.uint16)
    tifffile.imwrite(tmp_path / "x.tif", pixels)  # axes QYX, of which Q are rows
    np.testing.assert_array_equal(read_channels(tmp_path / "x.tif", 12).pixels, pixels.astype(np.float32))
    tifffile.imwrite(tmp_path / "y.tif", drawn((64, 70, 12), np.uint16))
    assert read_channels(tmp_path / "y.tif", (3, 2)).pixels.shape == (64, 70, 2)


def test_series_of_a_tiff_are_channels_or_refused(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    pixels = drawn((4, 9, 8), np.uint16)
    with tifffile.TiffWriter(tmp_path / "x.tif") as file:
        for page in pixels:
            file.write(page, photometric="minisblack")
    np.testing.assert_array_equal(read_channels(tmp_path / "x.tif", 4).pixels, pixels.transpose(1, 2, 0))
    with tifffile.TiffWriter(tmp_path / "y.tif") as file:
        file.write(pixels[0, :4, :4], photometric="minisblack")
        file.write(pixels[0], photometric="minisblack")
    with pytest.raises(ValueError, match="2 images of several kinds"):
        read_channels(tmp_path / "y.tif", 1)


def test_what_pillow_would_scale_is_refused(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    cv2.imwrite(str(tmp_path / "x.png"), drawn((5, 6, 3), np.uint16))
    (tmp_path / "z.pgm").write_bytes(b"P5 2 1 4095 " + np.array([[5, 3483]], ">u2").tobytes())
    for name in ("x.png", "z.pgm"):
        with pytest.raises(ValueError, match="Pillow would scale its numbers"):
            read_channels(tmp_path / name, 3 if name == "x.png" else 1)


def test_pages_of_a_tiff_are_channels(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    pixels = drawn((4, 9, 9), np.uint16)  # as many rows as columns: the file alone says which are the pages
    with tifffile.TiffWriter(tmp_path / "x.tif") as file:
        for page in pixels:
            file.write(page, photometric="minisblack", contiguous=True)
    np.testing.assert_array_equal(read_channels(tmp_path / "x.tif", 4).pixels, pixels.transpose(1, 2, 0))
    tifffile.imwrite(tmp_path / "one.tif", pixels[0])
    np.testing.assert_array_equal(read_channels(tmp_path / "one.tif", 1).pixels[..., 0], pixels[0])


def test_sixteen_bits_of_a_png_are_not_scaled(tmp_path: Path) -> None:
    pixels = drawn((5, 6), np.uint16)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_channels(tmp_path / "x.png", 1).pixels[..., 0], pixels)
    colours = drawn((5, 6, 4), np.uint8)
    Image.fromarray(colours, "RGBA").save(tmp_path / "y.png")
    np.testing.assert_array_equal(read_channels(tmp_path / "y.png", 4).pixels, colours)


@pytest.mark.parametrize(
    ("values", "channels", "why"),
    [
        (np.zeros((4, 5, 3)), 3, r"its numbers are float64: convert them to 8, 16 or 32 bits"),
        (np.zeros((4, 5, 3), complex), 3, "its numbers are complex128"),
        (np.zeros((4, 5, 3), np.uint8), 7, r"it has shape \(4, 5, 3\), and no 7 channels"),
        (np.zeros((9, 5, 3), np.uint8), (0, 3), "it has 3 channels, of which none is number 3"),
        (np.zeros((9, 5, 5), np.uint8), (0, 3), "does not say which dimension is that of the channels"),
        (np.zeros((4, 5, 4), np.uint8), 4, "does not say which dimension is that of the channels"),
        (np.full((4, 5, 3), np.nan, np.float32), 3, "it holds numbers that are not finite"),
        (np.zeros((2, 4, 5, 3), np.uint8), 3, "it has shape"),
        (np.zeros((0, 5, 3), np.uint8), 3, "it has shape"),
    ],
)
def test_what_is_no_image_of_these_channels_is_refused(values: Any, channels: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        as_raster(values, None, channels)


@pytest.mark.parametrize("given", [0, -1, 5000, 1.5, True, "12", [], [1, 1], [-1], [0.5]])
def test_channels_are_a_number_or_a_list_of_different_ones(given: Any) -> None:
    with pytest.raises(ConfigError, match="channels"):
        as_channels(given)


@pytest.mark.parametrize("name", PRESETS)
def test_a_raster_of_colours_is_resized_as_the_image(name: str) -> None:
    """But for the rounding of 8 bits, which Pillow does twice: behind the rows and behind the columns."""
    grey = 64 + drawn((9, 13, 3), np.uint8) // 2  # so that nothing overshoots what 8 bits hold
    colours = np.asarray(Image.fromarray(grey).resize((130, 90), Image.Resampling.BICUBIC))
    plain = PRESETS[name](Image.fromarray(colours), 32)
    channels = PRESETS[name].of(3)(Raster(colours.astype(np.float32)), 32)
    assert channels.dtype == np.float32
    inside = slice(11, 21) if PRESETS[name].resize == "pad" else slice(None)  # elsewhere another fill
    gap = np.abs(channels.clip(0, 255) - plain.astype(np.float64))[inside]
    assert 0 < gap.max() <= 1.01


def test_each_channel_is_resized_for_itself() -> None:
    pixels = drawn((20, 30, 6), np.float32) * 1000
    together = PRESETS["square"].of(6)(Raster(pixels), (8, 12))
    for channel in range(6):
        alone = PRESETS["square"].of(1)(Raster(pixels[:, :, channel : channel + 1]), (8, 12))
        np.testing.assert_array_equal(together[:, :, channel], alone[..., 0])


def test_channels_are_padded_by_their_edge() -> None:
    pixels = 280 + drawn((10, 20, 2), np.float32)
    padded = PRESETS["pad"].of(2)(Raster(pixels), 40)
    np.testing.assert_array_equal(padded[:10], np.broadcast_to(padded[10], (10, 40, 2)))
    np.testing.assert_array_equal(padded[30:], np.broadcast_to(padded[29], (10, 40, 2)))
    assert padded.min() > 200


def test_a_preset_of_channels_is_another_one_and_comes_back() -> None:
    preset = PRESETS["pad"].of([3, 1])
    assert preset != PRESETS["pad"]
    assert preset.to_dict()["channels"] == [3, 1]
    assert Preset.from_dict(preset.to_dict()) == preset
    assert "channels" not in PRESETS["pad"].to_dict()
    with pytest.raises(ConfigError, match="channels"):
        Preset.from_dict(preset.to_dict() | {"channels": 0})


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(2, 6)), min_size=1, max_size=5),
    st.integers(1, 4),
    st.floats(-1e6, 1e6),
    st.integers(0, 2**16),
)
@settings(deadline=None)
def test_statistics_are_those_of_all_pixels(
    shapes: list[tuple[int, int]], channels: int, offset: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    images = [random.normal(offset, 3, (channels, *shape)).astype(np.float32) for shape in shapes]
    found = channel_statistics(images, range(len(images)))
    every = np.concatenate([image.reshape(channels, -1) for image in images], axis=1).astype(np.float64)
    np.testing.assert_allclose(found["mean"], every.mean(axis=1), rtol=5.1e-9, atol=1e-9)
    np.testing.assert_allclose(found["std"], every.std(axis=1), rtol=1e-6)


def test_a_channel_without_variance_is_named() -> None:
    images = np.stack([np.stack([np.full((3, 3), 7.0), np.eye(3)])] * 2)
    with pytest.raises(DataError, match="Channel 0 is 7 in all training images"):
        channel_statistics(images, range(2))


def test_false_colours_are_those_of_the_first_three_channels() -> None:
    pixels = drawn((5, 40, 50), np.float32)
    shown = false_colours(pixels)
    assert shown.shape == (40, 50, 3)
    assert shown.dtype == np.uint8
    for channel in range(3):
        order = np.argsort(pixels[channel].ravel(), kind="stable")
        assert (np.diff(shown[..., channel].ravel()[order].astype(int)) >= 0).all()
        assert {shown[..., channel].min(), shown[..., channel].max()} == {0, 255}
    np.testing.assert_array_equal(false_colours(pixels[:1]), false_colours(pixels[[0, 0, 0]]))
    assert not false_colours(np.zeros((4, 3, 3), np.float32)).any()
    colours = drawn((3, 4, 5), np.uint8)
    np.testing.assert_array_equal(false_colours(colours), colours.transpose(1, 2, 0))


@pytest.fixture
def fields(tmp_path: Path) -> Path:
    """Twelve images of five channels of two classes."""
    for place in range(12):
        folder = tmp_path / "fields" / ("dry", "wet")[place % 2]
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{place:02d}.npy", drawn((5, 16, 24), np.uint16, place))
    return tmp_path / "fields"


def module(fields: Path, **options: Any) -> FolderDataModule:
    return FolderDataModule(fields, **{"channels": 5, "image_size": [16, 24], "batch_size": 4, **options})


def test_batches_are_the_numbers_of_the_files(fields: Path) -> None:
    data = module(fields)
    split = data.split("train")
    batch = split.batch([2, 0])
    assert batch["image"].dtype == torch.float32
    for row, place in zip(batch["image"].numpy(), (2, 0), strict=True):
        np.testing.assert_array_equal(row, np.load(fields / split.paths[place]).astype(np.float32))
    stack = np.stack([np.load(fields / path).astype(np.float64) for path in split.paths])
    found = data.normalization
    assert isinstance(found, dict)
    np.testing.assert_allclose(found["mean"], stack.mean(axis=(0, 2, 3)), rtol=1e-8)
    np.testing.assert_allclose(found["std"], stack.std(axis=(0, 2, 3)), rtol=1e-8)
    assert data.describe()["channels"] == 5


def test_chosen_channels_are_a_task_of_their_own(fields: Path) -> None:
    data = module(fields, channels=[4, 1])
    pixels = np.load(fields / data.split("train").paths[0]).astype(np.float32)
    np.testing.assert_array_equal(data.split("train")[0]["image"].numpy(), pixels[[4, 1]])
    assert data.describe()["channels"] == [4, 1]


def test_the_cache_holds_what_is_decoded(fields: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"preset": "timm", "image_size": 12}
    kept = module(fields, **options).split("train")
    again = module(fields, **options).split("train")
    assert isinstance(again.images, np.memmap)
    monkeypatch.setattr("vpt.data.cache.image_cache.DISK_SHARE", 0.0)
    monkeypatch.setenv("VPT_CACHE", str(fields.parent / "other"))
    with pytest.warns(UserWarning, match="decoded anew"):
        anew = module(fields, **options).split("train")
    for place in range(len(kept)):
        np.testing.assert_array_equal(kept[place]["image"], again[place]["image"])
        np.testing.assert_array_equal(kept[place]["image"], anew[place]["image"])


def test_a_random_crop_is_cut_from_images_of_several_sizes(fields: Path) -> None:
    np.save(fields / "dry" / "00.npy", drawn((5, 40, 24), np.uint16))
    data = module(fields, preset="fgvc", image_size=8, augment="fgvc", train_on_val=True)
    images = data.split("train")
    for index in range(len(images)):
        assert images[(0, index)]["image"].shape == (5, 8, 8)
    assert images.images[0].shape != images.images[1].shape


def test_places_change_and_colours_do_not(fields: Path) -> None:
    plain, flipped = module(fields).split("train"), module(fields, augment="flip").split("train")
    seen = set()
    for index in range(len(plain)):
        before, behind = plain[index]["image"], flipped[(1, index)]["image"]
        mirrored = torch.equal(behind, before.flip(2))
        assert mirrored or torch.equal(behind, before)
        seen.add(mirrored)
    assert seen == {True, False}
    turned = module(fields, image_size=16, augment=[{"name": "D4", "p": 1.0}]).split("train")
    assert sorted(turned[(0, 0)]["image"].flatten().tolist()) == sorted(turned[0]["image"].flatten().tolist())
    for augment in ("photos", "trivial", [{"name": "ColorJitter"}]):
        with pytest.raises(ConfigError, match="fills in colours of 8 bits"):
            module(fields, augment=augment)
    for augment in ([{"name": "Rotate"}], [{"name": "CoarseDropout"}]):  # which put zeros in
        with pytest.raises(ConfigError, match="fills in colours"):
            module(fields, augment=augment)


def test_an_array_where_colours_are_read_is_no_image(fields: Path) -> None:
    with pytest.raises(DataError, match=r"dry holds no image \(not read: 6 of 6 files \(6 \.npy\)\)"):
        FolderDataModule(fields)


def test_a_file_of_other_channels_is_named(fields: Path) -> None:
    np.save(fields / "wet" / "01.npy", drawn((4, 16, 24), np.uint16))
    with pytest.raises(DataError, match=r"01\.npy cannot be decoded \(it has shape \(4, 16, 24\), and no 5 channels\)"):
        module(fields, train_on_val=True, test_fraction=0.0).split("train")


def test_images_to_be_predicted_may_be_arrays_and_tensors(fields: Path) -> None:
    pixels = drawn((5, 16, 24), np.uint16)
    preset = PRESETS["square"].of(5)
    (path,) = read_photos(fields / "dry" / "00.npy", preset, (16, 24))
    (array,) = read_photos(np.load(fields / "dry" / "00.npy").transpose(1, 2, 0), preset, (16, 24))
    assert path.pixels is not None
    assert array.pixels is not None
    np.testing.assert_array_equal(path.pixels, array.pixels)
    (tensor,) = read_photos(torch.from_numpy(pixels.astype(np.int32)), preset, (16, 24))
    np.testing.assert_array_equal(tensor.pixels, pixels.transpose(1, 2, 0))
    assert len(list(read_photos(fields, preset, 16))) == 12
    (first,) = read_photos(pixels, preset, (16, 24))  # channels first, as in a file
    np.testing.assert_array_equal(first.pixels, pixels.transpose(1, 2, 0))
    with pytest.raises(ConfigError, match=r"it has shape \(16, 24\)|and no 5 channels"):
        list(read_photos(pixels[:4], preset, 16))
    with pytest.raises(ConfigError, match="colours of mode P"):
        list(read_photos(Image.new("P", (9, 9)), preset, 16))


def test_torchvision_reads_its_images_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="channels are of image files"):
        FolderDataModule(tmp_path, torchvision="CIFAR10", channels=3)
    with pytest.raises(UnknownNameError, match="preset"):
        FolderDataModule(tmp_path, preset="squares", channels=3)
