from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from tests.fakes import make_folder, make_task
from tests.fakes_suites import make_imagenet
from vpt.data import ImageNetDataModule
from vpt.data.catalog.cards import load_card
from vpt.data.catalog.verify import Report, near_pairs, perceptual_hash, verify
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
    trained, held = task / "images/train800/class 1/2.jpg", task / "images/test/class 1/1.jpg"
    Image.open(trained).save(held.with_suffix(".png"))
    rewrite(task / "test.txt", "test/class 1/1.jpg", "test/class 1/1.png")
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
    monkeypatch.setattr("vpt.data.catalog.verify.card_on_disk", lambda name, root: published)
    shutil.copy(task / "images/train800/class 1/2.jpg", task / "images/test/class 1/1.jpg")
    report = check(task)
    assert report.faults == []
    assert [note.partition(",")[0] for note in report.notes] == [
        "1 times a test image is a training or validation image too"
    ]
    rewrite(task / "test.txt", "test/class 1/1.jpg", "train800/class 1/2.jpg")
    assert len(check(task).faults) == 1  # the very file is another matter


def test_a_path_in_two_splits_is_found(task: Path) -> None:
    rewrite(task / "val200.txt", "val200/class 0/0.jpg", "train800/class 0/0.jpg")
    rewrite(task / "shift_sepia.txt", "shift_sepia/class 1/0.jpg", "train800/class 1/1.jpg")
    assert [fault.partition(",")[0] for fault in check(task).faults] == [
        "1 times a test image is a training or validation image too",
        "1 times a validation image is a training image too",
    ]


def test_equal_images_within_a_split_are_no_fault(task: Path) -> None:
    shutil.copy(task / "images/test/class 0/0.jpg", task / "images/test/class 0/1.jpg")
    shutil.copy(task / "images/test/class 0/0.jpg", task / "images/shift_sepia/class 0/1.jpg")
    assert check(task).faults == []


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "photos", {"train": 4, "val": 2, "test": 2})


def test_own_folders_and_tables_are_verified_wherever_they_are(photos: Path, tmp_path: Path) -> None:
    for report in (verify("photos", tmp_path), verify(str(photos), tmp_path / "elsewhere")):
        assert {each.name: each.histogram.tolist() for each in report.lists} == {
            "train": [4, 4, 4], "val": [2, 2, 2], "test": [2, 2, 2],
        }  # fmt: skip
        assert (report.faults, report.notes) == ([], [])
    shutil.copy(photos / "test/cat/0.jpg", photos / "train/cat/4.jpg")
    rows = [f"{path.relative_to(tmp_path)},{path.parts[-2]},{path.parts[-3]}" for path in sorted(photos.rglob("*.jpg"))]
    (tmp_path / "table.csv").write_text("path,label,split\n" + "\n".join(rows) + "\n")
    for name in ("photos", "table.csv"):
        (fault,) = verify(name, tmp_path).faults
        example = f"{photos / 'test/cat/0.jpg'} and {photos / 'train/cat/4.jpg'}"
        assert fault == f"1 times a test image is a training or validation image too, for instance {example}"


def test_a_held_out_part_is_compared_with_the_rest(tmp_path: Path) -> None:
    photos = make_folder(tmp_path / "photos", {"train": 5})
    for path in (photos / "train" / "owl").iterdir():
        path.write_bytes((photos / "train/owl/0.jpg").read_bytes())
    (fault,) = verify("photos", tmp_path).faults
    assert fault.startswith("1 times a validation image is a training image too, for instance ")


def test_one_image_with_two_labels_is_a_fault_and_a_copy_is_noted(photos: Path, tmp_path: Path) -> None:
    shutil.copy(photos / "train/cat/0.jpg", photos / "train/cat/4.jpg")
    report = verify("photos", tmp_path)
    assert report.faults == []
    example = f"{photos / 'train/cat/0.jpg'} and {photos / 'train/cat/4.jpg'}"
    assert report.notes == [f"1 times a training image is there twice, for instance {example}"]
    shutil.move(photos / "train/cat/4.jpg", photos / "train/owl/4.jpg")
    (fault,) = verify("photos", tmp_path).faults
    assert fault == f"1 times an image has several labels, for instance {example.replace('cat/4', 'owl/4')}"


def test_images_that_look_alike_are_noted_within_and_between_parts(photos: Path, tmp_path: Path) -> None:
    image = Image.open(photos / "test/dog/1.jpg")
    image.resize((56, 40)).save(photos / "train/dog/again.png")
    image.save(photos / "test/dog/worse.jpg", quality=60)
    report = verify("photos", tmp_path)
    assert report.faults == []
    between, within = report.notes
    assert between.startswith("2 times a test image looks nearly like a training or validation image (pHash, 4 of 64")
    assert between.endswith(f"{photos / 'test/dog/1.jpg'} and {photos / 'train/dog/again.png'}")
    assert within.startswith("2 times a test image looks nearly like another test image (pHash")


@pytest.mark.parametrize(("name", "expected"), [("china", 0x9DB8C2C7445DBB24), ("flower", 0x9B64386633CDC96C)])
def test_the_hash_is_that_of_imagehash(name: str, expected: int) -> None:
    """`imagehash.phash` of version 4.3.2 on the photographs that scikit-learn ships."""
    image = Image.fromarray(load_sample_image(f"{name}.jpg"))
    assert perceptual_hash(image) == expected
    assert (perceptual_hash(image.resize((320, 213))) ^ expected).bit_count() <= 1


@pytest.mark.parametrize("distance", [0, 4, 9])
def test_near_pairs_are_those_of_all_comparisons(distance: int) -> None:
    random = np.random.default_rng(0)
    centres = random.integers(0, 2**63, 20, dtype=np.uint64)
    flips = (random.random((300, 64)) < 0.06) @ (2 ** np.arange(64, dtype=object))
    hashes = np.unique(centres[random.integers(0, 20, 300)] ^ flips.astype(np.uint64))
    near = np.bitwise_count(hashes[:, None] ^ hashes[None, :]) <= distance
    expected = {(i, j) for i, j in zip(*near.nonzero(), strict=True) if i < j}
    found = [
        tuple(sorted(pair))
        for first, second in near_pairs(hashes, distance)
        for pair in zip(first, second, strict=True)
    ]
    assert set(found) == expected
    assert bool(expected) == bool(distance)


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
