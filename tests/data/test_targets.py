"""Tables of several labels an image, and of numbers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from vpt.data import FolderDataModule
from vpt.data.targets import strata
from vpt.errors import ConfigError, DataError, VPTWarning

RANDOM = np.random.default_rng(0)


def table(folder: Path, content: str) -> Path:
    """A table, and the images that it names, a.png, b.png, ..."""
    folder.mkdir(exist_ok=True)
    for name in "abcdefghij":
        pixels = RANDOM.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / "table.csv").write_text(content)
    return folder / "table.csv"


def data(file: Path, **options: Any) -> FolderDataModule:
    return FolderDataModule(file, **{"image_size": 8, **options})


TAGS = """path,tags,split
a.png,sea|sun,train
b.png,sun,train
c.png,,train
d.png,sea | tree|sea,val
e.png,tree|sun,train
f.png,sun,test
"""
COLUMNS = """path,sun,sea,tree,split
a.png,1,1,0,train
b.png,true,0,0,train
c.png,0,0,0,train
d.png,0,yes,1,val
e.png,1,0,1.0,train
f.png,1,no,False,test
"""
NUMBERS = """path,age,weight,split
a.png,1,10.5,train
b.png,3,-2e3,train
c.png,5,0,val
d.png,5,1,test
"""


def test_a_column_of_several_classes(tmp_path: Path) -> None:
    module = data(table(tmp_path, TAGS), label_column="tags", label_separator="|", targets="multilabel")
    assert (module.class_names, module.targets) == (["sea", "sun", "tree"], "multilabel")
    assert module.split("train").labels.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 1, 1]]
    assert module.split("val").labels.tolist() == [[1, 0, 1]]
    assert module.class_counts().tolist() == [1, 3, 1]
    batch = module.split("train").batch([0, 2])
    assert batch["label"].tolist() == [[1, 1, 0], [0, 0, 0]]
    assert module.describe()["targets"] == "multilabel"


def test_a_column_for_each_class_is_the_same_in_its_order(tmp_path: Path) -> None:
    module = data(table(tmp_path, COLUMNS), label_column=["sea", "sun", "tree"], targets="multilabel")
    tags = data(table(tmp_path / "tags", TAGS), label_column="tags", label_separator="|", targets="multilabel")
    for split in ("train", "val", "test"):
        np.testing.assert_array_equal(module.split(split).labels, tags.split(split).labels)
    assert data(tmp_path / "table.csv", label_column=["tree", "sun"], targets="multilabel").class_names == [
        "tree",
        "sun",
    ]


def test_classes_are_found_in_the_order_of_a_model(tmp_path: Path) -> None:
    module = data(table(tmp_path, TAGS), label_column="tags", label_separator="|", targets="multilabel")
    before = module.split("train").labels.copy()
    module.number_classes_as(["tree", "sea", "sun"])
    np.testing.assert_array_equal(module.split("train").labels, before[:, [2, 0, 1]])
    with pytest.raises(ConfigError, match="does not know"):
        module.number_classes_as(["tree", "sea", "sun", "more"])


def test_numbers_keep_their_units(tmp_path: Path) -> None:
    module = data(table(tmp_path, NUMBERS), label_column=["age", "weight"], targets="regression")
    assert module.class_names == ["age", "weight"]
    assert module.split("train").labels.dtype == np.float32
    assert module.split("train").labels.tolist() == [[1, 10.5], [3, -2000]]
    mean, scale = module.value_scale()
    assert mean.tolist() == [2, -994.75]
    assert scale.tolist() == pytest.approx([1, 1005.25])
    one = data(tmp_path / "table.csv", label_column="age", targets="regression")
    assert (one.class_names, one.split("test").labels.tolist()) == (["age"], [[5]])


def test_numbers_of_a_parquet_file(tmp_path: Path) -> None:
    table(tmp_path, "")
    frame = pd.DataFrame(
        {"path": ["a.png", "b.png", "c.png"], "age": [1.5, 2.5, np.nan], "split": ["train", "train", "val"]}
    )
    frame.iloc[:2].to_parquet(tmp_path / "whole.parquet")
    frame.to_parquet(tmp_path / "lacking.parquet")
    module = data(tmp_path / "whole.parquet", label_column="age", targets="regression", val_fraction=0.5)
    assert sorted(label for split in ("train", "val") for (label,) in module.split(split).labels.tolist()) == [1.5, 2.5]
    with pytest.raises(DataError, match=r"lacking.parquet, line 3: the age is ''"):
        data(tmp_path / "lacking.parquet", label_column="age", targets="regression")


def test_the_rarest_class_of_an_image_decides_what_is_held_out() -> None:
    labels = np.array([[1, 0], [1, 1], [1, 0], [0, 0], [1, 1]], dtype=np.uint8)
    assert strata(labels).tolist() == [0, 1, 0, 2, 1]
    assert strata(np.array([2, 0])).tolist() == [2, 0]
    assert strata(np.ones((3, 2), dtype=np.float32)).tolist() == [0, 0, 0]


def test_validation_images_have_every_class_that_two_images_have(tmp_path: Path) -> None:
    rows = "".join(f"{name}.png,{'rare' if name in 'ab' else 'often'}|all\n" for name in "abcdefghi")
    file = table(tmp_path, f"path,label\n{rows}j.png,often\n")
    module = data(file, label_separator="|", targets="multilabel")
    for split in ("train", "val"):
        assert module.split(split).labels[:, module.class_names.index("rare")].sum() == 1
    assert len(module.split("val")) == 3
    numbers = data(table(tmp_path / "n", "path,label\na.png,1\nb.png,2\nc.png,3\nd.png,4\n"), targets="regression")
    assert [len(numbers.split(split)) for split in ("train", "val")] == [3, 1]


def test_a_class_that_cannot_be_validated_is_said(tmp_path: Path) -> None:
    file = table(tmp_path, "path,label\na.png,x|y\nb.png,x\nc.png,\nd.png,x\ne.png,\n")
    with pytest.warns(VPTWarning, match="too few images of 'y' to hold one out for val"):
        data(file, label_separator="|", targets="multilabel")


MANY, NUMERIC = {"targets": "multilabel"}, {"targets": "regression"}


@pytest.mark.parametrize(
    ("content", "options", "kind", "sentence"),
    [
        (TAGS, {"label_column": "tags", **MANY}, ConfigError, "give label_separator"),
        (TAGS, {"label_column": "tags", "label_separator": "|"}, ConfigError, "set targets to multilabel"),
        (TAGS, {"label_column": "tags", "label_separator": "", **MANY}, ConfigError, "is empty"),
        (COLUMNS, {"label_column": ["sun", "sea"]}, ConfigError, "set targets to multilabel"),
        (COLUMNS, {"label_column": ["sun", "sun"], **MANY}, ConfigError, "one twice"),
        (COLUMNS, {"label_column": [], **MANY}, ConfigError, "names no column"),
        (COLUMNS, {"label_column": ["sun", "moon"], **MANY}, DataError, "no column 'moon'"),
        (
            COLUMNS.replace("b.png,true", "b.png,2"),
            {"label_column": ["sun", "sea"], **MANY},
            DataError,
            "line 3: the sun is '2', where 1 or 0",
        ),
        (
            COLUMNS.replace("e.png,1,0,1.0", "e.png,1,0,0"),
            {"label_column": ["sun", "tree"], **MANY},
            DataError,
            "no training images of class 'tree'",
        ),
        (
            COLUMNS.replace("c.png,0", "c.png,1"),
            {"label_column": ["sun", "tree"], **MANY},
            DataError,
            "nothing but training images of class 'sun'",
        ),
        ("path,label\na.png,\nb.png,\n", {"label_separator": "|", **MANY}, DataError, "no training image of any class"),
        (
            TAGS.replace("f.png,sun", "f.png,moon"),
            {"label_column": "tags", "label_separator": "|", **MANY},
            DataError,
            "line 7: f.png is of class 'moon'",
        ),
        (
            NUMBERS.replace("b.png,3", "b.png,nan"),
            {"label_column": "age", **NUMERIC},
            DataError,
            "line 3: the age is 'nan', where a finite number",
        ),
        (NUMBERS.replace("b.png,3", "b.png,"), {"label_column": "age", **NUMERIC}, DataError, "line 3: the age is ''"),
        (NUMBERS.replace("b.png,3", "b.png,1e99"), {"label_column": "age", **NUMERIC}, DataError, "'1e99'"),
        (NUMBERS.replace("b.png,3", "b.png,old"), {"label_column": "age", **NUMERIC}, DataError, "'old'"),
        (
            NUMBERS.replace("b.png,3", "b.png,1"),
            {"label_column": "age", **NUMERIC},
            DataError,
            "is 1: there is none to learn",
        ),
        (
            NUMBERS,
            {"label_column": "age", **NUMERIC, "shots": 1},
            ConfigError,
            "shots and fraction are of images with one class",
        ),
        (
            NUMBERS.replace("d.png,5", "a.png,5"),
            {"label_column": "age", **NUMERIC},
            DataError,
            "listed on line 2 already",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(
    tmp_path: Path, content: str, options: dict[str, Any], kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence):
        data(table(tmp_path, content), **options)


def test_folders_have_one_class_an_image(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="are of tables only"):
        FolderDataModule(tmp_path, targets="multilabel")


def test_a_label_of_which_all_images_would_be_held_out_is_refused(tmp_path: Path) -> None:
    names = {"a": "Z|B", "b": "Z|C", "c": "B", "d": "C"} | dict.fromkeys("efghij", "D")
    rows = "".join(f"{name}.png,{tags}\n" for name, tags in names.items())
    file = table(tmp_path, f"path,label\n{rows}")
    told = set()
    for seed in range(20):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", VPTWarning)  # of labels that are in no validation image
                module = data(file, label_separator="|", targets="multilabel", split_seed=seed)
        except DataError as error:
            told.add(str(error))
        else:
            assert module.class_counts().all()
    assert all("all were held out" in text for text in told)
    assert told
