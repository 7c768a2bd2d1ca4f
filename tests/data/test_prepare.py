"""Originals, in fakes of their real layouts, become tasks."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.io import loadmat, savemat

from tests.data.originals import ORIGINALS, eye_photo, make_original, norb_matrix, shade
from vpt.data import VTABDataModule
from vpt.data.catalog.cards import load_card
from vpt.data.list_files import read_list
from vpt.data.prepare import TASKS, prepare
from vpt.data.prepare import vtab_tasks as writing
from vpt.data.prepare.arrays import read_matrix
from vpt.data.prepare.image_files import kitti_parts, sharpen
from vpt.data.prepare.originals import Chosen, Part
from vpt.errors import DataError, UnknownNameError

LISTS = ("train800", "val200", "train800val200", "test")
NORB = "smallnorb-5x46789x9x18x6x2x96x96-training"
DSPRITES = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"


@pytest.fixture(scope="module", params=list(ORIGINALS))
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a task, prepared from its fake original."""
    if request.param == "patch_camelyon":
        pytest.importorskip("h5py", reason="PatchCamelyon's original is HDF5: pip install 'vpt[data]'")
    source = make_original(request.param, tmp_path_factory.mktemp("original") / "original")
    return prepare(request.param, source, source.parent / "root", allow_partial=True)


def _grey(task: str, label: int) -> float:
    """Mean grey level with which a fake draws a label."""
    return 255 * label / 16 if task.startswith("dsprites") else shade(label)


def _fault(task: str, source: Path, root: Path) -> str:
    """The error, which must be one line."""
    with pytest.raises(DataError) as caught:
        prepare(task, source, root, allow_partial=True)
    assert "\n" not in str(caught.value)
    assert not (root / task / "test.txt").exists()
    return str(caught.value)


def test_all_nineteen_tasks_have_a_reader_a_card_and_a_fake() -> None:
    assert len(TASKS) == 19
    assert TASKS.keys() == ORIGINALS.keys()
    groups = [card.group for card in map(load_card, TASKS) if card is not None]
    assert {group: groups.count(group) for group in groups} == {"natural": 7, "specialized": 4, "structured": 8}


def test_an_original_becomes_a_task_whose_pictures_keep_their_labels(prepared: Path) -> None:
    task = prepared.name
    assert prepared.parent.name == "root"
    data = VTABDataModule(task, root=prepared.parent, preset="square", image_size=16)
    card = load_card(task)
    assert card is not None
    assert data.class_names == (card.class_names or [str(label) for label in range(6)])
    assert data.describe()["complete"] is False
    for name in ("train", "val", "test"):
        split = data.split(name)
        if task != "diabetic_retinopathy":  # which is sharpened: what is flat becomes grey
            drawn = split.images.mean(axis=(1, 2, 3))
            np.testing.assert_allclose(drawn, [_grey(task, label) for label in split.labels.tolist()], atol=1.5)


def test_lists_are_disjoint_and_whole_and_in_order(prepared: Path) -> None:
    folder = prepared
    lists = {name: list(read_list(folder / f"{name}.txt", folder).paths) for name in LISTS}
    assert lists["train800val200"] == lists["train800"] + lists["val200"]
    assert len({*lists["train800val200"], *lists["test"]}) == len(lists["train800val200"]) + len(lists["test"])
    written = {path.relative_to(folder).as_posix() for path in (folder / "images").rglob("*") if path.is_file()}
    assert written == {*lists["train800val200"], *lists["test"]}
    assert lists["test"] == sorted(lists["test"])


@pytest.mark.parametrize("task", ["eurosat", "cifar", "dmlab"])
def test_the_same_original_gives_the_same_task(task: str, tmp_path: Path) -> None:
    source = make_original(task, tmp_path / "original")
    first, second = (prepare(task, source, tmp_path / name, allow_partial=True) for name in ("a", "b"))
    files = [path.relative_to(first) for path in first.rglob("*") if path.is_file()]
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)


@pytest.mark.parametrize(("outer", "found"), [(".", True), ("a", True), ("a/b", True), ("a/b/c", False)])
def test_an_original_is_found_up_to_two_folders_below_the_source(outer: str, found: bool, tmp_path: Path) -> None:
    make_original("svhn", tmp_path / "source" / outer)
    if found:
        prepare("svhn", tmp_path / "source", tmp_path / "root", allow_partial=True)
    else:
        with pytest.raises(DataError, match=r"source holds no train_32x32\.mat and test_32x32\.mat, nor does a folder"):
            prepare("svhn", tmp_path / "source", tmp_path / "root", allow_partial=True)


def test_image_files_are_copied_as_they_are_and_arrays_lose_nothing(tmp_path: Path) -> None:
    source = make_original("dtd", tmp_path / "dtd")
    copied = prepare("dtd", source, tmp_path / "root", allow_partial=True) / "images/banded/banded_0000.jpg"
    assert copied.read_bytes() == (source / "dtd/images/banded/banded_0000.jpg").read_bytes()
    source = tmp_path / "cifar"
    source.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
    for name in ("train", "test"):
        (source / f"{name}.bin").write_bytes(b"".join(bytes([0, 1]) + image.tobytes() for image in noise))
    folder = prepare("cifar", source, tmp_path / "root", allow_partial=True)
    for number, image in enumerate(noise):
        with Image.open(folder / f"images/test/{number:06d}.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), image.transpose(1, 2, 0))


def test_the_first_camera_of_smallnorb_is_taken(tmp_path: Path) -> None:
    folder = prepare("smallnorb_ele", make_original("smallnorb_ele", tmp_path / "o"), tmp_path, allow_partial=True)
    images = read_list(folder / "train800.txt", folder)
    assert [np.asarray(images.decode(0))[0, 0, 0]] == [shade(int(images.labels[0]))]


def test_kitti_is_split_by_video() -> None:
    videos = [f"drive_{number % 30:04d}" for number in range(300)]
    parts = kitti_parts(videos)
    assert {name: len(numbers) for name, numbers in parts.items()} == {"train": 240, "val": 30, "test": 30}
    homes = {name: {videos[number] for number in numbers} for name, numbers in parts.items()}
    assert not homes["train"] & homes["val"] | homes["train"] & homes["test"] | homes["val"] & homes["test"]
    # numpy.random.seed(123) and numpy.random.choice(sorted(videos), 3, replace=False), as TensorFlow Datasets has it
    assert homes["test"] == {"drive_0005", "drive_0007", "drive_0029"}


def test_only_a_whole_original_is_prepared_unless_a_partial_one_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_original("eurosat", tmp_path / "original")
    with pytest.raises(DataError, match=r"has 40 train images, and eurosat has 27,000 train; complete it"):
        prepare("eurosat", source, tmp_path / "root")
    assert not (tmp_path / "root").exists()
    split = dataclasses.replace(TASKS["eurosat"].split, sizes={"train": 40})
    monkeypatch.setitem(TASKS, "eurosat", dataclasses.replace(TASKS["eurosat"], split=split))
    prepare("eurosat", source, tmp_path / "root")


def test_a_killed_run_is_no_task_and_is_taken_up_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_original("svhn", tmp_path / "original")
    written: list[Path] = []
    fill = writing._fill

    def killed(file: Path, picture: object) -> None:
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(file)
        fill(file, picture)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(writing, "_fill", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare("svhn", source, tmp_path / "root", allow_partial=True)
    with pytest.raises(DataError, match="does not exist"):
        VTABDataModule("svhn", root=tmp_path / "root")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "root").rglob("*.png")}
    assert len(kept) == 5
    assert not list((tmp_path / "root").rglob("*.part"))
    monkeypatch.setattr(writing, "_fill", fill)
    prepare("svhn", source, tmp_path / "root", allow_partial=True)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    VTABDataModule("svhn", root=tmp_path / "root", image_size=16).split("test")


def _half_prepared(source: Path, root: Path) -> Path:
    """A task whose images are there and whose last list is not."""
    folder = prepare("svhn", source, root, allow_partial=True)
    (folder / "test.txt").unlink()
    return folder


@pytest.mark.parametrize("changed", ["pixels", "labels"])
def test_images_of_another_original_are_not_taken_up(changed: str, tmp_path: Path) -> None:
    folder = _half_prepared(make_original("svhn", tmp_path / "one"), tmp_path / "root")
    other = make_original("svhn", tmp_path / "other")
    content = loadmat(other / "train_32x32.mat")
    arrays = {"X": content["X"], "y": content["y"]}
    arrays["X" if changed == "pixels" else "y"] = 1 + arrays["X" if changed == "pixels" else "y"] % 9
    savemat(other / "train_32x32.mat", arrays)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    message = _fault("svhn", other, tmp_path / "root")
    assert message == f"{folder} holds images of another or an unknown original: remove the folder to prepare it anew."
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    prepare("svhn", tmp_path / "one", tmp_path / "root", allow_partial=True)


def test_images_of_an_unknown_original_are_not_taken_up(tmp_path: Path) -> None:
    source = make_original("svhn", tmp_path / "original")
    (_half_prepared(source, tmp_path / "root") / ".source").unlink()
    assert "holds images of another or an unknown original: remove the folder" in _fault(
        "svhn", source, tmp_path / "root"
    )


def test_what_a_killed_run_left_unfinished_is_removed(tmp_path: Path) -> None:
    source = make_original("svhn", tmp_path / "original")
    folder = _half_prepared(source, tmp_path / "root")
    (folder / "images" / "test" / ".000001.png.0123.part").write_bytes(b"half")
    prepare("svhn", source, tmp_path / "root", allow_partial=True)
    assert not list(folder.rglob("*.part"))


def test_without_its_last_list_a_task_is_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_original("svhn", tmp_path / "original")
    write_text = Path.write_text

    def full(file: Path, data: str, encoding: str, errors: str | None = None) -> int:
        if file.name.startswith(".test.txt"):
            raise OSError(28, "No space left on device")
        return write_text(file, data, encoding=encoding)

    monkeypatch.setattr(Path, "write_text", full)
    message = _fault("svhn", source, tmp_path / "root")
    assert "cannot be written ([Errno 28] No space left on device); the images written so far are kept" in message
    assert (tmp_path / "root/svhn/train800val200.txt").is_file()
    monkeypatch.undo()
    prepare("svhn", source, tmp_path / "root", allow_partial=True)


def test_a_disk_that_cannot_be_read_is_not_taken_for_one_that_is_full(tmp_path: Path) -> None:
    def broken(position: int) -> bytes:
        raise OSError(5, "Input/output error")

    part = Part(["test/7.png"], np.zeros(1, np.int64), broken)
    with pytest.raises(DataError, match=r"test/7\.png cannot be read from the original \(\[Errno 5\]"):
        writing.write_task(tmp_path, {"test": part}, {"test": Chosen("test", np.zeros(1, np.int64))}, ["a"])


def test_a_task_that_is_there_is_not_touched(tmp_path: Path) -> None:
    source = make_original("svhn", tmp_path / "original")
    folder = prepare("svhn", source, tmp_path / "root", allow_partial=True)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(DataError, match=r"svhn is there already, it has test\.txt; remove the folder"):
        prepare("svhn", source, tmp_path / "root", allow_partial=True)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_an_unknown_task_is_named_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Unknown VTAB task 'clevr': did you mean 'clevr_"):
        prepare("clevr", "anywhere", "anywhere")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("there", [True, False])
def test_a_missing_original_is_said_with_its_layout_and_how_to_get_it(task: str, there: bool, tmp_path: Path) -> None:
    source = tmp_path / "empty"
    if there:
        source.mkdir()
    card = load_card(task)
    assert card is not None
    with pytest.raises(DataError) as caught:
        prepare(task, source, tmp_path / "root")
    first = str(caught.value).splitlines()[0]
    assert first.startswith(f"{source} holds no " if there else f"{source} is not a folder")
    assert first.endswith(f"; the original of {task} is laid out as")
    assert str(caught.value).endswith(f"{card.layout}\n{card.obtain}")


def _cut(file: str, keep: float = 0.5) -> Callable[[Path], object]:
    def cut(source: Path) -> None:
        content = (source / file).read_bytes()
        (source / file).write_bytes(content[: int(len(content) * keep)])

    return cut


def _put(file: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda source: (source / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def _append(file: str, line: str) -> Callable[[Path], object]:
    return lambda source: (source / file).write_text((source / file).read_text() + line + "\n")


def _scenes(objects: int, name: str = "a.png") -> bytes:
    scene = {"image_filename": name, "objects": [{"pixel_coords": [1, 2, 9.0]}] * objects}
    return json.dumps({"scenes": [scene]}).encode()


CLEVR = "CLEVR_v1.0/scenes/CLEVR_train_scenes.json"
DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("cifar", _cut("cifar-100-binary/train.bin", 0.49), "train.bin is not records of 3074 bytes"),
    ("cifar", _put("cifar-100-binary/test.bin", b""), "test.bin is not records of 3074 bytes (it has 0 bytes)"),
    ("svhn", _cut("train_32x32.mat"), "train_32x32.mat is not a MATLAB file with X, y"),
    ("svhn", _put("test_32x32.mat", "<html>"), "test_32x32.mat is not a MATLAB file with X, y"),
    ("dsprites_loc", _cut(DSPRITES), "64x64.npz is not an archive with imgs and latents_classes"),
    ("dsprites_ori", _put(DSPRITES, "version https://git-lfs"), "64x64.npz is not an archive with imgs"),
    ("smallnorb_azi", _cut(f"{NORB}-dat.mat"), "-dat.mat is not an unpacked NORB matrix (it has"),
    ("smallnorb_azi", _cut(f"{NORB}-info.mat", 0.03), "(it states the shape (0, 0) in 2 dimensions)"),
    ("smallnorb_ele", _put(f"{NORB}-info.mat", gzip.compress(b"x")), "unpack .gz files first); get the file again."),
    ("smallnorb_ele", _put(f"{NORB}-info.mat", norb_matrix(np.zeros((3, 4), np.int32))), "stereo pairs of 96×96"),
    ("dmlab", _cut("dmlab-test.tfrecord-00001-of-00002", 0.9), "00001-of-00002 is not whole (it ends within"),
    ("clevr_count", _cut(CLEVR), "CLEVR_train_scenes.json is not CLEVR's scenes with image_filename and objects"),
    ("clevr_dist", _put(CLEVR, '{"scenes": [{"image_filename": "a.png"}]}'), "scenes.json is not CLEVR's scenes"),
    ("clevr_count", _put(CLEVR, _scenes(2)), "gives 'train/a.png' the label -1, which is outside 0..7"),
    ("clevr_dist", _put(CLEVR, _scenes(3, "../../secret.png")), "lists the image 'train/../../secret.png', which"),
    ("clevr_dist", _put(CLEVR, _scenes(3, "a\nb.png")), "lists the image 'train/a\\nb.png', which is no path"),
    ("clevr_dist", lambda s: (s / "CLEVR_v1.0/images/val/CLEVR_val_000003.png").unlink(), "000003.png is missing"),
    ("kitti", _append("training/label_2/000003.txt", "Car 1 2"), "000003.txt, line 3: not the 15 fields of a KITTI"),
    ("kitti", _put("mapping/train_rand.txt", "1,2,99"), "train_rand.txt is not a list of lines of train_mapping.txt"),
    ("kitti", _put("mapping/train_rand.txt", "0,1,2"), "train_rand.txt is not a list of lines of train_mapping.txt"),
    ("dtd", _append("dtd/labels/train1.txt", "plaid/plaid_1.jpg"), "train1.txt, line 7: 'plaid/plaid_1.jpg' names no"),
    ("dtd", _append("dtd/labels/val1.txt", "banded/banded_0000.jpg"), "lists the image 'banded/banded_0000.jpg' twice"),
    ("dtd", _put("dtd/labels/test1.txt", ""), "has too few images: none is left for test"),
    ("sun397", _append("sun397_tfds_va.txt", "/x/xanadu/sun_1.jpg"), "line 5: '/x/xanadu/sun_1.jpg' names no image"),
    ("oxford_iiit_pet", _append("annotations/test.txt", "Bengal_1 six 1 1"), "found 'Bengal_1 six 1 1'"),
    ("oxford_iiit_pet", _append("annotations/test.txt", "Bengal_1 6 1 1"), "Bengal_1.jpg is missing, though"),
    ("oxford_iiit_pet", _append("annotations/test.txt", "Bengal_1 38 1 1"), "a class in 1..37, found 'Bengal_1 38"),
    ("oxford_flowers102", _cut("setid.mat"), "setid.mat is not a MATLAB file with trnid, valid, tstid"),
    ("diabetic_retinopathy", _put("trainLabels.csv", "image,grade\n"), "trainLabels.csv is not a table of image"),
    ("diabetic_retinopathy", _cut("train/1_left.jpeg"), "1_left.jpeg cannot be decoded"),
    ("diabetic_retinopathy", _append("trainLabels.csv", "9_left,two"), "trainLabels.csv is not a table of"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("task", "damage", "said"), DAMAGE, ids=[f"{task}-{n}" for n, (task, _, _) in enumerate(DAMAGE)]
)
def test_a_damaged_original_is_said_in_a_sentence(
    task: str, damage: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    source = make_original(task, tmp_path / "original")
    damage(source)
    assert said in _fault(task, source, tmp_path / "root")


def test_damaged_data_of_a_tfrecord_are_found_when_they_are_used(tmp_path: Path) -> None:
    file = make_original("dmlab", tmp_path / "original") / "dmlab-test.tfrecord-00000-of-00002"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    assert "the data of the record at byte 0 do not match" in _fault("dmlab", file.parent, tmp_path / "root")


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    source = make_original("eurosat", tmp_path / "original")
    for image in (source / "2750/River").iterdir():
        image.unlink()
    with pytest.raises(DataError, match=r"2750/River does not exist or holds no \.jpg; the original of eurosat is"):
        prepare("eurosat", source, tmp_path / "root", allow_partial=True)


def test_without_h5py_it_is_said_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("train", "valid", "test"):
        for kind in "xy":
            (tmp_path / f"camelyonpatch_level_2_split_{part}_{kind}.h5").touch()
    monkeypatch.setitem(sys.modules, "h5py", None)
    message = _fault("patch_camelyon", tmp_path, tmp_path / "root")
    assert message.endswith(r"is an HDF5 file, which needs h5py: pip install 'vpt[data]'.")


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 2, 3), (2, 1, 2, 3)])
@pytest.mark.parametrize("kind", [np.uint8, np.int32])
def test_a_norb_matrix_of_any_shape_is_read(shape: tuple[int, ...], kind: type, tmp_path: Path) -> None:
    values: NDArray[Any] = np.arange(math.prod(shape), dtype=kind).reshape(shape)
    (tmp_path / "a.mat").write_bytes(norb_matrix(values))
    read = read_matrix(tmp_path / "a.mat")
    np.testing.assert_array_equal(read, values)
    assert read.dtype == kind


@pytest.mark.parametrize(("at", "byte"), [(4, 0), (4, 9), (7, 0x80), (11, 0x80)])
def test_an_impossible_norb_header_is_refused(at: int, byte: int, tmp_path: Path) -> None:
    content = bytearray(norb_matrix(np.zeros((2, 3), np.uint8)))
    content[at] = byte
    (tmp_path / "a.mat").write_bytes(content)
    with pytest.raises(DataError, match="it states the shape"):
        read_matrix(tmp_path / "a.mat")


def test_an_eye_is_scaled_to_one_radius_and_its_rim_cut_off() -> None:
    sharpened = sharpen(eye_photo(50), radius=100)
    assert sharpened.shape == (180, 180, 3)  # twice 90 % of the radius
    assert sharpened.dtype == np.uint8
    assert (sharpened[0, 0] == 128).all()  # outside
    assert (sharpened[90, 90] == 128).all()  # within what is flat: no difference from the local average
    black = sharpen(np.zeros((30, 40, 3), np.uint8), radius=100)  # no eye: the height counts
    assert black.shape == (180, 180, 3)
    assert (black == 128).all()
