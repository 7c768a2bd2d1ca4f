"""Images are known by their content: wherever they lie, whatever they are called."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tasks.test_tasks import trainer
from vpt.data import FolderDataModule
from vpt.data.cache import content_hashes, image_cache
from vpt.data.cache.content_hashes import cache_folder
from vpt.data.cache.image_cache import decoded
from vpt.data.datasets.torchvision_datasets import TorchvisionList
from vpt.data.images import ImageList
from vpt.data.list_files import read_list
from vpt.data.transforms import PRESETS
from vpt.errors import DataError, VPTWarning
from vpt.models.feature_cache import share
from vpt.tasks import LinearProbe
from vpt.version import pixel_versions

SQUARE = PRESETS["square"]


def folder(root: Path, seed: int = 0, each: int = 4) -> Path:
    """Two classes of noise, in train and test."""
    random = np.random.default_rng(seed)
    for split in ("train", "test"):
        for name in ("a", "b"):
            home = root / split / name
            home.mkdir(parents=True)
            for number in range(each):
                pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(home / f"{number}.bmp")  # all files have one size
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(content_hashes, "_SETTLED_AFTER", -1.0)  # hashes are kept of files that were written just now


def test_equal_lists_of_other_images_are_other_data_and_a_copy_is_the_same(tmp_path: Path) -> None:
    one, other = folder(tmp_path / "one" / "x"), folder(tmp_path / "other" / "x", seed=1)
    copy = shutil.copytree(one, tmp_path / "copy" / "x")
    prints = [FolderDataModule(root, image_size=16).describe()["fingerprint"] for root in (one, other, copy)]
    assert prints[0] == prints[2] != prints[1]


def test_an_image_that_is_overwritten_or_changes_places_is_another_one(tmp_path: Path) -> None:
    root = folder(tmp_path / "x")
    lists = [FolderDataModule(root, image_size=16).describe()["fingerprints"]]
    pixels = np.array(FolderDataModule(root, image_size=16).split("test").images)
    first, second, spare = (root / "test" / "a" / name for name in ("0.bmp", "1.bmp", "spare"))
    for file in (first, second):
        os.utime(file, (1e9, 1e9))  # two files of one size and one time ...
    lists.append(FolderDataModule(root, image_size=16).describe()["fingerprints"])
    for here, there in ((first, spare), (second, first), (spare, second)):
        here.rename(there)  # ... which moving them keeps
    moved = FolderDataModule(root, image_size=16)
    lists.append(moved.describe()["fingerprints"])
    np.testing.assert_array_equal(moved.split("test").images[:2], pixels[[1, 0]])
    assert lists[0] == lists[1]
    assert lists[0]["train"] == lists[2]["train"]
    assert lists[0]["test"] != lists[2]["test"]


def test_hashes_are_read_once_and_again_only_when_a_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "list.txt").write_text("a.bmp 0\nb.bmp 1\n")
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{name}.bmp")
    images, reads = read_list(tmp_path / "list.txt", tmp_path), list[int]()
    content = ImageList._content

    def counted(self: ImageList, position: int) -> bytes:
        reads.append(position)
        return content(self, position)

    monkeypatch.setattr(ImageList, "_content", counted)
    first = images.contents()
    assert np.array_equal(images.contents(), first)
    assert reads == [0, 1]
    assert len(list(cache_folder().glob("*.hashes"))) == 1
    Image.new("RGB", (4, 4), "green").save(tmp_path / "b.bmp")
    assert (images.contents() != first).any(axis=1).tolist() == [False, True]
    (tmp_path / "a.bmp").unlink()
    assert not images.contents()[0].any()
    with pytest.raises(DataError, match="does not exist"):
        decoded(images, SQUARE, 4)


def test_a_file_that_may_still_change_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content_hashes, "_SETTLED_AFTER", 3600.0)
    (tmp_path / "list.txt").write_text("a.bmp 0\n")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.bmp")
    read_list(tmp_path / "list.txt", tmp_path).contents()
    assert not list(cache_folder().glob("*.hashes"))


@pytest.mark.parametrize("package", ["pillow", "numpy", "opencv-python-headless"])
def test_other_libraries_make_other_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    (tmp_path / "list.txt").write_text("a.bmp 0\n")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.bmp")
    images = read_list(tmp_path / "list.txt", tmp_path)
    decoded(images, SQUARE, 4)
    found = pixel_versions()
    monkeypatch.setattr(image_cache, "pixel_versions", lambda: found | {package: "0"})
    decoded(images, SQUARE, 4)
    assert len(list(cache_folder().glob("*.pixels"))) == 2


SPELLINGS = ("train/a/0.bmp", "./train/a/0.bmp", "{root}/train/a/0.bmp", "test/../train/a/0.bmp", "copy.bmp")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_trained_image_is_found_among_test_images_however_it_is_spelled(tmp_path: Path, spelling: str) -> None:
    root = folder(tmp_path / "x")
    shutil.copy(root / "train" / "a" / "0.bmp", root / "copy.bmp")
    rows = [
        f"train/{name}/{i}.bmp,{name},{split}" for i, split in enumerate(("train", "train", "val")) for name in "ab"
    ]
    table = root / "table.csv"
    table.write_text("\n".join(["path,label,split", *rows, f"{spelling.format(root=root)},a,test\n"]))
    if spelling == "copy.bmp":
        assert FolderDataModule(table, image_size=16).describe()["shared_with_train"] == {"val": 0, "test": 1}
    else:
        with pytest.raises(DataError, match="is listed on line 2 already"):
            FolderDataModule(table, image_size=16)


def test_one_image_under_two_labels_is_said_before_training(tmp_path: Path) -> None:
    root = folder(tmp_path / "x")
    shutil.copy(root / "train" / "a" / "0.bmp", root / "train" / "b" / "9.bmp")
    shutil.copytree(root / "test", root / "val")
    data = FolderDataModule(root, image_size=16)
    with pytest.warns(VPTWarning, match=r"train/a/0\.bmp .*'a'.* train/b/9\.bmp .*'b'"):
        data.setup("fit")


def test_what_a_torchvision_dataset_was_asked_for_is_part_of_what_its_images_are(tmp_path: Path) -> None:
    class Fake:
        root = str(tmp_path)

        def __init__(self, shade: int) -> None:
            self.shade = shade

        def __getitem__(self, position: int) -> tuple[Image.Image, int]:
            return Image.new("RGB", (4, 4), (self.shade, position, 0)), 0

    (tmp_path / "file").touch()
    zero = np.zeros(2, dtype=np.int64)
    lists = [TorchvisionList(Fake(n), "dtd-test", f"DTD partition {n}", np.arange(2), zero) for n in (1, 2)]
    assert not (lists[0].contents() == lists[1].contents()).all(axis=1).any()


def test_features_of_one_folder_are_not_served_to_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vpt.models.feature_cache._shared", None)
    share()
    found = []
    for root in (folder(tmp_path / "one" / "x"), folder(tmp_path / "other" / "x", seed=1)):
        torch.manual_seed(0)
        task = LinearProbe(backbone="test_vit", weights="random:1", num_classes=2, image_size=160)
        data = FolderDataModule(root, image_size=160, batch_size=4, val_fraction=0.5, seed=0)
        trainer(epochs=1).fit(task, datamodule=data)
        batch = next(iter(data.val_dataloader()))
        with torch.no_grad():
            torch.testing.assert_close(task.features(batch, "val"), task.model.encode(batch["image"]))
        found.append(task.features(batch, "val"))
    assert not torch.equal(*found)
