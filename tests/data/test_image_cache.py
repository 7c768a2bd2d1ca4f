from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader

from vpt.data.cache import image_cache
from vpt.data.cache.content_hashes import cache_folder
from vpt.data.cache.image_cache import OnDemand, Ragged, decoded
from vpt.data.images import ImageList
from vpt.data.list_files import read_list
from vpt.data.transforms import PRESETS
from vpt.errors import DataError
from vpt.version import pixel_versions

Pixels = NDArray[np.uint8]
SQUARE = PRESETS["square"]


@pytest.fixture
def images(task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageList:
    monkeypatch.setenv("VPT_CACHE", str(tmp_path / "cache"))
    return read_list(task / "test.txt", task)


def array(images: ImageList, preset: str = "square", size: int = 16) -> Pixels:
    pixels = decoded(images, PRESETS[preset], size)
    assert isinstance(pixels, np.ndarray)
    return pixels


def files() -> list[str]:
    found = [path.suffix for path in cache_folder().iterdir()] if cache_folder().exists() else []
    return sorted(suffix for suffix in found if suffix != ".hashes")


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Iterator[Pixels]:
        raise AssertionError("decoded again")

    monkeypatch.setattr(image_cache, "_rows", refuse)


def test_cached_pixels_are_the_preset_applied_to_each_image(images: ImageList) -> None:
    pixels = array(images, "vpt")
    assert pixels.shape == (9, 3, 16, 16)
    assert pixels.dtype == np.uint8
    for row, path in zip(pixels, images.paths, strict=True):
        expected = PRESETS["vpt"](Image.open(images.folder / path), 16)
        np.testing.assert_array_equal(row.transpose(1, 2, 0), expected)


def test_second_call_maps_the_file_and_decodes_nothing(images: ImageList, monkeypatch: pytest.MonkeyPatch) -> None:
    first = np.array(array(images))
    forbid_decoding(monkeypatch)
    second = array(images)
    assert isinstance(second, np.memmap)
    assert not second.flags.writeable
    np.testing.assert_array_equal(first, second)
    assert files() == [".pixels"]


def test_a_thousand_images_of_224_pixels_take_150_mb() -> None:
    class Nothing:
        def __len__(self) -> int:
            return 1000

    assert OnDemand(Nothing(), SQUARE, 224).num_bytes() == 150_528_000  # type: ignore[arg-type]


def test_preset_size_and_crop_have_files_of_their_own(images: ImageList) -> None:
    for preset, size in (("square", 16), ("square", 20), ("vpt", 16), ("fgvc", 16)):
        assert array(images, preset, size).shape[-1] == size
    decoded(images, PRESETS["fgvc"], 16, cropped=False)
    assert len(files()) == 5


def test_whatever_pixels_depend_on_is_part_of_their_key(images: ImageList, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = PRESETS["timm"]
    base = OnDemand(images, preset, 16)
    others: dict[str, Any] = {"image_size": (16, 8), "cropped": False}
    assert {field.name for field in fields(base)} == {"source", "preset", *others}
    keys = [image_cache._key(base), *(image_cache._key(replace(base, **{n: v})) for n, v in others.items())]
    values: dict[str, Any] = {
        "resize": "square",
        "interpolation": "nearest",
        "normalization": "none",
        "crop_fraction": 0.5,
        "fill": (0, 0, 0),
        "channels": 3,
    }
    assert {field.name for field in fields(preset) if field.compare} == {"name", *values}
    pad = replace(preset, resize="pad")  # of no other is the fill a part
    keys += [
        image_cache._key(replace(base, preset=replace(pad if n == "fill" else preset, **{n: v})))
        for n, v in values.items()
    ]
    keys.append(image_cache._key(replace(base, preset=pad)))
    for name in pixel_versions():
        versions = pixel_versions() | {name: "another"}
        with monkeypatch.context() as patch:
            patch.setattr(image_cache, "pixel_versions", lambda versions=versions: versions)
            keys.append(image_cache._key(base))
    for path in images.paths:
        kept = (images.folder / path).read_bytes()
        (images.folder / path).write_bytes(kept + b"more")
        keys.append(image_cache._key(OnDemand(read_list(images.folder / "test.txt", images.folder), preset, 16)))
        (images.folder / path).write_bytes(kept)
    assert len(set(keys)) == len(keys) == 1 + 2 + 7 + len(pixel_versions()) + 9
    assert image_cache._key(OnDemand(read_list(images.folder / "test.txt", images.folder), preset, 16)) == keys[0]


def test_images_of_different_sizes_lie_in_one_file(task: Path, images: ImageList) -> None:
    Image.new("RGB", (17, 40), "red").save(task / images.paths[2])
    for _ in range(2):  # built; mapped
        pixels = decoded(images, PRESETS["fgvc"], 14, cropped=False)
        assert isinstance(pixels, Ragged)
        assert len(pixels) == 9
        for position, path in enumerate(images.paths):
            expected = PRESETS["fgvc"].scale(Image.open(images.folder / path), 14)
            np.testing.assert_array_equal(pixels[position].transpose(1, 2, 0), expected)
        assert pixels[2].shape == (3, 37, 16)
        assert pixels[3].shape == (3, 16, 22)
    assert files() == [".pixels"]


def test_some_images_of_a_list_have_a_file_of_their_own(images: ImageList) -> None:
    whole = array(images)
    part = decoded(images, SQUARE, 16, positions=np.array([1, 4, 8]))
    assert isinstance(part, np.ndarray)
    np.testing.assert_array_equal(part, whole[[1, 4, 8]])
    assert files() == [".pixels", ".pixels"]


def test_edited_image_is_decoded_again(images: ImageList) -> None:
    before = np.array(array(images))
    path = images.folder / images.paths[2]
    Image.new("RGB", (28, 20), "red").save(path)
    after = array(images)
    assert np.flatnonzero((before != after).any(axis=(1, 2, 3))).tolist() == [2]


def test_processes_decode_what_one_process_decodes(task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = read_list(task / "train800val200.txt", task)
    alone = np.array(array(images))
    monkeypatch.setattr(image_cache, "_IMAGES_PER_PROCESS", 9)
    monkeypatch.setattr(image_cache, "_cores", lambda: 2)
    monkeypatch.setenv("VPT_CACHE", str(tmp_path / "other"))

    def decode(images: ImageList, position: int) -> Any:
        Path(tmp_path / f"process-{os.getpid()}").touch()
        return decode_here(images, position)

    decode_here = ImageList.decode
    monkeypatch.setattr(ImageList, "decode", decode)
    np.testing.assert_array_equal(array(images), alone)
    processes = {path.name for path in tmp_path.glob("process-*")}
    assert len(processes) == 2
    assert f"process-{os.getpid()}" not in processes


def test_a_build_leaves_the_global_random_numbers_alone(images: ImageList) -> None:
    before = torch.get_rng_state()
    array(images)
    assert torch.equal(torch.get_rng_state(), before)


def test_interrupted_build_leaves_nothing(images: ImageList, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> Iterator[Pixels]:
        yield np.zeros((3, 16, 16), dtype=np.uint8)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(image_cache, "_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            array(images)
    assert files() == []
    assert array(images).any()


def slow(rows: Callable[[OnDemand], Iterator[Pixels]], seconds: float) -> Callable[[OnDemand], Iterator[Pixels]]:
    def slowly(images: OnDemand) -> Iterator[Pixels]:
        for row in rows(images):
            yield row
            time.sleep(seconds)

    return slowly


def in_a_process(work: Callable[[], Any]) -> Any:
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it did not happen within ten seconds")


def test_a_killed_build_leaves_no_cache(images: ImageList, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(image_cache, "_rows", slow(image_cache._rows, 3600))
        process = in_a_process(lambda: decoded(images, SQUARE, 16))
        wait_for(lambda: files() == [".part"])
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert files() == [".part"]
    expected = np.stack(list(image_cache._rows(OnDemand(images, SQUARE, 16))))
    np.testing.assert_array_equal(array(images), expected)
    assert files() == [".part", ".pixels"]  # the part may be another's that is alive ...
    (left,) = cache_folder().glob("*.part")
    os.utime(left, (0, 0))
    array(images, size=20)
    assert files() == [".pixels", ".pixels"]  # ... until it has not been written to for an hour


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes as Linux shows them")
def test_no_process_outlives_the_build_that_started_it(
    images: ImageList, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has more to hand over than a pipe holds, and holds the pipe of the other open."""
    monkeypatch.setattr(image_cache, "_IMAGES_PER_PROCESS", 2)
    monkeypatch.setattr(image_cache, "_cores", lambda: 2)

    def large(*_: object) -> Pixels:
        (tmp_path / f"decoding-{os.getpid()}").touch()
        return np.zeros((3, 500, 500), np.uint8)

    monkeypatch.setattr(OnDemand, "__getitem__", large)
    monkeypatch.setattr(image_cache, "_rows", slow(image_cache._rows, 3600))
    many = images.take(np.arange(64) % 9)
    process = in_a_process(lambda: decoded(many, SQUARE, 16))
    wait_for(lambda: len([*tmp_path.glob("decoding-*")]) == 2)
    workers = [int(path.name.rpartition("-")[2]) for path in tmp_path.glob("decoding-*")]
    assert all(map(alive, workers))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    try:
        wait_for(lambda: not any(map(alive, workers)))
    finally:
        for worker in filter(alive, workers):
            os.kill(worker, signal.SIGKILL)


def test_processes_that_build_the_same_cache_end_with_one_whole_file(
    images: ImageList, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = np.stack(list(image_cache._rows(OnDemand(images, SQUARE, 16))))
    together = multiprocessing.get_context("fork").Barrier(3)
    rows = image_cache._rows

    def at_once(source: OnDemand) -> Iterator[Pixels]:
        for position, row in enumerate(rows(source)):
            if position == 1:
                together.wait(timeout=60)  # all three have begun to write
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(image_cache, "_rows", at_once)
        processes = [in_a_process(lambda: decoded(images, SQUARE, 16)) for _ in range(3)]
        for process in processes:
            process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert files() == [".pixels"]
    forbid_decoding(monkeypatch)
    np.testing.assert_array_equal(array(images), expected)


@pytest.mark.parametrize("cropped", [True, False])
def test_truncated_cache_file_is_built_again(images: ImageList, task: Path, cropped: bool) -> None:
    Image.new("RGB", (17, 40), "red").save(task / images.paths[2])
    built = decoded(images, PRESETS["fgvc"], 14, cropped=cropped)
    expected = [np.array(built[position]) for position in range(9)]
    (path,) = cache_folder().glob("*.pixels")
    for size in (path.stat().st_size - 1, path.stat().st_size - 72, 72, 40, 0):
        os.truncate(path, size)
        again = decoded(images, PRESETS["fgvc"], 14, cropped=cropped)
        for position in range(9):
            np.testing.assert_array_equal(again[position], expected[position])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_fills_up_is_one_sentence_and_leaves_nothing(
    images: ImageList, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    opened = Path.open

    def open_on_a_small_disk(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = opened(path, mode, *args, **options)
        if "w" not in mode:
            return file
        write, written = file.write, 0

        class Small:
            def __enter__(self) -> Any:
                file.__enter__()
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def write(self, data: bytes) -> None:
                nonlocal written
                written += write(data)
                if written > 3000:
                    raise OSError(code, os.strerror(code))

        return Small()

    monkeypatch.setattr(Path, "open", open_on_a_small_disk)
    with pytest.raises(DataError) as caught:
        array(images)
    message = str(caught.value)
    assert message.startswith(f"The disk of {cache_folder()} is full: the images of fake-test need 0.0 MB. Free space,")
    assert "\n" not in message
    assert files() == []


def test_unwritable_cache_means_decoding_on_demand_and_says_so(
    images: ImageList, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = np.array(array(images))
    (tmp_path / "file").touch()
    monkeypatch.setenv("VPT_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match=r"cannot be written: .*; set VPT_CACHE to another folder"):
        pixels = decoded(images, SQUARE, 16)
    assert isinstance(pixels, OnDemand)
    np.testing.assert_array_equal(np.stack([pixels[position] for position in range(9)]), expected)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_read_only_cache_folder_means_decoding_on_demand(
    images: ImageList, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    opened = Path.open

    def refuse(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if "w" in mode:
            raise OSError(code, os.strerror(code))
        return opened(path, mode, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)  # the tests may run as root, whom no permission stops
    with pytest.warns(UserWarning, match=f"cannot be written: .*{os.strerror(code)}"):
        assert isinstance(decoded(images, SQUARE, 16), OnDemand)


def starve(*_: object) -> Iterator[Any]:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_processes_that_cannot_be_started_are_one_sentence_and_not_laid_on_the_cache(
    images: ImageList, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DataLoader, "__iter__", starve)
    with pytest.raises(
        DataError, match=r"processes that decode fake-test have failed \(.*Too many open files\)"
    ) as caught:
        array(images)
    assert "\n" not in str(caught.value)
    assert files() == []


def test_a_decoding_process_that_is_killed_is_one_sentence(images: ImageList, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_cache, "_IMAGES_PER_PROCESS", 9)
    monkeypatch.setattr(image_cache, "_cores", lambda: 1)
    monkeypatch.setattr(ImageList, "decode", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match=r"have failed \(DataLoader worker .*\): give them more memory") as caught:
        array(images)
    assert "\n" not in str(caught.value)
    assert files() == []


@pytest.mark.slow
def test_real_photos_are_the_same_from_processes_and_from_one(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VPT_CACHE", str(tmp_path))
    photos = read_list(real_data / "caltech101" / "val200.txt", real_data / "caltech101")
    for cropped in (True, False):
        pixels = decoded(photos, PRESETS["fgvc"], 32, cropped=cropped)
        alone = OnDemand(photos, PRESETS["fgvc"], 32, cropped)
        assert isinstance(pixels, np.ndarray if cropped else Ragged)
        assert all((pixels[position] == alone[position]).all() for position in range(200))


def test_a_list_too_large_for_the_disk_is_decoded_on_demand(images: ImageList, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 9 * 3 * 16 * 16
    free = int(size / image_cache.DISK_SHARE)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free - 1))
    with pytest.warns(UserWarning, match="are decoded anew in every epoch .*they need 0.0 MB of the 0.0 MB free"):
        pixels = decoded(images, SQUARE, 16)
    assert isinstance(pixels, OnDemand)
    assert files() == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free))
    assert isinstance(decoded(images, SQUARE, 16), np.ndarray)


@pytest.mark.parametrize("fault", ["missing", "truncated"])
@pytest.mark.parametrize("processes", [0, 2])
def test_first_bad_image_is_named_and_nothing_is_cached(
    images: ImageList, fault: str, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_cache, "_IMAGES_PER_PROCESS", 1)
    monkeypatch.setattr(image_cache, "_cores", lambda: processes)
    for position in (6, 3):
        path = images.folder / images.paths[position]
        path.unlink() if fault == "missing" else path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match="line 4") as caught:
        array(images)
    assert "\n" not in str(caught.value)
    assert files() == []


def test_image_removed_after_caching_is_still_missed(images: ImageList) -> None:
    array(images)
    (images.folder / images.paths[0]).unlink()
    with pytest.raises(DataError, match=r"line 1: .* does not exist"):
        array(images)


def test_clearing_removes_what_the_cache_wrote_and_nothing_else(images: ImageList) -> None:
    assert image_cache.usage() == image_cache.clear() == (0, 0)
    array(images)
    (path,) = cache_folder().glob("*.pixels")
    path.with_name(f"{path.name}.0.part").write_bytes(b"abc")
    (cache_folder() / "notes.txt").touch()
    assert image_cache.usage() == (2, path.stat().st_size + 3)
    assert image_cache.clear() == (2, 9 * (3 * 16 * 16 + 8) + 3)
    assert image_cache.usage() == (0, 0)
    assert files() == [".txt"]


def test_nothing_is_written_where_the_images_are(images: ImageList) -> None:
    def tree() -> list[tuple[str, int]]:
        return sorted((str(path), path.stat().st_mtime_ns) for path in [images.folder, *images.folder.rglob("*")])

    before = tree()
    array(images)
    assert tree() == before
