from __future__ import annotations

import os
import pickle
import re
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.fakes import make_folder
from vpt.data import FolderDataModule
from vpt.data.datasets.table import class_order
from vpt.data.datasets.torchvision_datasets import SUPPORTED
from vpt.errors import ConfigError, DataError, UnknownNameError, VPTWarning


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "pets", {"train": 5, "val": 2, "test": 3})


def data(root: Path, **options: Any) -> FolderDataModule:
    return FolderDataModule(root, **{"image_size": 16, **options})


def labelled(module: FolderDataModule, split: str) -> dict[str, str]:
    """Class of each image by path."""
    chosen = module.split(split)
    return {path: module.class_names[label] for path, label in zip(chosen.paths, chosen.labels, strict=True)}


def test_folders_of_classes_are_a_task(root: Path) -> None:
    module = data(root)
    assert (module.name, module.class_names) == ("pets", ["cat", "dog", "owl"])
    assert [len(module.split(name)) for name in ("train", "val", "test")] == [15, 6, 9]
    for split in ("train", "val", "test"):
        assert all(path.split("/")[:2] == [split, name] for path, name in labelled(module, split).items())
    pixels = module.preset(Image.open(root / "test/dog/1.jpg"), 16)
    position = list(module.split("test").paths).index("test/dog/1.jpg")
    np.testing.assert_array_equal(module.split("test").images[position].transpose(1, 2, 0), pixels)
    assert module.describe()["lists"] == {"train": "pets/train", "val": "pets/val", "test": "pets/test"}
    assert module.describe()["complete"] is None


def test_a_class_that_is_missing_from_the_test_images_moves_no_other(root: Path) -> None:
    for image in (root / "test/cat").iterdir():
        image.unlink()
    (root / "test/cat").rmdir()
    assert set(labelled(data(root), "test").values()) == {"dog", "owl"}
    assert set(data(root).split("test").labels.tolist()) == {1, 2}


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["10", "2", "1"], ["1", "2", "10"]),
        (["010", "9", "0"], ["0", "9", "010"]),
        (["10", "2", "b"], ["10", "2", "b"]),
        (["b10", "b2", "A"], ["A", "b10", "b2"]),
        (["ü", "猫", "a"], ["a", "ü", "猫"]),
    ],
)
def test_classes_are_ordered_by_number_if_all_are_numbers_else_by_name(names: list[str], order: list[str]) -> None:
    assert class_order(names) == order


def test_folder_ten_comes_after_folder_two(tmp_path: Path) -> None:
    module = data(make_folder(tmp_path / "x", {"train": 2, "test": 1}, ["0", "2", "10"]))
    assert module.class_names == ["0", "2", "10"]
    assert labelled(module, "test") == {f"test/{name}/0.jpg": name for name in ("0", "2", "10")}


def test_without_validation_images_a_part_of_each_class_is_held_out(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "pets", {"train": 10})
    first, again, other = (data(root, split_seed=seed) for seed in (0, 0, 1))
    assert np.bincount(first.split("val").labels).tolist() == [2, 2, 2]
    assert np.bincount(first.split("train").labels).tolist() == [8, 8, 8]
    assert not set(first.split("val").paths) & set(first.split("train").paths)
    assert first.describe()["fingerprint"] == again.describe()["fingerprint"] != other.describe()["fingerprint"]
    assert first.describe()["lists"] == {"train": "pets/train", "val": "pets/train (held out)"}
    assert first.describe()["shared_with_train"] == {"val": 0}
    assert len(data(root, val_fraction=0.5, shots=3).split("val")) == 15
    assert (
        data(root, seed=7).describe()["fingerprint"] == first.describe()["fingerprint"]
    )  # the run's seed splits nothing


def test_without_test_images_testing_is_refused_in_one_sentence(tmp_path: Path) -> None:
    module = data(make_folder(tmp_path / "pets", {"train": 3}))
    module.setup("fit")
    with pytest.raises(DataError, match="The data 'pets' have no test images"):
        module.setup("test")


def test_validation_has_other_names_and_shifts_are_found(tmp_path: Path) -> None:
    for name in ("valid", "validation"):
        module = data(make_folder(tmp_path / name, {"train": 3, name: 1, "test": 2, "shift_night": 1}))
        assert module.describe()["counts"] == {"train": 9, "val": 3, "test": 6, "night": 3}
        assert module.shift_names() == ["night"]


def test_hidden_and_other_files_are_no_images(root: Path) -> None:
    for name in ("._0.jpg", ".DS_Store", "Thumbs.db", "notes.txt", ".ipynb_checkpoints/0-checkpoint.jpg"):
        path = root / "train/cat" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no image")
    (root / ".cache").mkdir()
    (root / "train/.hidden").mkdir()
    (root / "train/dog/deeper").mkdir()
    (root / "train/dog/4.jpg").rename(root / "train/dog/deeper/4.JPG")
    files, folders = (
        r"4 of 34 files \(1 \.db, 1 \.txt, 2 hidden\)",
        r"train/\.hidden \(hidden\), train/cat/\.ipynb_checkp",
    )
    with pytest.warns(VPTWarning, match=f"Not read of .*pets: {files} and the folders {folders}"):
        module = data(root)
    assert len(module.split("train")) == 15
    assert labelled(module, "train")["train/dog/deeper/4.JPG"] == "dog"


def test_files_of_other_kinds_and_links_that_lead_nowhere_are_counted(root: Path) -> None:
    cat = root / "train/cat"
    for name in ("a.HEIC", "b.heic", "without"):
        (cat / name).write_bytes(b"no image that Pillow reads")
    (cat / "dangling.jpg").symlink_to("nowhere.jpg")
    (cat / "itself.jpg").symlink_to("itself.jpg")
    os.mkfifo(cat / "pipe.jpg")
    left = r"6 of 36 files \(2 \.heic, 2 dangling, 1 of a device, 1 without a suffix\)\.$"
    with pytest.warns(VPTWarning, match=left):
        assert len(data(root).split("train")) == 15


def test_folders_of_systems_are_no_classes_and_unknown_ones_no_splits(root: Path) -> None:
    for name in ("train/@eaDir", "train/__MACOSX", "train/.c", "@eaDir"):
        make_folder(root / name, {"": 1}, ["0"])
    (root / "notes").mkdir()
    shutil.copy(root / "train/cat/0.jpg", root / "overview.jpg")
    files, hidden = "1 of 31 files (1 beside the splits)", "train/.c (hidden), train/@eaDir (hidden), train/__MACOSX (h"
    said = re.escape(f"{files} and the folders notes (no split), {hidden}")
    with pytest.warns(VPTWarning, match=f"Not read of .*: {said}"):
        assert data(root).class_names == ["cat", "dog", "owl"]


def test_links_are_followed_but_never_round_in_circles(root: Path, tmp_path: Path) -> None:
    more = make_folder(tmp_path / "more", {"": 2}, ["deeper"])
    (root / "train/cat/more").symlink_to(more)
    (more / "deeper/back").symlink_to(root / "train/cat")
    (root / "train/cat/up").symlink_to("..")
    (root / "train/loop").symlink_to(".")
    circles = r"loop \(a link back\), train/cat/up \(a link back\), train/cat/more/deeper/back \(read already\)"
    with pytest.warns(VPTWarning, match=rf"Not read of .*: the folders train/{circles}\.$"):
        module = data(root)
    assert len(module.split("train")) == 17
    assert labelled(module, "train")["train/cat/more/deeper/0.jpg"] == "cat"


def test_a_folder_that_cannot_be_read_is_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "train/cat/secret").mkdir()
    scan = os.scandir

    def refused(path: Path) -> Any:
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.warns(VPTWarning, match=r"the folders train/cat/secret \(Permission denied\)\.$"):
        assert len(data(root).split("train")) == 15


def test_a_class_in_two_forms_of_unicode_is_one(root: Path) -> None:
    (root / "train/cat").rename(root / "train/caf\u00e9")
    (root / "train/dog").rename(root / "train/cafe\u0301")
    for split in ("val", "test"):
        (root / split / "cat").rename(root / split / "cafe\u0301")
        shutil.rmtree(root / split / "dog")
    module = data(root)
    assert module.class_names == ["caf\u00e9", "owl"]
    assert np.bincount(module.split("train").labels).tolist() == [10, 5]
    assert set(module.split("test").labels.tolist()) == {0, 1}
    rows = "path,label\n" + "".join(
        f"train/owl/{i}.jpg,{name}\n" for i, name in enumerate(["cafe\u0301", "caf\u00e9", "a", "a"])
    )
    assert data(table(root, "rows.csv", rows)).class_names == ["a", "caf\u00e9"]


@pytest.mark.parametrize("names", [["Cat", "cat"], ["cat", "cat "], ["01", "1"]])
def test_classes_that_look_alike_are_pointed_out(tmp_path: Path, names: list[str]) -> None:
    root = make_folder(tmp_path / "pets", {"train": 2}, names)
    with pytest.warns(
        VPTWarning, match=f"has the classes '{names[0]}' and '{names[1]}', which differ in case, blanks or"
    ):
        assert data(root).class_names == names


def test_names_of_files_that_are_no_text_are_read(root: Path) -> None:
    os.rename(os.fsencode(root / "train/cat/0.jpg"), os.fsencode(root / "train/cat") + b"/\xe4\n.jpg")  # noqa: PTH104
    module = data(root)
    assert len(module.split("train")) == 15
    assert len(module.describe()["fingerprint"]) == 64


def test_folders_that_are_no_task_are_answered_by_what_is_missing(root: Path, tmp_path: Path) -> None:
    shutil.rmtree(root / "train")
    (tmp_path / "bare").mkdir()
    for folder in (tmp_path / "none", root, tmp_path / "bare"):
        with pytest.raises(DataError) as caught:
            data(folder)
        found = " (it has test, val; test, val named as a split)" if folder == root else ""
        missing = folder / "train" if folder.exists() else folder
        assert str(caught.value).startswith(f"{missing} does not exist{found}: lay the images out as train/<class>/,")


def empty_class(root: Path) -> None:
    (root / "train/eel").mkdir()


def stray_image(root: Path) -> None:
    (root / "test/cat/0.jpg").rename(root / "test/0.jpg")


def unknown_class(root: Path) -> None:
    (root / "test/owl").rename(root / "test/owls")


def two_validations(root: Path) -> None:
    make_folder(root, {"valid": 1})


def no_split(root: Path) -> None:
    make_folder(root, {"tset": 1})


def one_below(root: Path) -> None:
    home = root.rename(root.with_name("inner"))
    root.mkdir()
    home.rename(root / "pets")


def shift_with_a_name_of_a_split(root: Path) -> None:
    make_folder(root, {"shift_test": 1})


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (empty_class, "train/eel holds no image: add some, or remove the folder."),
        (stray_image, "test/0.jpg lies in no class folder: move it into .*test/<class>/."),
        (unknown_class, "test/owls/0.jpg is of class 'owls', of which there is no training image."),
        (two_validations, "val and .*valid are the same split: keep one of them."),
        (shift_with_a_name_of_a_split, "shift_test: unknown split 'shift_test'; use train, .* or shift_<name>."),
        (
            no_split,
            r"tset lies beside splits, holds images \(3\) and is none: rename it to train, .* away",
        ),
        (one_below, r"pets/pets holds splits itself \(train\): name that folder as root\."),
    ],
)
def test_a_wrong_layout_is_one_sentence(root: Path, spoil: Any, fault: str) -> None:
    spoil(root)
    with pytest.raises(DataError, match=fault) as caught:
        data(root)
    assert "\n" not in str(caught.value)


def test_a_damaged_image_is_named_without_a_line(root: Path) -> None:
    (root / "val/dog/1.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"^\S*val/dog/1.jpg is not an image; restore the file or remove it.$"):
        data(root).split("val")


def table(root: Path, name: str, text: str) -> Path:
    """Writes a table beside the folders; Parquet from the same text."""
    file = root / name
    text = text.replace(",", "\t") if file.suffix == ".tsv" else text
    file.write_text(text, encoding="utf-8")
    if file.suffix == ".parquet":
        pd.read_csv(file, dtype=str).to_parquet(file)
    return file


ROWS = """path,label,split
train/cat/0.jpg,cat,train
train/dog/0.jpg,dog,train
train/dog/1.jpg,dog,train
test/dog/0.jpg,dog,test
val/cat/0.jpg,cat,valid
val/cat/1.jpg,cat,shift_dark
"""


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.parquet"])
def test_a_table_is_a_task(root: Path, name: str) -> None:
    module = data(table(root, name, ROWS))
    assert (module.name, module.class_names) == ("rows", ["cat", "dog"])
    assert labelled(module, "train") == {"train/cat/0.jpg": "cat", "train/dog/0.jpg": "dog", "train/dog/1.jpg": "dog"}
    assert labelled(module, "val") == {"val/cat/0.jpg": "cat"}
    assert labelled(module, "dark") == {"val/cat/1.jpg": "cat"}
    assert labelled(module, "test") == {"test/dog/0.jpg": "dog"}
    same = data(table(root, "rows.csv", ROWS))
    assert module.describe()["fingerprint"] == same.describe()["fingerprint"]  # of the rows, not of the file


def test_without_a_split_column_all_rows_are_trained_on_but_those_held_out(root: Path) -> None:
    rows = "path,label\n" + "".join(f"train/{name}/{i}.jpg,{name}\n" for name in ("cat", "dog") for i in range(5))
    module = data(table(root, "rows.csv", rows))
    assert module.describe()["counts"] == {"train": 8, "val": 2}


def test_labels_may_be_whole_numbers_or_any_text(root: Path) -> None:
    def classes(labels: Sequence[str]) -> list[str]:
        images = [f"train/{name}/{number}.jpg" for name in ("cat", "dog", "owl") for number in range(5)]
        rows = "path,label\n" + "".join(f"{path},{labels[i % len(labels)]}\n" for i, path in enumerate(images))
        return data(table(root, "rows.csv", rows)).class_names

    assert classes(["10", "9", "2"]) == ["2", "9", "10"]
    assert classes(["NA", "007", "null", "1.0"]) == ["007", "1.0", "NA", "null"]
    frame = pd.DataFrame({"path": [f"train/cat/{i}.jpg" for i in range(4)], "label": [10, 2, 10, 2]})
    for kind in ("int64", "category"):
        frame.assign(label=frame["label"].astype(kind)).to_parquet(root / "rows.parquet")
        assert data(root / "rows.parquet").class_names == ["2", "10"]


def test_paths_in_any_script_with_commas_and_blank_lines(root: Path) -> None:
    name = 'Köpfe, хвосты "猫".jpg'
    (root / "train/cat/0.jpg").rename(root / name)
    shutil.copy(root / name, root / f"2 {name}")
    quoted = name.replace('"', '""')
    text = f'\ufeffpath,label\n"{quoted}",Katze 猫\n\n"2 {quoted}",Katze 猫\ntrain/dog/0.jpg,d\ntrain/dog/1.jpg,d\n\n'
    module = data(table(root, "列表.csv", text))
    assert {**labelled(module, "train"), **labelled(module, "val")}[name] == "Katze 猫"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "file,label\na.jpg,cat\n",
            "no column 'path'; it has 'file', 'label', and is asked for 'path', 'label'",
        ),
        ("path,class\na.jpg,cat\n", "has no column 'label'; it has 'path', 'class'"),
        ("file;label\na.jpg;cat\n", "has no column 'path'; it has 'file', 'label', and is"),
        ("file\na.jpg\n", "has no column 'path'; it has 'file', and is"),
        ("path,label\n", "lists no images"),
        ("", r"is empty: a table needs the columns path and label\.$"),
        ("path,label\na.jpg,cat\n'b.jpg',cat\n\"c.jpg,cat\nd.jpg,dog\n", "line 4: a quotation mark is not closed"),
        ('path,label\na.jpg,cat\n"b" x.jpg,cat\n', "line 3: a quotation mark is not closed, or stands within a field"),
        ('path,label\n"a\nb.jpg",cat\nc.jpg\n', "line 4 has 1 field and the header 2"),
        ("path,label,label\na.jpg,cat,dog\n", "has the column 'label' twice: remove or rename one"),
        ("path,label\na.jpg,cat\nb\0.jpg,cat\n", "line 3 has a NUL"),
        ("path,label\na.jpg,0.5\nb.jpg,1\n", "line 2: the label 0.5 is no whole number from 0 on"),
        ("path,label\na.jpg,1\nb.jpg,nan\n", "line 3: the label nan is no whole number"),
        ("path,label\na.jpg,cat\nb.jpg,cat\n", "has only one class, 'cat': a classifier tells two or more apart"),
        ('path,label\na.jpg,cat\nb.jpg,"d\no\ng"\n', "has a class 'd.no.ng', which cannot be printed: rename it"),
        ("path,label\na.jpg,cat\n\nb.jpg,\n", "line 4: the label is empty"),
        ("path,label\n,cat\n", "line 2: the path is empty"),
        (
            "path,label\na.jpg,cat\nb.jpg,cat\na.jpg,dog\n",
            "line 4: a.jpg is .* line 2 already, as 'cat' and here",
        ),
        ("path,label\na.jpg,cat\n./a.jpg,cat\n", "line 3: ./a.jpg is listed on line 2 already; remove one line"),
        ("path,label\na.jpg,cat\npath,label\nb.jpg,dog\n", "line 3 names the columns: leave it out"),
        ("path,label,split\na.jpg,cat,tranning\n", "line 2: unknown split 'tranning'; use train, training, val, valid"),
        ("path,label,split\na.jpg,cat,shift_val\n", "line 2: unknown split 'shift_val'"),
        ("path,label,split\na.jpg,cat,test\n", "lists no training images"),
        ("path,label,split\na.jpg,cat,train\nb.jpg,eel,test\n", "line 3: b.jpg is of class 'eel'"),
        (
            "path,label\na.jpg,cat,1\nb.jpg,cat,2,3,4\n",
            "line 2 has 3 fields and the header 2: correct it; a field with a comma",
        ),
    ],
)
def test_a_wrong_table_is_one_sentence(root: Path, text: str, fault: str) -> None:
    with pytest.raises(DataError, match=fault) as caught:
        data(table(root, "rows.csv", text))
    assert str(caught.value).startswith(str(root / "rows.csv"))
    assert "\n" not in str(caught.value)


def test_a_table_may_have_a_column_called_line(root: Path) -> None:
    module = data(
        table(
            root,
            "rows.csv",
            "line,path,label\nred,train/cat/0.jpg,cat\n,train/cat/1.jpg,cat\n,train/dog/1.jpg,dog\n"
            ",train/dog/2.jpg,dog\n",
        )
    )
    assert set(labelled(module, "train").values()) == {"cat", "dog"}
    with pytest.raises(DataError, match=r"line 3: the label is empty"):
        data(table(root, "rows.csv", "line,path,label\nred,train/cat/0.jpg,cat\n9,train/cat/1.jpg,\n"))
    with pytest.raises(DataError, match=r"it has 'path', 'class', and"):
        data(table(root, "rows.csv", "path,class\na.jpg,cat\n"))


def test_missing_tables_and_other_contents_are_one_sentence(root: Path) -> None:
    (root / "rows.parquet").write_bytes(b"no parquet")
    (root / "latin.csv").write_bytes("path,label\nä.jpg,cat\n".encode("latin-1"))
    pd.DataFrame({"path": ["a.jpg"], "label": [0.5]}).to_parquet(root / "decimal.parquet")
    for name in ("none.csv", "none.parquet", "rows.parquet", "latin.csv", "decimal.parquet"):
        with pytest.raises(DataError, match=rf"{name} is not a readable table") as caught:
            data(root / name)
        assert "\n" not in str(caught.value)


def test_a_missing_image_of_a_table_is_named_with_its_line(root: Path) -> None:
    rows = "path,label,split\ntrain/cat/0.jpg,a,train\nnone.jpg,a,train\ntrain/cat/1.jpg,b,train\nval/cat/1.jpg,b,val\n"
    with pytest.raises(DataError, match=r"rows\.csv, line 3: .*none\.jpg does not exist; .* remove the line"):
        data(table(root, "rows.csv", rows)).split("train")


def make_mnist(root: Path, counts: dict[str, int]) -> None:
    """The idx files of MNIST with noise in them."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for word, count in counts.items():
        pixels, labels = random.integers(0, 256, (count, 28, 28), np.uint8), np.arange(count, dtype=np.uint8) % 10
        header = struct.pack(">iiii", 0x803, count, 28, 28)
        (raw / f"{word}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (raw / f"{word}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x801, count) + labels.tobytes())


def make_dtd(root: Path) -> None:
    """DTD with two classes; its official lists of ten partitions are cut to the first."""
    home = root / "dtd" / "dtd"
    make_folder(home / "images", {"": 6}, ["woven", "banded"])
    (home / "labels").mkdir()
    for split, numbers in (("train", (0, 1, 2)), ("val", (3,)), ("test", (4, 5))):
        lines = [f"{name}/{number}.jpg\n" for name in ("banded", "woven") for number in numbers]
        (home / "labels" / f"{split}1.txt").write_text("".join(lines))


def test_a_torchvision_dataset_with_training_and_test_images(tmp_path: Path) -> None:
    make_mnist(tmp_path, {"train": 40, "t10k": 20})
    module = data(tmp_path, torchvision="MNIST")
    assert (module.name, module.class_names[3]) == ("mnist", "3 - three")
    assert module.describe()["counts"] == {"train": 30, "val": 10, "test": 20}
    assert module.split("test").labels.tolist() == [*range(10), *range(10)]
    from torchvision.datasets import MNIST  # type: ignore[import-untyped]

    original = MNIST(str(tmp_path), train=True)
    train = module.split("train")
    for position, name in enumerate(train.paths):
        image, label = original[int(name.removeprefix("mnist-train/"))]
        assert label == train.labels[position]
        np.testing.assert_array_equal(
            train.images[position].transpose(1, 2, 0), module.preset(image.convert("RGB"), 16)
        )
    assert len(data(tmp_path, torchvision="MNIST", shots=2).split("train")) == 20


def test_a_torchvision_dataset_with_a_validation_split_of_its_own(tmp_path: Path) -> None:
    make_dtd(tmp_path)
    module = data(tmp_path, torchvision="DTD")
    assert module.class_names == ["banded", "woven"]
    assert module.describe()["counts"] == {"train": 6, "val": 2, "test": 4}
    (tmp_path / "dtd/dtd/images/woven/4.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"Image 2 of dtd-test cannot be decoded \(cannot identify image file"):
        module.split("test")


def test_other_pixels_are_another_torchvision_dataset(tmp_path: Path) -> None:
    make_mnist(tmp_path / "a", {"train": 40, "t10k": 20})
    make_mnist(tmp_path / "b", {"t10k": 20, "train": 40})  # the same labels
    prints = [data(tmp_path / name, torchvision="MNIST").describe()["fingerprint"] for name in "aba"]
    assert prints[0] == prints[2] != prints[1]


def test_what_torchvision_cannot_give_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'CIFAR10'"):
        data(tmp_path, torchvision="CIFAR-10")
    with pytest.raises(DataError, match=r"CIFAR10 cannot be read below .* get it with torchvision\.datasets\.CIFAR10"):
        data(tmp_path, torchvision="CIFAR10")
    with pytest.raises(ConfigError, match=r"EMNIST needs a split, e\.g\. torchvision_args: {split: letters}"):
        data(tmp_path, torchvision="EMNIST")
    with pytest.raises(ConfigError, match="torchvision_args may not set 'train' of MNIST"):
        data(tmp_path, torchvision="MNIST", torchvision_args={"train": False})


NOT_SUPPORTED = ["DatasetFolder", "FakeData", "HMDB51", "ImageFolder", "Kinetics", "LSUN", "MovingMNIST", "UCF101"]


@pytest.mark.parametrize("name", [*NOT_SUPPORTED, "VisionDataset", "wrap_dataset_for_transforms_v2"])
def test_what_is_no_classification_dataset_of_torchvision_is_said_to_be_none(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"{name} is no classification dataset .* Supported are CIFAR10, ") as caught:
        data(tmp_path, torchvision=name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", SUPPORTED)
def test_every_supported_dataset_of_torchvision_that_is_absent_is_one_sentence(tmp_path: Path, name: str) -> None:
    arguments = {"split": "letters"} if name == "EMNIST" else {}
    with pytest.raises(DataError, match=rf"torchvision's {name} cannot be read below .*") as caught:
        data(tmp_path, torchvision=name, torchvision_args=arguments)
    message = str(caught.value)
    assert "\n" not in message
    takes_it = name not in {"FER2013", "ImageNet"} and "install the package" not in message
    assert ("download=True" in message.partition("; ")[2]) == takes_it


@pytest.mark.parametrize(
    "fault",
    [NotImplementedError("no"), KeyError("x"), EOFError(), AssertionError(), UnpicklingError("bad"), ValueError("bad")],
)
def test_whatever_torchvision_raises_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr("torchvision.datasets.MNIST._load_data", fail)
    make_mnist(tmp_path, {"train": 40, "t10k": 20})
    with pytest.raises(DataError, match=rf"MNIST cannot be read below \S+ \({type(fault).__name__}.*\); if ") as caught:
        data(tmp_path, torchvision="MNIST")
    assert "\n" not in str(caught.value)


def test_a_package_that_is_missing_is_to_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'h5py'")

    monkeypatch.setattr("torchvision.datasets.PCAM.__init__", fail)
    with pytest.raises(DataError, match=r"No module named 'h5py'\); install the package that it asks for\.$"):
        data(tmp_path, torchvision="PCAM")


def test_a_damaged_split_does_not_vanish(tmp_path: Path) -> None:
    make_mnist(tmp_path, {"train": 40, "t10k": 20})
    file = tmp_path / "MNIST/raw/t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(DataError, match="MNIST cannot be read below"):
        data(tmp_path, torchvision="MNIST")


def test_a_pickle_that_is_not_torchvisions_own_is_not_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("batches.meta", "test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
        (folder / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match="CIFAR10 cannot be read below"):
        data(tmp_path, torchvision="CIFAR10")
    assert not (tmp_path / "sprung").exists()


def test_a_torchvision_dataset_that_needs_arguments_is_given_them(tmp_path: Path) -> None:
    make_mnist(tmp_path, {"emnist-digits-train": 40, "emnist-digits-test": 20})
    (tmp_path / "MNIST").rename(tmp_path / "EMNIST")
    module = data(tmp_path, torchvision="EMNIST", torchvision_args={"split": "digits"})
    assert module.describe()["counts"] == {"train": 30, "val": 10, "test": 20}


def test_an_edited_torchvision_dataset_with_equal_labels_is_decoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VPT_CACHE", str(tmp_path / "cache"))  # inside the root
    make_mnist(tmp_path, {"train": 400, "t10k": 20})
    for _ in range(2):
        data(tmp_path, torchvision="MNIST").split("val")
    assert len(list((tmp_path / "cache").glob("*.pixels"))) == 1
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    before = data(tmp_path, torchvision="MNIST").split("train")
    number = int(before.paths[3].removeprefix("mnist-train/"))
    content[16 + 784 * number : 16 + 784 * (number + 1)] = bytes(784)
    path.write_bytes(content)
    assert before.images[3].any()
    assert not data(tmp_path, torchvision="MNIST").split("train").images[3].any()


def test_numbers_out_of_range_are_refused(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "pets", {"train": 3})
    with pytest.raises(ConfigError, match="val_fraction is 1"):
        data(root, val_fraction=1.0)
    with pytest.raises(UnknownNameError, match="did you mean 'square'"):
        data(root, preset="squared")
