from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from tests.fakes_suites import TEST, TRAIN, VAL, make_fgvc
from vpt.data import FGVCDataModule
from vpt.data.catalog.cards import load_card
from vpt.data.datasets.fgvc import LAYOUTS
from vpt.errors import DataError, UnknownNameError

NAMES = {
    "cub_200_2011": ["Sooty Albatross", "Groove billed Ani", "Red winged Blackbird"],
    "nabirds": ["Black Scoter (Female/juvenile)", "Osprey", "Lesser Goldfinch"],
    "oxford_flowers": ["flower 1", "flower 2", "flower 3"],
    "stanford_dogs": ["Chihuahua", "Doberman", "Shih-Tzu"],
    "stanford_cars": ["Audi S4 2012", "BMW M3 2012", "Fiat 500 2012"],
}
OFFICIAL = {
    "cub_200_2011": (200, 5394, 600, 5794),
    "nabirds": (555, 21536, 2393, 24633),
    "oxford_flowers": (102, 1020, 1020, 6149),
    "stanford_dogs": (120, 10800, 1200, 8580),
    "stanford_cars": (196, 7329, 815, 8041),
}
dataset = pytest.mark.parametrize("name", NAMES)


def module(root: Path, name: str, **options: Any) -> FGVCDataModule:
    return FGVCDataModule(name, root, image_size=16, **({"allow_partial": True} | options))


@dataset
def test_the_official_layout_gives_named_classes_and_three_lists(tmp_path: Path, name: str) -> None:
    make_fgvc(tmp_path, name)
    data = module(tmp_path, name)
    assert data.class_names == NAMES[name]
    val = 3 * VAL if name == "oxford_flowers" else 3
    train = 3 * TRAIN if name == "oxford_flowers" else 3 * TRAIN - val
    assert data.describe()["counts"] == {"train": train, "val": val, "test": 3 * TEST}
    assert data.describe()["shared_with_train"] == {"val": 0, "test": 0}
    assert data.split_source == ("authors" if name == "oxford_flowers" else "held out")
    for split in ("train", "val", "test"):
        assert data.split(split).images.shape[1:] == (3, 16, 16)
        assert set(data.split(split).labels) == {0, 1, 2}


@dataset
def test_labels_are_those_of_the_authors_files(tmp_path: Path, name: str) -> None:
    folder = make_fgvc(tmp_path, name)
    flowers = loadmat(folder / "imagelabels.mat")["labels"][0] if name == "oxford_flowers" else []
    rule: dict[str, Callable[[str], int]] = {  # from what the generator puts into the paths
        "cub_200_2011": lambda path: ["001", "002", "010"].index(path[:3]),
        "nabirds": lambda path: ["295", "817", "1010"].index(path.split(".")[0]),
        "oxford_flowers": lambda path: flowers[int(path[-9:-4]) - 1] - 1,
        "stanford_dogs": lambda path: NAMES[name].index(path.split("/")[0].split("-", 1)[1]),
        "stanford_cars": lambda path: (int(Path(path).stem) - 1) % 3,
    }
    data = module(tmp_path, name, train="trainval")
    for split in ("train", "test"):
        found = data.split(split)
        assert [rule[name](path) for path in found.paths] == found.labels.tolist()
    assert len(data.split("train")) == 3 * (TRAIN + VAL * (name == "oxford_flowers"))


@dataset
def test_cards_have_the_sizes_of_the_published_splits(name: str) -> None:
    card = load_card(name)
    assert card is not None
    assert (card.num_classes, *(card.sizes[part] for part in ("train", "val", "test"))) == OFFICIAL[name]
    assert card.sizes["trainval"] == card.sizes["train"] + card.sizes["val"]
    assert all(part in card.layout for part in LAYOUTS[name].needed[-1].split("/"))


@dataset
def test_a_missing_root_is_answered_with_the_expected_tree(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as caught:
        module(tmp_path / "nowhere", name)
    card = load_card(name)
    assert card is not None
    assert str(caught.value).startswith(f"{tmp_path / 'nowhere'} does not exist; set VPT_DATA")
    assert card.layout.strip() in str(caught.value)
    assert card.obtain.strip() in str(caught.value)


@dataset
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    folder = make_fgvc(tmp_path, name)
    needed = {"stanford_dogs": "lists/test_list.mat", "stanford_cars": "cars_test_annos_withlabels.mat"}
    missing = folder / needed.get(name, LAYOUTS[name].needed[-1])
    missing.unlink()
    with pytest.raises(DataError, match=re.escape(f"{missing} does not exist")):
        module(tmp_path, name)


@dataset
def test_a_wrong_count_is_an_error_that_names_both_numbers(tmp_path: Path, name: str) -> None:
    make_fgvc(tmp_path, name)
    with pytest.raises(DataError, match=rf"{name}: found 3 classes, expected {OFFICIAL[name][0]}"):
        module(tmp_path, name, allow_partial=False)
    assert module(tmp_path, name).describe()["partial"] is True
    assert module(tmp_path, name).describe()["complete"] is False


def test_one_image_too_few_is_an_error_and_all_of_them_are_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_fgvc(tmp_path, "stanford_dogs")
    card = load_card("stanford_dogs")
    assert card is not None
    sizes = {"train": 27, "val": 3, "trainval": 30, "test": 12}
    monkeypatch.setattr("vpt.data.datasets.fgvc.find_card", lambda _: replace(card, num_classes=3, sizes=sizes))
    described = module(tmp_path, "stanford_dogs", allow_partial=False).describe()
    assert (described["partial"], described["complete"]) == (False, True)
    monkeypatch.setattr(
        "vpt.data.datasets.fgvc.find_card", lambda _: replace(card, num_classes=3, sizes=sizes | {"test": 13})
    )
    with pytest.raises(DataError, match="stanford_dogs/test: found 12 images, expected 13"):
        module(tmp_path, "stanford_dogs", allow_partial=False)


@pytest.mark.parametrize("place", ["{root}/cub_200_2011/CUB_200_2011", "{root}/cub_200_2011", "{root}/CUB_200_2011"])
def test_the_archive_may_be_unpacked_in_three_places(tmp_path: Path, place: str) -> None:
    folder = make_fgvc(tmp_path / "made", "cub_200_2011")
    target = Path(place.format(root=tmp_path / "data"))
    target.parent.mkdir(parents=True)
    folder.rename(target)
    assert module(tmp_path / "data", "cub_200_2011").num_classes == 3


def test_lists_of_matlab_files_are_found_beside_the_images_too(tmp_path: Path) -> None:
    dogs, cars = make_fgvc(tmp_path, "stanford_dogs"), make_fgvc(tmp_path, "stanford_cars")
    for name in ("train", "test"):
        (dogs / "lists" / f"{name}_list.mat").rename(dogs / f"{name}_list.mat")
    (cars / "cars_test_annos_withlabels.mat").rename(cars / "devkit" / "cars_test_annos_withlabels.mat")
    assert module(tmp_path, "stanford_dogs").num_classes == 3
    assert module(tmp_path, "stanford_cars").num_classes == 3


def test_class_10_comes_after_class_2(tmp_path: Path) -> None:
    make_fgvc(tmp_path, "cub_200_2011")
    data = module(tmp_path, "cub_200_2011").split("test")
    kinds = [int(path.split(".")[0]) for path in data.paths]
    assert [{1: 0, 2: 1, 10: 2}[kind] for kind in kinds] == data.labels.tolist()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("images.txt", lambda text: text + text.splitlines()[3] + "\n", "images.txt, line 43: 4 has a line already"),
        ("images.txt", lambda text: text + "43 " + text.splitlines()[0][2:] + "\n", "no line for 43, which images.txt"),
        (
            "image_class_labels.txt",
            lambda text: text + "7 2\n",
            "image_class_labels.txt, line 43: 7 has a line already",
        ),
        (
            "image_class_labels.txt",
            lambda text: text.replace("42 10\n", ""),
            "image_class_labels.txt has no line for 42",
        ),
        ("image_class_labels.txt", lambda text: text.replace("42 10", "42 11"), "does not name class 11"),
        ("classes.txt", lambda text: text.replace("10 Red", "10Red"), "does not name class 10"),
        (
            "train_test_split.txt",
            lambda text: text.replace("\n3 1\n", "\n3\n"),
            "line 3: expected 'key value', found '3'",
        ),
    ],
)
def test_damaged_text_files_are_named_with_the_line(tmp_path: Path, file: str, change: Any, message: str) -> None:
    path = make_fgvc(tmp_path, "cub_200_2011") / file
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=re.escape(message)):
        module(tmp_path, "cub_200_2011")


def test_an_image_under_two_numbers_is_named(tmp_path: Path) -> None:
    folder = make_fgvc(tmp_path, "cub_200_2011")
    lines = (folder / "images.txt").read_text().splitlines()
    lines[1] = f"2 {lines[0][2:]}"
    (folder / "images.txt").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"images\.txt: image .*00\.jpg is listed twice, as number 1 and 2"):
        module(tmp_path, "cub_200_2011")


def test_damaged_matlab_files_are_named(tmp_path: Path) -> None:
    flowers, dogs, cars = (make_fgvc(tmp_path, name) for name in ("oxford_flowers", "stanford_dogs", "stanford_cars"))
    (flowers / "setid.mat").write_bytes(b"MATLAB")
    with pytest.raises(DataError, match=r"setid\.mat is not a MATLAB file with trnid, valid, tstid"):
        module(tmp_path, "oxford_flowers")
    savemat(flowers / "setid.mat", {"trnid": [[1, 52]], "valid": [[2]], "tstid": [[3]]})
    with pytest.raises(DataError, match=r"setid\.mat: trnid names images outside 1\.\.51"):
        module(tmp_path, "oxford_flowers")
    content = loadmat(dogs / "lists" / "test_list.mat")
    content["labels"][0] = 2
    savemat(dogs / "lists" / "test_list.mat", {key: content[key] for key in ("file_list", "labels")})
    with pytest.raises(DataError, match=r"test_list\.mat: label 2 is given to Doberman and to Chihuahua"):
        module(tmp_path, "stanford_dogs")
    unlabelled = np.array([[(1, "00001.jpg"), (1, "00002.jpg")]], dtype=[("bbox_x1", object), ("fname", object)])
    savemat(cars / "cars_test_annos_withlabels.mat", {"annotations": unlabelled})
    with pytest.raises(DataError, match="has no class for each fname"):
        module(tmp_path, "stanford_cars")


def test_a_missing_image_is_named_with_its_list(tmp_path: Path) -> None:
    folder = make_fgvc(tmp_path, "oxford_flowers")
    (folder / "jpg" / "image_00014.jpg").unlink()
    with pytest.raises(DataError, match=r"setid\.mat, line .*image_00014\.jpg does not exist"):
        module(tmp_path, "oxford_flowers").split("test")


def test_a_missing_bird_is_named_with_its_line(tmp_path: Path) -> None:
    folder = make_fgvc(tmp_path, "cub_200_2011")
    lines = (folder / "images.txt").read_text().splitlines()
    for line, split in ((13, "test"), (2, "train")):
        path = folder / "images" / lines[line - 1].split(" ", 1)[1]
        path.unlink()
        with pytest.raises(DataError, match=rf"images\.txt, line {line}: {re.escape(str(path))} does not exist"):
            module(tmp_path, "cub_200_2011", train="trainval").split(split)


def json_splits(folder: Path, name: str) -> dict[str, dict[str, int]]:
    """Writes splits as the reference has them: own class numbers, other members than ours."""
    data = module(folder.parent if folder.name == name else folder.parents[1], name, train="trainval")
    images = LAYOUTS[name].images
    train, test = (
        {p: 7 * int(k) + 5 for p, k in zip(data.split(s).paths, data.split(s).labels, strict=True)}
        for s in ("train", "test")
    )
    assert all((folder / images / path).is_file() for path in train)
    val = dict(list(train.items())[::4])
    splits = {"train": {path: kind for path, kind in train.items() if path not in val}, "val": val, "test": test}
    for part, content in splits.items():
        (folder / f"{part}.json").write_text(json.dumps(content))
    return splits


@dataset
def test_the_references_json_splits_are_used_when_they_are_there(tmp_path: Path, name: str) -> None:
    folder = make_fgvc(tmp_path, name)
    splits = json_splits(folder, name)
    data = module(tmp_path, name)
    assert data.split_source == "json"
    for part, content in splits.items():
        assert dict(zip(data.split(part).paths, (7 * data.split(part).labels + 5).tolist(), strict=True)) == content


def test_json_splits_that_contradict_the_authors_are_refused(tmp_path: Path) -> None:
    folder = make_fgvc(tmp_path, "stanford_cars")
    splits = json_splits(folder, "stanford_cars")
    (folder / "val.json").unlink()
    with pytest.raises(DataError, match=r"val\.json does not exist beside train\.json; give all three or none"):
        module(tmp_path, "stanford_cars")
    for content, message in (
        (
            json.dumps(splits["val"] | {"cars_train/00002.jpg": 5}),
            r"00002\.jpg \(BMW M3 2012\) has class 5, as has Audi S4",
        ),
        (json.dumps({"cars_train/99.jpg": 5}), r"the authors' files do not list cars_train/99\.jpg"),
        ('{"cars_train/00001.jpg": "5"}', "is not a map from image paths to whole numbers"),
        ("{", "is not a map from image paths to whole numbers"),
    ):
        (folder / "val.json").write_text(content)
        with pytest.raises(DataError, match=message):
            module(tmp_path, "stanford_cars")


def test_unknown_names_suggest_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'nabirds'"):
        module(tmp_path, "na_birds")
    make_fgvc(tmp_path, "stanford_dogs")
    with pytest.raises(UnknownNameError, match="did you mean 'trainval'"):
        module(tmp_path, "stanford_dogs", train="train_val")
    assert np.array_equal(module(tmp_path, "stanford_dogs", test="val").split("test").labels, [0, 1, 2])
