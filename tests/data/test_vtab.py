from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vpt.data import VTABDataModule, default_root
from vpt.errors import DataError, UnknownNameError, VPTWarning


def test_any_folder_in_the_layout_is_a_task(task: Path) -> None:
    data = VTABDataModule("fake", root=task.parent, image_size=16)
    assert data.name == "fake"
    assert data.class_names == ["colour 0", "colour 1", "colour 2"]
    assert data.num_classes == 3
    assert data.shift_names() == ["sepia"]
    assert (data.preset.name, data.normalization) == ("vpt", "imagenet")
    assert [len(data.split(name)) for name in ("train", "val", "test", "sepia")] == [18, 6, 9, 9]


def test_nothing_is_decoded_before_a_split_is_asked_for(task: Path) -> None:
    for image in task.rglob("*.jpg"):
        image.write_bytes(b"")
    assert VTABDataModule("fake", root=task.parent).describe()["counts"]["train"] == 18


def test_lists_are_chosen_by_name(task: Path) -> None:
    data = VTABDataModule("fake", root=task.parent, train="train800", val="test", test="val200")
    assert data.describe()["lists"] | {"sepia": ""} == {
        "train": "fake/train800.txt",
        "val": "fake/test.txt",
        "test": "fake/val200.txt",
        "sepia": "",
    }


def test_description_is_json_and_counts_what_validation_shares_with_training(task: Path) -> None:
    both = VTABDataModule("fake", root=task.parent).describe()
    alone = VTABDataModule("fake", root=task.parent, train="train800", seed=3).describe()
    assert json.loads(json.dumps(both)) == both
    assert both["shared_with_train"] == {"val": 6, "test": 0, "sepia": 0}
    assert alone["shared_with_train"] == {"val": 0, "test": 0, "sepia": 0}
    assert both["fingerprint"] != alone["fingerprint"]
    assert alone["seed"] == 3
    assert both["complete"] is None  # no card states the sizes


def test_incomplete_data_are_not_called_complete(task: Path) -> None:
    incomplete = VTABDataModule("signdigits10", root=task.rename(task.parent / "signdigits10").parent).describe()
    assert incomplete["complete"] is False
    assert incomplete["counts"]["test"] == 9
    assert incomplete["official_counts"]["test"] == 983


def test_class_names_may_be_a_map_from_labels(task: Path) -> None:
    (task / "classes.json").write_text('{"2": "c", "0": "a", "1": "b"}')
    assert VTABDataModule("fake", root=task.parent).class_names == ["a", "b", "c"]


def test_a_gap_in_the_labels_is_pointed_out(task: Path) -> None:
    (task / "classes.json").unlink()
    for file in task.glob("*.txt"):
        file.write_text(file.read_text().replace("\t2", "\t4"))
    with pytest.warns(VPTWarning, match=r"train800val200.txt has no image of label 2, the first of 2 such up to 4"):
        assert VTABDataModule("fake", root=task.parent).num_classes == 5


def test_without_classes_json_the_card_names_the_classes_else_the_labels_do(task: Path) -> None:
    (task / "classes.json").unlink()
    assert VTABDataModule("fake", root=task.parent).class_names == ["0", "1", "2"]
    task.rename(task.parent / "pacs7_photo")
    assert VTABDataModule("pacs7_photo", root=task.parent).class_names[:2] == ["dog", "elephant"]


@pytest.mark.parametrize("text", ["{", "3", "[]", "[1, 2]", '{"1": "a", "2": "b"}', '{"0": 4}'])
def test_malformed_classes_json_is_named(task: Path, text: str) -> None:
    (task / "classes.json").write_text(text)
    with pytest.raises(DataError, match=r"classes\.json is not a list of class names"):
        VTABDataModule("fake", root=task.parent)


def test_label_outside_the_classes_is_refused_at_once(task: Path) -> None:
    (task / "classes.json").write_text('["a", "b"]')
    with pytest.raises(DataError, match=r"train800val200\.txt, line 9: label 2 is outside 0\.\.1"):
        VTABDataModule("fake", root=task.parent)


def test_missing_root_prints_the_tree_and_the_first_missing_path(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        VTABDataModule("caltech101", root=tmp_path / "nowhere")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'nowhere' / 'caltech101'} does not exist; set VPT_DATA")
    for part in ("images/", "train800val200.txt", "val200.txt", "test.txt", "classes.json"):
        assert part in message
    assert message.endswith("vpt data prepare vtab/caltech101 --source FOLDER")


def test_missing_list_is_the_first_missing_path(task: Path) -> None:
    (task / "val200.txt").unlink()
    with pytest.raises(DataError) as caught:
        VTABDataModule("fake", root=task.parent)
    assert str(caught.value).startswith(f"{task / 'val200.txt'} does not exist")


def test_shift_cannot_take_the_name_of_a_split(task: Path) -> None:
    (task / "shift_test.txt").write_text((task / "test.txt").read_text())
    with pytest.raises(DataError, match="a shift cannot be called 'test'"):
        VTABDataModule("fake", root=task.parent)


def test_unknown_preset_is_refused_before_any_reading(task: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'square'"):
        VTABDataModule("fake", root=task.parent, preset="squared")


def test_default_root_follows_the_environment(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_root() == Path("datasets")
    monkeypatch.setenv("VPT_DATA", str(task.parent))
    assert VTABDataModule("fake").describe()["counts"]["test"] == 9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task_name", "classes", "counts", "complete"),
    [
        ("caltech101", 102, [1000, 200, 1530], False),
        ("signdigits10", 10, [1000, 200, 983], True),
        ("pacs7_photo", 7, [1000, 200, 420, 420, 420, 420], True),
    ],
)
def test_real_tasks_are_what_their_cards_say(
    real_data: Path, task_name: str, classes: int, counts: list[int], complete: bool
) -> None:
    data = VTABDataModule(task_name, root=real_data, train="train800", preset="square", image_size=32)
    description = VTABDataModule(task_name, root=real_data).describe()
    assert data.num_classes == classes
    assert list(description["counts"].values()) == counts
    assert description["complete"] is complete
    assert data.card is not None
    assert sorted(data.card.class_names) == sorted(data.class_names)
    val = data.split("val")
    assert val.images.shape == (200, 3, 32, 32)
    assert np.ptp(val.images.reshape(200, -1), axis=1).min() > 0
