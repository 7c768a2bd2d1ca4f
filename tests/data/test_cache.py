from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from vpt.data import cache
from vpt.data.cache import cache_folder, decoded
from vpt.data.images import ImageList, read_list
from vpt.data.presets import PRESETS
from vpt.errors import DataError


@pytest.fixture
def images(task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageList:
    monkeypatch.setenv("VPT_CACHE", str(tmp_path / "cache"))
    return read_list(task / "test.txt", task)


def files() -> list[str]:
    return sorted(path.suffix for path in cache_folder().iterdir())


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Iterator[NDArray[np.uint8]]:
        raise AssertionError("decoded again")

    monkeypatch.setattr(cache, "_rows", refuse)


def test_cached_pixels_are_the_preset_applied_to_each_image(images: ImageList) -> None:
    pixels = decoded(images, PRESETS["vpt"], 16)
    assert pixels.shape == (9, 3, 16, 16)
    assert pixels.dtype == np.uint8
    for row, path in zip(pixels, images.paths, strict=True):
        expected = PRESETS["vpt"](Image.open(images.folder / path), 16)
        np.testing.assert_array_equal(row.transpose(1, 2, 0), expected)


def test_second_call_maps_the_file_and_decodes_nothing(images: ImageList, monkeypatch: pytest.MonkeyPatch) -> None:
    first = decoded(images, PRESETS["square"], 16)
    forbid_decoding(monkeypatch)
    second = decoded(images, PRESETS["square"], 16)
    assert isinstance(second, np.memmap)
    np.testing.assert_array_equal(first, second)
    assert files() == [".npy"]


def test_preset_and_size_have_files_of_their_own(images: ImageList) -> None:
    for preset, size in (("square", 16), ("square", 20), ("vpt", 16)):
        assert decoded(images, PRESETS[preset], size).shape[-1] == size
    assert len(files()) == 3


def test_edited_image_is_decoded_again(images: ImageList) -> None:
    before = np.array(decoded(images, PRESETS["square"], 16))
    path = images.folder / images.paths[2]
    Image.new("RGB", (28, 20), "red").save(path)
    after = decoded(images, PRESETS["square"], 16)
    assert np.flatnonzero((before != after).any(axis=(1, 2, 3))).tolist() == [2]


def test_interrupted_build_leaves_nothing(images: ImageList, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> Iterator[NDArray[np.uint8]]:
        yield np.zeros((3, 16, 16), dtype=np.uint8)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decoded(images, PRESETS["square"], 16)
    assert files() == []
    assert decoded(images, PRESETS["square"], 16).any()


def test_truncated_cache_file_is_built_again(images: ImageList) -> None:
    expected = np.array(decoded(images, PRESETS["square"], 16))
    (path,) = cache_folder().iterdir()
    for size in (path.stat().st_size - 1, 40, 0):
        os.truncate(path, size)
        np.testing.assert_array_equal(decoded(images, PRESETS["square"], 16), expected)


def test_two_builders_at_once_end_with_one_whole_file(images: ImageList, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = cache._rows
    depth = 0

    def interrupted_by_another(*arguments: object) -> Iterator[NDArray[np.uint8]]:
        nonlocal depth
        for number, row in enumerate(rows(*arguments)):  # type: ignore[arg-type]
            if number == 4 and depth == 0:
                depth += 1
                decoded(images, PRESETS["square"], 16)
            yield row

    monkeypatch.setattr(cache, "_rows", interrupted_by_another)
    pixels = decoded(images, PRESETS["square"], 16)
    assert depth == 1
    assert files() == [".npy"]
    np.testing.assert_array_equal(pixels, np.stack(list(rows(images, PRESETS["square"], 16))))


def test_unwritable_cache_falls_back_to_memory_and_says_so(
    images: ImageList, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = np.array(decoded(images, PRESETS["square"], 16))
    (tmp_path / "file").touch()
    monkeypatch.setenv("VPT_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="set VPT_CACHE to a writable folder"):
        pixels = decoded(images, PRESETS["square"], 16)
    assert not isinstance(pixels, np.memmap)
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("fault", ["missing", "truncated"])
def test_first_bad_image_is_named_and_nothing_is_cached(images: ImageList, fault: str) -> None:
    for position in (6, 3):
        path = images.folder / images.paths[position]
        path.unlink() if fault == "missing" else path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match="line 4"):
        decoded(images, PRESETS["square"], 16)
    assert not cache_folder().exists() or files() == []


def test_image_removed_after_caching_is_still_missed(images: ImageList) -> None:
    decoded(images, PRESETS["square"], 16)
    (images.folder / images.paths[0]).unlink()
    with pytest.raises(DataError, match=r"line 1: .* does not exist"):
        decoded(images, PRESETS["square"], 16)
