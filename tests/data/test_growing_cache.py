"""Large lists: images are decoded when they are first read, and what they are is found out when it is needed."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from numpy.typing import NDArray
from PIL import Image

from vpt.data import FolderDataModule
from vpt.data.cache import content_hashes, image_cache
from vpt.data.cache.growing_cache import GrowingCache
from vpt.data.images import ImageList
from vpt.data.transforms import get_preset
from vpt.errors import ConfigError, DataError, VPTWarning
from vpt.tasks import PromptTuning, RunRecord
from vpt.tasks.counted_images import CountedImages

PRESET = get_preset("square")
SIZE = 64
LARGE_MODULES = ("vpt.data.cache.content_hashes", "vpt.data.cache.image_cache", "vpt.data.splits")


def paint(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (20 + number % 3, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    past = time.time() - 3600
    os.utime(path, (past, past))


@pytest.fixture(autouse=True)
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every list of more than five images is large, and files have not just changed."""
    monkeypatch.setenv("VPT_CACHE", str(tmp_path / "cache"))
    for module in LARGE_MODULES:
        monkeypatch.setattr(f"{module}.LARGE", 5)
    monkeypatch.setattr(content_hashes, "_SETTLED_AFTER", -1.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(24):
        paint(tmp_path / "photos" / f"class_{number % 2}" / f"{number:02d}.png", number)
    return tmp_path / "photos"


@pytest.fixture
def images(folder: Path) -> ImageList:
    paths = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    return ImageList(folder, folder, paths, np.zeros(len(paths), dtype=np.int64), ())


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The positions that are decoded, in the order in which they are."""
    seen: list[int] = []
    decode = ImageList.decode

    def note(self: ImageList, position: int) -> Any:
        seen.append(position)
        return decode(self, position)

    monkeypatch.setattr(ImageList, "decode", note)
    return seen


def expected(images: ImageList, position: int) -> NDArray[np.uint8]:
    with Image.open(images.folder / images.paths[position]) as image:
        return PRESET(image.convert("RGB"), (SIZE, SIZE)).transpose(2, 0, 1)


def grown(images: ImageList) -> GrowingCache:
    found = image_cache.decoded(images, PRESET, SIZE)
    assert isinstance(found, GrowingCache)
    return found


def test_an_image_is_decoded_when_it_is_first_read_and_only_then(images: ImageList, decodings: list[int]) -> None:
    cache = grown(images)
    assert (len(cache), decodings) == (24, [])
    for position in (3, 7, 3, 7):
        assert np.array_equal(cache[position], expected(images, position))
    assert decodings == [3, 7]
    assert np.array_equal(grown(images)[7], expected(images, 7))
    assert decodings == [3, 7]


def test_several_images_come_in_the_order_asked_for(images: ImageList, decodings: list[int]) -> None:
    cache, order = grown(images), [5, 2, 11, 2, 20]
    cache.rows([2, 20])
    rows = cache.rows(order)
    assert rows.dtype == np.uint8
    for row, position in zip(rows, order, strict=True):
        assert np.array_equal(row, expected(images, position))
    assert sorted(decodings) == [2, 5, 11, 20]


@pytest.mark.parametrize("change", ["other image", "other time", "other size of the list"])
def test_an_image_that_has_changed_is_decoded_anew(images: ImageList, decodings: list[int], change: str) -> None:
    grown(images).rows(range(4))
    path = images.folder / images.paths[1]
    if change == "other image":
        paint(path, 99)
    elif change == "other time":
        os.utime(path, (1.0, 1.0))
    else:
        images = images.take(np.arange(20))
    decodings.clear()
    for position in range(4):
        assert np.array_equal(grown(images)[position], expected(images, position))
    assert decodings == ([0, 1, 2, 3] if change == "other size of the list" else [1])


def test_a_row_that_was_not_written_whole_is_decoded_anew(images: ImageList, decodings: list[int]) -> None:
    cache = grown(images)
    cache.rows(range(4))
    with cache.path.open("r+b") as file:
        file.seek(2 * 3 * SIZE * SIZE + 100)
        file.write(b"\0" * 50)
    decodings.clear()
    assert np.array_equal(grown(images)[2], expected(images, 2))
    assert decodings == [2]


def test_a_file_that_has_just_changed_is_not_kept(
    images: ImageList, decodings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content_hashes, "_SETTLED_AFTER", 1e9)
    for _ in range(2):
        assert np.array_equal(grown(images)[0], expected(images, 0))
    assert decodings == [0, 0]


def test_a_cache_of_another_length_is_made_anew(images: ImageList) -> None:
    cache = grown(images)
    cache.rows(range(24))
    os.truncate(cache.path, cache.path.stat().st_size - 1)
    assert np.array_equal(grown(images)[23], expected(images, 23))


def test_a_full_disk_leaves_images_that_are_decoded_each_time(
    images: ImageList, decodings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(28, "No space left on device")

    cache = grown(images)
    monkeypatch.setattr("vpt.data.cache.growing_cache.os.pwrite", refuse)
    with pytest.warns(VPTWarning, match="cannot grow .No space left on device.*Free space, or set VPT_CACHE"):
        cache[0]
    for _ in range(2):
        assert np.array_equal(cache[0], expected(images, 0))
    assert decodings == [0, 0, 0]


def test_a_pickle_holds_no_pixels(images: ImageList, decodings: list[int]) -> None:
    cache = grown(images)
    cache.rows(range(24))
    content = pickle.dumps(cache)
    assert len(content) < 3 * SIZE * SIZE
    decodings.clear()
    assert np.array_equal(pickle.loads(content)[9], expected(images, 9))  # noqa: S301  # our own
    assert decodings == []


def fill(images: ImageList, order: list[int]) -> None:
    cache = grown(images)
    for position in order:
        cache[position]


def test_processes_fill_one_file(images: ImageList, decodings: list[int]) -> None:
    orders = [list(range(24)), list(reversed(range(24)))]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill, args=(images, order)) for order in orders]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    cache = grown(images)
    for position in range(24):
        assert np.array_equal(cache[position], expected(images, position))
    assert decodings == []
    assert len(list(cache.path.parent.glob("*.pixels"))) == 1


def fill_until_killed(images: ImageList) -> None:
    cache = grown(images)
    for position in range(24):
        if position == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        cache[position]


def test_what_was_decoded_before_a_process_was_killed_is_kept(images: ImageList, decodings: list[int]) -> None:
    process = multiprocessing.get_context("fork").Process(target=fill_until_killed, args=(images,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    cache = grown(images)
    for position in range(24):
        assert np.array_equal(cache[position], expected(images, position))
    assert decodings == list(range(9, 24))


def test_the_file_takes_the_space_of_what_it_holds(images: ImageList) -> None:
    row = 3 * SIZE * SIZE
    cache = grown(images)
    assert cache.path.stat().st_size > 24 * row
    assert image_cache.usage()[1] < 3 * row
    cache.rows(range(24))
    assert image_cache.usage()[1] > 24 * row
    assert image_cache.clear()[0] == 1


def test_images_before_a_crop_are_decoded_each_time(images: ImageList) -> None:
    with pytest.warns(VPTWarning, match="they are more than 5, of different sizes"):
        found = image_cache.decoded(images, get_preset("fgvc"), SIZE, cropped=False)
    assert isinstance(found, image_cache.OnDemand)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_one_sentence_in_the_middle_of_an_epoch(folder: Path, workers: int) -> None:
    (folder / "class_0" / "04.png").write_bytes(b"no image")
    data = FolderDataModule(folder, image_size=SIZE, batch_size=4, num_workers=workers)
    loaders = (loader() for loader in (data.train_dataloader, data.val_dataloader, data.test_dataloader))
    batches = itertools.chain.from_iterable(loaders)
    with pytest.raises(DataError, match=r"^.*04\.png is not an image; restore the file or remove it\.$"):
        list(batches)


@pytest.mark.parametrize("augment", ["none", "flip"])
def test_batches_are_those_of_a_small_list(folder: Path, monkeypatch: pytest.MonkeyPatch, augment: str) -> None:
    def batches() -> Iterator[dict[str, Any]]:
        data = FolderDataModule(folder, image_size=SIZE, batch_size=5, seed=3, augment=augment)
        assert isinstance(data.split("train").images, GrowingCache) is (vars(image_cache)["LARGE"] == 5)
        for epoch in range(2):
            loader = data.train_dataloader()
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            yield from loader

    grows = list(batches())
    monkeypatch.setattr("vpt.data.cache.image_cache.LARGE", 100)
    for ours, theirs in zip(grows, batches(), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


BASE: dict[str, Any] = {"backbone": "vit_nano_patch8_64", "weights": "random", "num_classes": 2, "num_tokens": 2}


def trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    given: dict[str, Any] = {"max_epochs": 2, "callbacks": [RunRecord()], **quiet, **options}
    return L.Trainer(default_root_dir=folder, **given)


def test_no_image_is_hashed_before_the_first_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    contents, step = ImageList.contents, PromptTuning.training_step

    def note_contents(self: ImageList) -> Any:
        order.extend(["hash"] * (len(self) > 5))  # small lists are hashed before they are decoded
        return contents(self)

    def note_step(self: PromptTuning, *args: Any) -> Any:
        order.append("step")
        return step(self, *args)

    monkeypatch.setattr(ImageList, "contents", note_contents)
    monkeypatch.setattr(PromptTuning, "training_step", note_step)
    data = FolderDataModule(folder, image_size=SIZE, batch_size=4)
    keep = ModelCheckpoint(dirpath=tmp_path / "kept", save_last=True)
    run = trainer(tmp_path, callbacks=[RunRecord(), keep], enable_checkpointing=True)
    before = data.hashed
    run.fit(PromptTuning(**BASE), datamodule=data)
    assert (before, data.hashed) == (False, True)
    assert order[0] == "step"
    assert "hash" in order
    kept = torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)["protocol"]
    described = data.describe()
    assert kept["data.fingerprint"] == described["fingerprint"]
    small = FolderDataModule(folder, image_size=SIZE, batch_size=4)
    monkeypatch.setattr("vpt.data.splits.LARGE", 100)
    assert small.hashed
    assert small.describe() == described


def test_validation_images_that_are_trained_on_do_not_count_from_the_first_validation_on(
    folder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    for part in ("train", "val"):
        shutil.copytree(folder, tmp_path / "split" / part)
    for number in range(100, 104):
        paint(tmp_path / "split" / "val" / "class_0" / f"{number}.png", number)
    copy = tmp_path / "split" / "train" / "class_1" / "again.png"
    shutil.copy2(tmp_path / "split" / "train" / "class_0" / "00.png", copy)
    data = FolderDataModule(tmp_path / "split", image_size=SIZE, batch_size=4)
    task = PromptTuning(**BASE)
    run = trainer(tmp_path, max_epochs=1, callbacks=[])
    run.fit(task, datamodule=data)
    known = FolderDataModule(tmp_path / "split", image_size=SIZE, batch_size=4)
    known.describe()
    other = PromptTuning(**BASE)
    other.load_state_dict(task.state_dict())
    (found,) = trainer(tmp_path).validate(other, datamodule=known, verbose=False)
    assert float(run.callback_metrics["val/loss"]) == pytest.approx(found["val/loss"], rel=1e-6)
    assert any("1 training images are others of another class again" in str(each.message) for each in recwarn)


def test_validation_images_that_are_all_trained_on_under_other_names_are_refused(folder: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        shutil.copytree(folder, tmp_path / "split" / part)
    data = FolderDataModule(tmp_path / "split", image_size=SIZE, batch_size=4)
    with pytest.raises(ConfigError, match="All validation images of split are trained on, under other names: give"):
        trainer(tmp_path, callbacks=[]).fit(PromptTuning(**BASE), datamodule=data)


def test_a_few_shots_of_a_large_list_are_decoded_at_once_and_none_is_hashed(
    folder: Path, decodings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = ImageList.contents

    def of_small_lists(self: ImageList) -> Any:
        assert len(self) <= 5
        return contents(self)

    monkeypatch.setattr(ImageList, "contents", of_small_lists)
    data = FolderDataModule(folder, image_size=SIZE, shots=2)
    data.setup("fit")
    assert len(data.split("train")) == 4
    assert len(decodings) == 4 + len(data.split("val"))
    assert not data.hashed


def test_validation_images_that_are_trained_on_by_name_are_known_before_training(folder: Path) -> None:
    data = FolderDataModule(folder, image_size=SIZE, batch_size=4, train_on_val=True)
    counted = CountedImages()
    counted.look(data, True, None)
    assert counted.none
    assert not data.hashed
