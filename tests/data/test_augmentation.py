from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes import make_folder
from vpt.data import DigitsDataModule, FolderDataModule
from vpt.data.augmentation import AUGMENTATIONS, RECIPES, Augmentation
from vpt.errors import ConfigError, UnknownNameError

FLIP_AND_COLOUR = [{"name": "HorizontalFlip", "p": 0.5}, {"name": "ColorJitter", "brightness": 0.2}]
LISTS: list[Any] = [*RECIPES, FLIP_AND_COLOUR, [{"name": "RandomScale"}, {"name": "Resize"}]]
NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)


@pytest.mark.parametrize("augment", LISTS, ids=str)
def test_transforms_depend_on_seed_epoch_and_index_alone(augment: Any) -> None:
    keys = [(seed, epoch, index) for seed in range(2) for epoch in range(2) for index in range(8)]
    made = {seed: Augmentation(augment, seed, 32) for seed in range(2)}
    state, before = torch.random.get_rng_state(), NOISE.copy()
    first = {key: made[key[0]](NOISE, *key[1:]) for key in keys}
    sent = pickle.loads(pickle.dumps(made))  # noqa: S301  # our own, as a worker process gets it
    for key in reversed(keys):
        np.testing.assert_array_equal(sent[key[0]](NOISE, *key[1:]), first[key])
    assert len({pixels.tobytes() for pixels in first.values()}) > 4
    assert all(pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8 for pixels in first.values())
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(NOISE, before)


@pytest.mark.parametrize("augment", ["photos", "trivial", FLIP_AND_COLOUR], ids=str)
def test_batches_are_equal_at_any_number_of_workers(tmp_path: Path, augment: Any) -> None:
    root = make_folder(tmp_path / "pets", {"train": 4, "val": 1})
    options: dict[str, Any] = {"image_size": 16, "batch_size": 4, "augment": augment}
    alone, shared = (
        torch.cat([batch["image"] for batch in FolderDataModule(root, num_workers=n, **options).train_dataloader()])
        for n in (0, 2)
    )
    plain = FolderDataModule(root, **{**options, "augment": "none"})
    assert torch.equal(alone, shared)
    assert not torch.equal(alone, torch.cat([batch["image"] for batch in plain.train_dataloader()]))
    assert next(iter(FolderDataModule(root, **options).val_dataloader()))["image"].equal(
        next(iter(plain.val_dataloader()))["image"]
    )


def test_each_transform_has_random_numbers_of_its_own() -> None:
    twice = Augmentation([{"name": "HorizontalFlip", "p": 0.5}, {"name": "VerticalFlip", "p": 0.5}], 0, 32)
    seen = [twice(NOISE, 0, index).tobytes() for index in range(200)]
    assert sorted(map(seen.count, set(seen)))[0] > 30  # four outcomes, 50 expected of each


def test_the_whole_list_is_part_of_what_the_data_are() -> None:
    plain, photos, own = (DigitsDataModule(image_size=16, augment=each) for each in ("none", "photos", FLIP_AND_COLOUR))
    assert (plain.augmented, photos.augmented, own.augmented) == (False, True, True)
    assert "transforms" not in plain.describe()
    assert photos.describe()["augment"] == "photos"
    assert photos.describe()["transforms"][0] == {**RECIPES["photos"][0], "size": [16, 16]}
    assert own.describe()["augment"] == "custom"
    assert json.loads(json.dumps(own.describe()))["transforms"] == FLIP_AND_COLOUR


@pytest.mark.parametrize(
    ("augment", "error", "says"),
    [
        ("photo", UnknownNameError, "did you mean 'photos'"),
        ([], ConfigError, r"list of transforms, e.g. \[{name: D4}\], got an empty list"),
        ([{"p": 1}], ConfigError, r'got {"p": 1}'),
        ([{"name": "HorizontalFlipp"}], UnknownNameError, "did you mean 'HorizontalFlip'"),
        ([{"name": "Lambda"}], UnknownNameError, "Unknown transform 'Lambda'"),
        ([{"name": "ColorJitter", "brightnes": 1}], UnknownNameError, "did you mean 'brightness'"),
        ([{"name": "ColorJitter", "brightness": "x"}], ConfigError, "'ColorJitter' is refused: brightness: Input"),
        ([{"name": "D4", "p": 2}], ConfigError, "'D4' is refused: p: Input should be less than or equal to 1"),
        ([{"name": "D4", "p": [1]}, {"name": "D4"}], ConfigError, "'D4' is refused: p: Input should be a valid number"),
        ([{"name": "Rotate", "limit": {5}}], ConfigError, "must be a list of plain values"),
        ([{"name": "ShiftScaleRotate"}], ConfigError, "Please use Affine transform instead"),
        ([{"name": "TextImage"}], ConfigError, "Transform 'TextImage' needs font_path"),
        ([{"name": "RandomCrop", "height": 8, "width": 8}], ConfigError, r"make uint8 \(8, 8, 3\) of an image, where"),
        ([{"name": "RandomCrop", "height": 99}], ConfigError, "RandomCrop.* cannot be applied .*exceeds image"),
        ([{"name": "RandomScale", "p": 0.1}], ConfigError, r"\(RandomScale\) make uint8"),
        ([{"name": "Resize", "p": 0.5}, {"name": "RandomScale"}], ConfigError, "make uint8"),
        ([{"name": "RandomScale"}, {"name": "Resize", "p": 0.5}], ConfigError, "make uint8"),
        ([{"name": "Normalize"}], ConfigError, "make float32 .* leave normalisation to the backbone"),
        ([{"name": "FDA"}], ConfigError, r"\(FDA\) cannot be applied"),
        ([{"name": "MaskDropout", "p": 0.1}], ConfigError, r"\(MaskDropout\) cannot be applied"),
    ],
    ids=str,
)
def test_what_cannot_be_applied_is_refused_in_one_sentence(augment: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        Augmentation(augment, 0, 32)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_the_page_on_data_lists_every_recipe_with_its_transforms() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for name, transforms in RECIPES.items():
        (row,) = re.findall(rf"^\| `{name}` \|.*$", page, re.MULTILINE)
        assert [each for each in transforms if f"`{each['name']}`" not in row] == []


@pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if name != "none"])
def test_every_recipe_keeps_a_size_that_is_not_square(name: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8)
    change = Augmentation(name, 0, (40, 64))
    assert {change(image, epoch, 0).shape for epoch in range(6)} == {(40, 64, 3)}
    assert "D4" not in {each["name"] for each in change.transforms}
