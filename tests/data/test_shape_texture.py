from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fakes_suites import make_class_folders
from vpt.data import ShapeTextureDataModule
from vpt.errors import ConfigError, DataError

ROWS = [
    ("cue-conflict/cat/a.jpg", "cat", "clock"),
    ("cue-conflict/dog/b.jpg", "dog", "cat"),
    ("edges/cat/c.png", "cat", ""),
    ("filled-silhouettes/clock/d.png", "clock", ""),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "shape_texture16"
    for path, _, _ in ROWS:
        make_class_folders((folder / path).parent, ["."])
        next((folder / path).parent.iterdir()).rename(folder / path)
    (folder / "class16_to_in1k_indices.json").write_text(json.dumps({"clock": [409, 530], "cat": [281], "dog": [151]}))
    write(folder, ROWS)
    return folder


def write(folder: Path, rows: list[tuple[str, str, str]]) -> None:
    lines = "".join(",".join(row) + "\n" for row in rows)
    (folder / "labels.csv").write_text("file,shape_class,texture_class\n" + lines)


def module(folder: Path) -> ShapeTextureDataModule:
    return ShapeTextureDataModule(folder.parent, image_size=16, allow_partial=True)


def test_each_image_of_a_cue_conflict_has_a_shape_and_a_texture(folder: Path) -> None:
    data = module(folder)
    assert data.class_names == ["cat", "clock", "dog"]
    assert data.class_ids() == ((281,), (409, 530), (151,))
    assert data.shift_names() == ["edges", "silhouettes"]
    assert data.split("test").labels.tolist() == [0, 2]
    assert data.texture_labels.tolist() == [1, 0]
    assert data.split("edges").labels.tolist() == [0]
    assert data.split("silhouettes").labels.tolist() == [1]
    assert data.split("silhouettes").images.shape == (1, 3, 16, 16)
    described = data.describe()
    assert (described["partial"], described["complete"]) == (True, False)


def test_it_cannot_be_trained_on_and_counts_are_checked(folder: Path) -> None:
    with pytest.raises(ConfigError, match="is a test set: nothing of it can be trained on"):
        module(folder).setup("fit")
    with pytest.raises(DataError, match="shape_texture16/cue-conflict: found 2 images, expected 480"):
        ShapeTextureDataModule(folder.parent, image_size=16)


def test_damaged_files_are_named(folder: Path) -> None:
    write(folder, [*ROWS, ("cue-conflict/dog/e.jpg", "dog", "")])
    with pytest.raises(
        DataError, match=r"labels\.csv, line 6: cue-conflict/dog/e\.jpg has a class that is none of the 3"
    ):
        module(folder)
    (folder / "labels.csv").write_text("file,label\n")
    with pytest.raises(DataError, match="has no column 'shape_class'; it has 'file', 'label'"):
        module(folder)
    for text, message in (("[1]", "is not a map from class names"), ('{"cat": [1000]}', r"lie in 0\.\.999")):
        (folder / "class16_to_in1k_indices.json").write_text(text)
        with pytest.raises(DataError, match=message):
            module(folder)
    (folder / "class16_to_in1k_indices.json").unlink()
    with pytest.raises(DataError, match=r"class16_to_in1k_indices\.json does not exist; set VPT_DATA"):
        module(folder)
