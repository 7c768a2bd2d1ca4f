from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from vpt.data import DigitsDataModule, ShapesDataModule
from vpt.data.datasets.demo import SHAPES, draw, latents
from vpt.errors import UnknownNameError

TASKS = [
    DigitsDataModule,
    ShapesDataModule,
    lambda **flags: ShapesDataModule(label="orientation", **flags),
    lambda **flags: ShapesDataModule(label="shape", **flags),
]


@pytest.mark.parametrize("make", TASKS)
def test_demo_tasks_have_the_sizes_of_vtab_and_are_complete(make: type[DigitsDataModule]) -> None:
    data = make(image_size=16)
    description = data.describe()
    test = 797 if data.name == "digits" else 1000
    assert description["counts"] == {"train": 1000, "val": 200, "test": test}
    assert description["complete"] is True
    assert description["shared_with_train"] == {"val": 200, "test": 0}
    assert make(train="train800").describe()["shared_with_train"] == {"val": 0, "test": 0}
    assert data.shift_names() == []
    assert not data.augmented
    assert set(data.split("train").labels) == set(range(data.num_classes)) == set(data.split("test").labels)


@pytest.mark.parametrize("make", [DigitsDataModule, ShapesDataModule])
def test_images_do_not_depend_on_the_seed_of_the_run(make: type[DigitsDataModule]) -> None:
    one, other = (make(seed=seed, image_size=16) for seed in (0, 5))
    assert one.describe()["fingerprint"] == other.describe()["fingerprint"]
    np.testing.assert_array_equal(one.split("test").images, other.split("test").images)
    np.testing.assert_array_equal(one.split("test").labels, other.split("test").labels)


@pytest.mark.parametrize("make", [DigitsDataModule, ShapesDataModule])
def test_no_image_is_in_two_splits(make: type[DigitsDataModule]) -> None:
    data = make(train="train800", image_size=32)
    for one, other in combinations(map(data.split, ("train", "val", "test")), 2):
        assert not {image.tobytes() for image in one.images} & {image.tobytes() for image in other.images}


def test_digits_are_stratified() -> None:
    data = DigitsDataModule(train="train800")
    for name, count in (("train", 80), ("val", 20), ("test", 80)):
        assert all(abs(number - count) <= 3 for number in Counter(data.split(name).labels.tolist()).values())


def test_digits_can_be_read_by_a_linear_model() -> None:
    data = DigitsDataModule(image_size=8)
    train, test = (
        (split.images[:, 0].reshape(len(split), -1) / 255, split.labels) for split in map(data.split, ("train", "test"))
    )
    assert LinearDiscriminantAnalysis().fit(*train).score(*test) > 0.93


@pytest.mark.parametrize("size", [32, 64, 96])
def test_demo_images_have_the_size_asked_for(size: int) -> None:
    for data in (DigitsDataModule(image_size=size), ShapesDataModule(image_size=size)):
        assert data.split("val").images.shape == (200, 3, size, size)
        assert data.split("val").images.dtype == np.uint8


def test_shape_is_where_its_label_says() -> None:
    split = ShapesDataModule().split("test")
    columns = split.images[:, 0].astype(float).sum(axis=1)
    centre = (columns * np.arange(64)).sum(axis=1) / columns.sum(axis=1)
    assert np.corrcoef(centre, split.labels)[0, 1] > 0.99


def test_shape_lies_within_the_image_and_is_antialiased() -> None:
    images = ShapesDataModule().split("test").images
    border = np.concatenate([images[..., 0, :], images[..., -1, :], images[..., :, 0], images[..., :, -1]], axis=-1)
    assert border.max() == 0
    assert np.mean([len(np.unique(image)) > 8 for image in images]) > 0.9  # an upright square may need no greys


def test_orientation_turns_the_shape_as_its_symmetry_says() -> None:
    def pixels(shape: int, orientation: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        point = {"shape": shape, "scale": 5, "orientation": orientation, "x": 16, "y": 16}
        return draw({key: np.array([value]) for key, value in point.items()}, 64).astype(np.float64)

    for shape, period in ((0, 10), (1, 20), (2, 40)):
        moved = [abs(pixels(shape, 0) - pixels(shape, turn)).mean() for turn in (5, 10, 20)]
        same = [turn % period == 0 for turn in (5, 10, 20)]
        assert [distance < 0.5 for distance in moved] == same


def test_latents_give_distinct_images_and_are_seeded() -> None:
    table = latents(500, seed=1)
    assert len(table["x"]) == 500
    assert len({image.tobytes() for image in draw(table, 64)}) == 500
    assert all((latents(500, seed=1)[key] == table[key]).all() for key in table)
    assert any((latents(500, seed=2)[key] != table[key]).any() for key in table)
    assert set(table["shape"]) == set(range(len(SHAPES)))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'x_position'"):
        ShapesDataModule(label="x_positon")
    with pytest.raises(UnknownNameError, match="did you mean 'train800'"):
        DigitsDataModule(train="train80")
