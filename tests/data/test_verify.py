from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.fakes import make_task
from tests.fakes_suites import make_imagenet
from vpt.data import ImageNetDataModule
from vpt.data.catalog.cards import load_card
from vpt.data.catalog.verify import Report, verify
from vpt.errors import DataError, UnknownNameError


def rewrite(file: Path, old: str, new: str) -> None:
    file.write_text(file.read_text().replace(old, new))


def check(task: Path) -> Report:
    return verify(task.name, task.parent)


def test_a_whole_task_has_no_fault_and_every_list_its_histogram(task: Path) -> None:
    report = check(task)
    report.check()
    assert report.faults == []
    found = {each.name: each.histogram.tolist() for each in report.lists}
    assert found == {
        "train800val200": [6, 6, 6],
        "train800": [4, 4, 4],
        "val200": [2, 2, 2],
        "test": [3, 3, 3],
        "shift_sepia": [3, 3, 3],
    }
    assert {each.official for each in report.lists} == {None}


def test_counts_are_compared_with_the_card(tmp_path: Path) -> None:
    report = check(make_task(tmp_path / "signdigits10", classes=10, per_class=(80, 20, 3), size=(8, 8)))
    assert report.faults == ["test has 30 images and officially 983"]
    with pytest.raises(
        DataError, match=r"signdigits10 is not as it should be: test has 30 images and officially 983\."
    ):
        report.check()


def test_a_list_of_the_card_that_is_not_there_is_named(tmp_path: Path) -> None:
    faults = check(make_task(tmp_path / "pacs7_photo", classes=7, shifts=["cartoon", "sketch"], size=(8, 8))).faults
    assert "there is no list shift_art_painting" in faults


def test_every_image_that_cannot_be_decoded_is_counted_and_some_are_named(task: Path) -> None:
    broken = sorted((task / "images" / "test").rglob("*.jpg"))[:5]
    broken[0].unlink()
    broken[1].write_text("not an image")
    for path in broken[2:]:
        path.write_bytes(path.read_bytes()[:-300])
    faults = check(task).faults
    assert [str(path) in fault for path, fault in zip(broken[:3], faults, strict=False)] == [True] * 3
    assert faults[3:] == ["2 further images cannot be decoded"]


def test_a_test_image_that_is_trained_on_is_found_under_any_name_and_format(task: Path) -> None:
    trained, held = task / "images/train800/class 1/2.jpg", task / "images/test/class 0/1.jpg"
    Image.open(trained).save(held.with_suffix(".png"))
    rewrite(task / "test.txt", "test/class 0/1.jpg", "test/class 0/1.png")
    (fault,) = check(task).faults
    assert fault.startswith("1 times a test image is a training or validation image too")
    assert str(trained) in fault
    assert str(held.with_suffix(".png")) in fault


def test_what_a_complete_published_dataset_repeats_is_noted_and_no_fault(
    task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = load_card("caltech101")
    assert card is not None
    sizes = {"train800": 12, "val200": 6, "train800val200": 18, "test": 9}
    published = replace(card, name=task.name, num_classes=3, sizes=sizes)
    monkeypatch.setattr("vpt.data.catalog.verify.card_of", lambda name: published)
    shutil.copy(task / "images/train800/class 1/2.jpg", task / "images/test/class 0/1.jpg")
    report = check(task)
    assert report.faults == []
    assert [note.partition(",")[0] for note in report.notes] == [
        "1 times a test image is a training or validation image too"
    ]
    rewrite(task / "test.txt", "test/class 0/1.jpg", "train800/class 1/2.jpg")
    assert len(check(task).faults) == 1  # the very file is another matter


def test_a_path_in_two_splits_is_found(task: Path) -> None:
    rewrite(task / "val200.txt", "val200/class 0/0.jpg", "train800/class 0/0.jpg")
    rewrite(task / "shift_sepia.txt", "shift_sepia/class 2/0.jpg", "train800/class 1/1.jpg")
    assert [fault.partition(",")[0] for fault in check(task).faults] == [
        "1 times a test image is a training or validation image too",
        "1 times a validation image is a training image too",
    ]


def test_equal_images_within_a_split_are_no_fault(task: Path) -> None:
    shutil.copy(task / "images/test/class 0/0.jpg", task / "images/test/class 0/1.jpg")
    shutil.copy(task / "images/test/class 0/0.jpg", task / "images/shift_sepia/class 0/1.jpg")
    assert check(task).faults == []


def test_what_a_run_would_refuse_is_refused(task: Path, tmp_path: Path) -> None:
    rewrite(task / "test.txt", "\t2", "\t3")
    with pytest.raises(DataError, match=r"label 3 is outside 0\.\.2"):
        check(task)
    with pytest.raises(UnknownNameError, match=r"did you mean 'caltech101'\?"):
        verify("caltech11", tmp_path)
    with pytest.raises(DataError, match="made by this package"):
        verify("digits", tmp_path)


def test_imagenet_c_is_all_its_sets_that_are_here(tmp_path: Path) -> None:
    folder = make_imagenet(tmp_path, "imagenet_c")
    next(folder.rglob("*.JPEG")).write_text("not an image")
    report = verify("imagenet_c", tmp_path)
    names = [f"imagenet_c-{kind}-{severity}" for kind in ("gaussian_noise", "fog") for severity in (1, 3)]
    assert [each.name for each in report.lists] == names
    assert {each.found for each in report.lists} == {6}
    assert {each.official for each in report.lists} == {50_000}
    assert report.notes == ["4 of 95 sets are here"]
    assert len(report.faults) == 5
    assert not report.compared
    (one,) = verify("imagenet_c-fog-3", tmp_path).lists
    assert (one.name, one.found) == ("test", 6)
    with pytest.raises(DataError, match="does not exist"):
        verify("imagenet_c", tmp_path / "nowhere")


def test_imagenets_training_images_are_verified_where_they_are_here(tmp_path: Path) -> None:
    folder = make_imagenet(tmp_path, "imagenet_1k")
    train = tmp_path / "imagenet_1k" / "train"
    report = verify("imagenet_1k", tmp_path)
    assert {each.name: (each.found, each.official) for each in report.lists} == {
        "train": (58, 1_255_543), "val": (2, 25_624), "test": (6, 50_000),
    }  # fmt: skip
    assert report.compared
    shutil.copy(next(folder.rglob("*.JPEG")), next(train.rglob("*.JPEG")))
    assert any("a test image is a training" in fault for fault in verify("imagenet_1k", tmp_path).faults)
    shutil.rmtree(train)
    report = verify("imagenet_1k", tmp_path)
    assert [each.name for each in report.lists] == ["test"]
    assert not report.compared


@pytest.mark.parametrize(("name", "classes"), [("imagenet_a", 200), ("imagenet_r", 200), ("objectnet", 113)])
def test_of_a_set_with_some_of_imagenets_classes_these_are_what_counts(name: str, classes: int, tmp_path: Path) -> None:
    make_imagenet(tmp_path, name)
    (report,) = verify(name, tmp_path).lists
    assert report.classes == classes
    groups = ImageNetDataModule(name, tmp_path, allow_partial=True).groups()
    assert groups is not None
    assert len(groups) == classes
