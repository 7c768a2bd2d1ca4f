"""Folders without splits, names of splits, and tables as other programs write them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import make_folder
from vpt.data import FolderDataModule
from vpt.data.splits import few_shot, hold_out
from vpt.errors import ConfigError, DataError, VPTWarning

from .test_folder import data, labelled, make_mnist, table


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=5), st.integers(0, 3), st.floats(0.01, 0.99))
def test_test_images_are_a_share_of_each_class_and_leave_two(sizes: list[int], seed: int, share: float) -> None:
    sizes = [3, *sizes]
    labels = np.repeat(np.arange(len(sizes)), sizes)
    names = [f"{label}/{position}.jpg" for position, label in enumerate(labels)]
    rest, held = hold_out(names, labels, share, seed, "test")
    assert sorted([*rest, *held]) == list(range(len(names)))
    for size, found in zip(sizes, np.bincount(labels[held], minlength=len(sizes)), strict=True):
        assert found == min(max(1, int(share * size + 0.5)), max(0, size - 2))
    order = np.random.default_rng(seed).permutation(len(names))  # another order of the list holds the same images out
    shuffled = hold_out([names[i] for i in order], labels[order], share, seed, "test")[1]
    assert {names[i] for i in held} == {names[order[i]] for i in shuffled}


def test_classes_without_splits_are_divided_by_the_split_seed_alone(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "pets", {"": 20})
    module, again, other = data(root), data(root, seed=9), data(root, split_seed=1)
    assert module.class_names == ["cat", "dog", "owl"]
    for split, size in {"train": 13, "val": 3, "test": 4}.items():
        assert np.bincount(module.split(split).labels).tolist() == [size] * 3
    assert len({path for split in ("train", "val", "test") for path in module.split(split).paths}) == 60
    assert all(path.split("/")[0] == name for path, name in labelled(module, "test").items())
    described = module.describe()
    assert described["held_out"] == {"test": 0.2, "val": 0.2, "split_seed": 0}
    assert described["lists"] == {
        "train": "pets/train",
        "val": "pets/train (held out)",
        "test": "pets/test (held out)",
    }
    assert described["shared_with_train"] == {"val": 0, "test": 0}
    assert described["fingerprint"] == again.describe()["fingerprint"] != other.describe()["fingerprint"]
    assert data(root, val_fraction=0.5).split("test").paths == module.split("test").paths


def test_a_split_that_is_a_link_to_nowhere_is_not_taken_for_none(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "pets", {"": 5})
    (root / "train").symlink_to("unmounted")
    with pytest.raises(DataError, match="pets/train is a link that leads nowhere: mend it, or remove it"):
        data(root)


def test_the_share_of_test_images_may_be_chosen(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "pets", {"": 10})
    assert data(root, test_fraction=0.5).describe()["counts"] == {"train": 12, "val": 3, "test": 15}
    none = data(root, test_fraction=0.0)
    assert none.describe()["counts"] == {"train": 24, "val": 6}
    assert "held_out" not in none.describe()
    splits = make_folder(tmp_path / "split", {"train": 10})
    assert data(splits).describe()["counts"] == {"train": 24, "val": 6}
    assert data(splits, test_fraction=0.2).describe()["counts"] == {"train": 18, "val": 6, "test": 6}
    with pytest.raises(ConfigError, match=r"test_fraction is 1\.0; it must lie in \(0, 1\)"):
        data(root, test_fraction=1.0)
    with pytest.raises(ConfigError, match="test_fraction has no effect: tested has test images; leave it out"):
        data(make_folder(tmp_path / "tested", {"train": 3, "test": 1}), test_fraction=0.2)


def test_a_class_with_one_image_is_trained_on_and_pointed_out(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "pets", {"": 5})
    make_folder(root, {"": 1}, ["yak"])
    make_folder(root, {"": 2}, ["bee"])
    with pytest.warns(VPTWarning) as caught:
        module = data(root)
    assert [str(each.message) for each in caught] == [
        "pets has too few images of 'bee', 'yak' to hold one out for test: add some.",
        "pets has too few images of 'yak' to hold one out for val: add some.",
    ]
    assert {*labelled(module, "train").values()} == {"bee", "cat", "dog", "owl", "yak"}
    with pytest.raises(ConfigError, match="No class has three images, so none can be tested on: give more, or set"):
        data(make_folder(tmp_path / "few", {"": 2}))


@pytest.mark.parametrize(
    "names", ["Train Val Test", "training validation testing", "TRAIN dev eval", "train Valid Evaluation"]
)
def test_splits_have_the_names_that_people_give_them(tmp_path: Path, names: str) -> None:
    root = make_folder(tmp_path / "pets", dict(zip(names.split(), (4, 2, 3), strict=True)) | {"Shift_Night": 1})
    module = data(root)
    assert module.describe()["counts"] == {"train": 12, "val": 6, "test": 9, "Night": 3}
    rows = "".join(
        f"{path.relative_to(root)},{path.parent.name},{path.parent.parent.name}\n" for path in root.rglob("*.jpg")
    )
    assert (
        data(table(root, "rows.csv", f"path,label,split\n{rows}")).describe()["counts"] == module.describe()["counts"]
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "pets", {"train": 5})


ROWS = [(f"train/{name}/{number}.jpg", name) for name in ("cat", "dog") for number in range(3)]


def written(rows: Sequence[tuple[str, ...]], header: str = "path,label", sign: str = ",") -> str:
    return "".join(f"{line}\n" for line in [header, *(sign.join(row) for row in rows)] if line)


@pytest.mark.parametrize("sign", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_separators_and_names_of_columns(root: Path, sign: str, suffix: str) -> None:
    expected = data(table(root, "plain.csv", written(ROWS))).describe()["fingerprint"]
    file = root / f"rows{suffix}"
    file.write_text("\ufeff" + written(ROWS, f"image_id{sign}class", sign), encoding="utf-8")
    module = data(file, path_column="image_id", label_column="class")
    assert module.describe()["fingerprint"] == expected
    file.write_text(written(ROWS, "", sign))
    assert data(file, columns=["path", "label"]).describe()["fingerprint"] == expected
    divided = [(*row, "test" if "2" in row[0] else "train") for row in ROWS]
    file.write_text(written(divided, f"path{sign}label{sign}part", sign))
    assert data(file, split_column="part").describe()["counts"] == {"train": 2, "val": 2, "test": 2}


def test_paths_of_windows_without_suffix_and_below_another_root(root: Path, tmp_path: Path) -> None:
    expected = labelled(data(table(root, "plain.csv", written(ROWS))), "train")
    windows = [(path.replace("/", "\\"), label) for path, label in ROWS]
    stems = [(path.removesuffix(".jpg"), label) for path, label in ROWS]
    for rows in (ROWS, windows, stems, [(path.removesuffix(".jpg"), label) for path, label in windows]):
        file = table(tmp_path, "elsewhere.csv", written(rows))
        assert labelled(data(file, images_root=root), "train") == expected
    for number, (path, _) in enumerate(ROWS):
        shutil.copy(root / path, tmp_path / f"{number:04d}.v2.JPG")
    file = table(tmp_path, "ids.csv", written([(f"{n:04d}.v2", label) for n, (_, label) in enumerate(ROWS)]))
    assert {*labelled(data(file), "train")} | {*labelled(data(file), "val")} == {f"{n:04d}.v2.JPG" for n in range(6)}
    shutil.copy(root / ROWS[0][0], tmp_path / "0001.v2.png")
    with pytest.raises(DataError, match=r"line 3: 0001\.v2 may be 0001\.v2\.JPG or 0001\.v2\.png; write the one"):
        data(file)


@pytest.mark.parametrize(
    ("text", "options", "fault"),
    [
        (
            written(ROWS),
            {"path_column": "image"},
            "no column 'image'; it has 'path', 'label', and is asked for",
        ),
        (written(ROWS), {"split_column": "part"}, "has no column 'part'"),
        (written(ROWS), {"columns": ["path", "label"]}, "line 1 names the columns: leave columns out"),
        (written(ROWS, ""), {"columns": ["path", "label", "x"]}, "line 1 has 2 fields and columns names 3"),
        (written(ROWS, ""), {"columns": ["label", "label", "path"]}, "has 2 fields and columns names 3"),
        (written(ROWS), {"images_root": "nowhere"}, "images_root is nowhere, which is no folder"),
        (written([*ROWS, (ROWS[0][0].removesuffix(".jpg"), "dog")]), {}, "line 8: train/cat/0 is listed on line 2 alr"),
        (written([*ROWS, ("gone", "dog")]), {}, "line 8: .*gone does not exist"),
        (
            written([(path, f"{n}.5") for n, (path, _) in enumerate(ROWS)]),
            {},
            "line 2: the label 0.5 is no whole",
        ),
        (written([*ROWS, ("train/owl/0.jpg", " ")]), {}, "line 8: the label is empty"),
        (written([*ROWS, ("train/owl/0.jpg", "NaN")]), {}, "line 8: the label is NaN: give one, or remove the line"),
    ],
)
def test_tables_that_cannot_be_read_as_asked(root: Path, text: str, options: dict[str, Any], fault: str) -> None:
    with pytest.raises(DataError, match=fault) as caught:
        data(table(root, "rows.csv", text), **options).setup("fit")
    assert "\n" not in str(caught.value)


def test_options_of_tables_are_refused_elsewhere(root: Path) -> None:
    for options in ({"path_column": "image"}, {"columns": ["path", "label"]}, {"images_root": "x"}):
        with pytest.raises(ConfigError, match="images_root are of tables only"):
            data(root, **options)
    with pytest.raises(ConfigError, match="columns has no 'path': name all columns of"):
        data(table(root, "rows.csv", written(ROWS, "")), columns=["image", "label"])
    file = table(root, "rows.parquet", written(ROWS))
    with pytest.raises(DataError, match=r"rows\.parquet names its columns itself: leave columns out"):
        data(file, columns=["path", "label"])
    assert data(file, path_column="path").class_names == ["cat", "dog"]


def test_emnist_is_upright_and_a_class_without_images_has_no_shots(tmp_path: Path) -> None:
    make_mnist(tmp_path, {"emnist-letters-train": 80, "emnist-letters-test": 20})
    (tmp_path / "MNIST").rename(tmp_path / "EMNIST")
    raw = tmp_path / "EMNIST/raw"
    for name in ("train", "test"):  # letters are numbered from 1
        file = raw / f"emnist-letters-{name}-labels-idx1-ubyte"
        content = file.read_bytes()
        file.write_bytes(content[:8] + bytes(value + 1 for value in content[8:]))
    made: dict[str, Any] = {"torchvision": "EMNIST", "torchvision_args": {"split": "letters"}, "image_size": 28}
    module = FolderDataModule(tmp_path, shots=2, **made)
    stored = np.frombuffer((raw / "emnist-letters-test-images-idx3-ubyte").read_bytes()[16:], np.uint8).reshape(
        -1, 28, 28
    )
    np.testing.assert_array_equal(module.split("test").images[3], np.stack([stored[3].T] * 3))
    assert np.bincount(module.split("train").labels).tolist() == [0, *[2] * 10]
    with pytest.raises(ConfigError, match="has 6 training images: take at most 6"):
        FolderDataModule(tmp_path, shots=7, **made)
    assert few_shot(["a", "b"], np.array([2, 2]), ["x", "y", "z"], None, 0.5, 0).tolist() in ([0], [1])
