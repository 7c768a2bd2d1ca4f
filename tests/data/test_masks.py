"""Masks stay with their images, classes mean what they say, and bad files are named in a sentence."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.fakes_suites import make_pets
from vpt.data import PetTrimapsDataModule, ShapeScenesDataModule
from vpt.data.catalog.cards import load_card
from vpt.data.catalog.overview import image_lists, overview
from vpt.data.datasets.demo import SCENE_CLASSES, draw_scene
from vpt.errors import ConfigError, DataError, UnknownNameError


def test_scenes_have_the_sizes_of_the_other_demos_and_are_complete() -> None:
    description = ShapeScenesDataModule().describe()
    assert description["counts"] == {"train": 1000, "val": 200, "test": 1000}
    assert description["complete"] is True
    assert ShapeScenesDataModule(train="train800").describe()["shared_with_train"] == {"val": 0, "test": 0}


def test_no_scene_is_in_two_splits() -> None:
    data = ShapeScenesDataModule(train="train800", image_size=16)
    for one, other in combinations(map(data.split, ("train", "val", "test")), 2):
        assert not {image.tobytes() for image in one.images} & {image.tobytes() for image in other.images}


def test_scenes_do_not_depend_on_the_seed_of_the_run() -> None:
    one, other = (ShapeScenesDataModule(seed=seed, image_size=16) for seed in (0, 5))
    assert one.describe()["fingerprint"] == other.describe()["fingerprint"]
    np.testing.assert_array_equal(one.split("val").images, other.split("val").images)


@pytest.mark.parametrize("size", [16, 32])
def test_a_batch_holds_images_masks_and_positions(size: int) -> None:
    data = ShapeScenesDataModule(image_size=size, batch_size=7, train="train800")
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    assert set(batch) == {"image", "mask", "index"}
    assert (batch["image"].shape, batch["image"].dtype) == ((7, 3, size, size), torch.uint8)
    assert (batch["mask"].shape, batch["mask"].dtype) == ((7, size, size), torch.uint8)
    assert batch["index"].tolist() == list(range(7))
    image, mask = draw_scene(800 + 3, size)
    assert torch.equal(batch["image"][3], torch.from_numpy(image.copy()))
    assert torch.equal(batch["mask"][3], torch.from_numpy(mask))
    item = data.split("val")[3]
    assert torch.equal(item["mask"], batch["mask"][3])


def test_every_class_occurs_and_the_mask_is_where_the_shape_is() -> None:
    drawn = [draw_scene(number, 64) for number in range(40)]
    masks = np.stack([mask for _, mask in drawn])
    assert set(np.unique(masks)) == set(range(len(SCENE_CLASSES)))
    assert 0.5 < (masks == 0).mean() < 0.9
    steps = [np.abs(np.diff(image.astype(float), axis=2)).mean(axis=0) for image, _ in drawn]

    def at_edges(turned: bool) -> float:
        """How much the colour changes where the class does, mean over all images."""
        edges = [np.diff((mask[:, ::-1] if turned else mask).astype(int), axis=1) != 0 for _, mask in drawn]
        return float(np.concatenate([step[edge] for step, edge in zip(steps, edges, strict=True)]).mean())

    assert at_edges(turned=False) > 2 * at_edges(turned=True)


def test_a_worker_opens_the_masks_anew() -> None:
    split = ShapeScenesDataModule(image_size=16).split("val")
    again = copy.copy(split)  # by the same two methods that take it to a process
    assert torch.equal(again.batch([5])["mask"], split.batch([5])["mask"])
    assert len(pickle.dumps(split)) < 100_000


def test_unknown_lists_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'train800'"):
        ShapeScenesDataModule(train="train80")


def pets(root: Path, **options: Any) -> PetTrimapsDataModule:
    defaults: dict[str, Any] = {"root": root, "image_size": 16, "allow_partial": True, "batch_size": 4}
    return PetTrimapsDataModule(**defaults | options)


def test_trimaps_become_classes_where_they_are(tmp_path: Path) -> None:
    """The fake: left half pet, right half background, a column of border between them; the pet is white."""
    make_pets(tmp_path)
    data = pets(tmp_path, image_size=24)  # the width of the fake
    batch = data.split("test").batch([0, 1])
    row = batch["mask"][0, 8].tolist()
    assert row == [1] * 11 + [2] * 2 + [0] * 11
    assert data.class_names == ["background", "pet", "border"]
    assert batch["image"][0, :, 8, 2].min() > 200  # the image shows the pet on the same side
    assert batch["image"][0, :, 8, 21].max() < 50


def test_masks_are_resized_by_nearest_neighbour_with_the_images_geometry(tmp_path: Path) -> None:
    make_pets(tmp_path)
    for preset, size in (("square", 10), ("timm", 10), ("vpt", 40)):
        batch = pets(tmp_path, preset=preset, image_size=size).split("test").batch([0])
        assert batch["mask"].shape[1:] == batch["image"].shape[2:] == (size, size)
        assert set(batch["mask"].unique().tolist()) <= {0, 1, 2}
        bright = batch["image"][0].float().mean(dim=0) > 127
        mask = batch["mask"][0]
        assert (bright == (mask == 1))[mask != 2].float().mean() > 0.9


@pytest.mark.parametrize("orientation", [3, 6, 7])
def test_a_mask_is_turned_upright_with_its_photograph(tmp_path: Path, orientation: int) -> None:
    path = make_pets(tmp_path) / "images" / "Breed_0_3.jpg"
    stored = Image.open(path)
    stored.load()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, quality=95, exif=exif)
    batch = pets(tmp_path, image_size=24).split("test").batch([0])
    bright, mask = batch["image"][0].float().mean(dim=0) > 127, batch["mask"][0]
    assert not bright[:, :11].all()  # the pet is no longer on the left
    assert (bright == (mask == 1))[mask != 2].float().mean() > 0.95


def test_the_border_may_be_ignored(tmp_path: Path) -> None:
    make_pets(tmp_path)
    data = pets(tmp_path, border="ignore")
    assert data.class_names == ["background", "pet"]
    assert set(data.split("test").batch([0])["mask"].unique().tolist()) == {0, 1, 255}
    assert data.describe()["fingerprint"] != pets(tmp_path).describe()["fingerprint"]


def test_validation_images_are_held_out_of_the_official_list_by_breed(tmp_path: Path) -> None:
    make_pets(tmp_path, breeds=3, each=5)
    data = pets(tmp_path)
    assert data.describe()["counts"] == {"train": 12, "val": 3, "test": 6}
    assert data.describe()["shared_with_train"] == {"val": 0, "test": 0}
    assert {Path(path).stem.rpartition("_")[0] for path in data.split("val").paths} == {"Breed_0", "Breed_1", "Breed_2"}
    both = pets(tmp_path, train="trainval").describe()
    assert (both["counts"]["train"], both["shared_with_train"]["val"]) == (15, 3)


def test_the_official_numbers_are_asked_for(tmp_path: Path) -> None:
    make_pets(tmp_path)
    with pytest.raises(DataError, match=r"oxford_pet_trimaps/trainval: found 6 images, expected 3,680; complete"):
        PetTrimapsDataModule(root=tmp_path)
    assert pets(tmp_path).describe()["partial"] is True


def test_the_card_says_how_to_get_them_and_the_catalogue_finds_them(tmp_path: Path) -> None:
    card = load_card("oxford_pet_trimaps")
    assert card is not None
    assert (card.sizes, card.licence) == ({"trainval": 3680, "test": 3669}, "CC BY-SA 4.0")
    assert "annotations.tar.gz" in card.obtain
    make_pets(tmp_path)
    assert {name: len(images.paths) for name, images in image_lists(card.name, tmp_path).items()} == {
        "train": 4, "val": 2, "test": 4
    }  # fmt: skip
    (entry,) = (entry for entry in overview(tmp_path) if entry.card is card)
    assert (entry.found, entry.fault) == ({"train": 4, "val": 2, "test": 4}, "")


def test_data_that_are_not_there_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist; set VPT_DATA or the root"):
        pets(tmp_path / "nowhere")
    folder = make_pets(tmp_path)
    shutil.rmtree(folder / "annotations" / "trimaps")
    with pytest.raises(DataError, match="trimaps does not exist; set VPT_DATA or the root"):
        pets(tmp_path)


def _write(path: Path, values: np.ndarray[Any, Any]) -> None:
    Image.fromarray(values).save(path)


WRONG: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "mask missing": ("trimap", Path.unlink, r"test.txt, line 1: .*Breed_0_3.png does not exist; restore the file"),
    "mask no image": ("trimap", lambda p: p.write_bytes(b"x" * 50), r"line 1: .*Breed_0_3.png is not an image"),
    "mask cut off": ("trimap", lambda p: p.write_bytes(p.read_bytes()[:50]), r"line 1: .*Breed_0_3.png cannot be dec"),
    "mask of colours": (
        "trimap",
        lambda p: _write(p, np.ones((16, 24, 3), dtype=np.uint8)),
        r"line 1: .*Breed_0_3.png is a RGB image; a mask has one channel",
    ),
    "mask of another size": (
        "trimap",
        lambda p: _write(p, np.ones((16, 25), dtype=np.uint8)),
        r"line 1: .*Breed_0_3.png has 25×16 pixels, its image images/Breed_0_3.jpg 24×16: both must",
    ),
    "value out of range": (
        "trimap",
        lambda p: _write(p, np.pad([[7]], ((2, 13), (5, 18)), constant_values=1).astype(np.uint8)),
        r"line 1: .*Breed_0_3.png has the value 7 in row 2, column 5; known are 1 \(pet\)",
    ),
    "image missing": ("image", Path.unlink, r"test.txt, line 1: .*Breed_0_3.jpg does not exist; restore the file"),
    "image no image": ("image", lambda p: p.write_bytes(b"x" * 50), r"line 1: .*Breed_0_3.jpg is not an image"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_bad_file_is_named_in_a_sentence(tmp_path: Path, case: str) -> None:
    kind, damage, message = WRONG[case]
    folder = make_pets(tmp_path)
    path = folder / ("images/Breed_0_3.jpg" if kind == "image" else "annotations/trimaps/Breed_0_3.png")
    damage(path)
    with pytest.raises(DataError, match=message) as caught:
        pets(tmp_path).split("test")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", ["Breed_0_0 one 1 1", "Breed_0_0 1", "Breed_0_0 0 1 1"])
def test_a_line_that_is_none_is_named(tmp_path: Path, line: str) -> None:
    folder = make_pets(tmp_path)
    (folder / "annotations" / "trainval.txt").write_text(f"#Image CLASS-ID SPECIES BREED\n{line}\n")
    with pytest.raises(
        DataError, match=r"trainval.txt, line 2: expected 'name class species breed' with a class in 1\.\.37, found"
    ):
        pets(tmp_path)


def test_bad_options_are_refused(tmp_path: Path) -> None:
    make_pets(tmp_path)
    with pytest.raises(UnknownNameError, match="did you mean 'ignore'"):
        pets(tmp_path, border="ignored")
    with pytest.raises(UnknownNameError, match="did you mean 'trainval'"):
        pets(tmp_path, train="trainvall")
    with pytest.raises(ConfigError, match="val_fraction is 1"):
        pets(tmp_path, val_fraction=1.0)
