"""Images inside tar and Parquet files give what the same images in folders give."""

from __future__ import annotations

import io
import json
import multiprocessing
import tarfile
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from vpt.cli import main
from vpt.data import FolderDataModule
from vpt.data.cache.growing_cache import GrowingCache
from vpt.data.datasets.shards import PackedList
from vpt.errors import ConfigError, DataError

CLASSES = ("cat", "dog", "emu")
SIZE = 64


def jpeg(number: int) -> bytes:
    coarse = Image.fromarray(np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((80, 60 + number % 3)).save(file, "JPEG")
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_parquet(path: Path, numbers: range, names: bool = True, **columns: Any) -> None:
    """As Hugging Face's datasets write: a structure of bytes and path, a number, the names of classes beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": jpeg(number), "path": f"{number}.jpg"} for number in numbers]
    labels: list[Any] = [number % 3 if names else CLASSES[number % 3] for number in numbers]
    table = pa.table({"image": images, "label": labels, **columns})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": list(CLASSES), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=4)


def folder(root: Path) -> Path:
    for number in range(24):
        part = "train" if number < 12 else "val" if number < 18 else "test"
        path = root / part / CLASSES[number % 3] / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    return root


def tars(root: Path, kind: str) -> Path:
    for name, numbers in (
        ("train-0000", range(7)),
        ("train-0001", range(7, 12)),
        ("validation-0000", range(12, 18)),
        ("test-0000", range(18, 24)),
    ):
        files = {}
        for number in numbers:
            named = CLASSES[number % 3]
            home = f"./{named}/" if kind == "folders" else ""
            files[f"{home}{number:06d}.jpg"] = jpeg(number)
            if kind == "cls":
                files[f"{number:06d}.cls"] = f"{named}\n".encode()
            if kind == "json":
                files[f"{number:06d}.json"] = json.dumps({"label": named, "width": 80}).encode()
        write_tar(root / f"{name}.tar", files)
    return root


def parquets(root: Path, kind: str) -> Path:
    names = kind == "names"
    write_parquet(root / "data" / "train-00000-of-00002.parquet", range(7), names)
    write_parquet(root / "data" / "train-00001-of-00002.parquet", range(7, 12), names)
    write_parquet(root / "data" / "validation-00000-of-00001.parquet", range(12, 18), names)
    write_parquet(root / "data" / "test-00000-of-00001.parquet", range(18, 24), names)
    return root


MAKERS = {
    "tar with cls": lambda root: tars(root, "cls"),
    "tar with json": lambda root: tars(root, "json"),
    "tar of folders": lambda root: tars(root, "folders"),
    "Parquet with names": lambda root: parquets(root, "names"),
    "Parquet with words": lambda root: parquets(root, "words"),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VPT_CACHE", str(tmp_path / "cache"))


def module(root: Path | str, **options: Any) -> FolderDataModule:
    return FolderDataModule(root, image_size=SIZE, **{"batch_size": 5, **options})


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("large", [False, True])
def test_shards_give_the_images_of_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maker: str, large: bool
) -> None:
    plain, packed = module(folder(tmp_path / "photos")), module(MAKERS[maker](tmp_path / "shards"))
    if large:
        monkeypatch.setattr("vpt.data.cache.image_cache.LARGE", 3)
    assert packed.class_names == plain.class_names == list(CLASSES)
    for split in ("train", "val", "test"):
        ours, theirs = packed.split(split), plain.split(split)
        assert isinstance(ours.images, GrowingCache) is large
        order = np.argsort([int(Path(path).stem[-6:]) for path in theirs.paths])  # folders list by class
        assert ours.labels.tolist() == theirs.labels[order].tolist()
        both = ours.batch(range(len(ours)))["image"], theirs.batch(order.tolist())["image"]
        assert torch.equal(*both)
        assert np.array_equal(packed._splits[split].hashes, plain._splits[split].hashes[order])


def test_one_shard_without_a_split_is_held_out_from(tmp_path: Path) -> None:
    write_parquet(tmp_path / "birds.parquet", range(30))
    data = module(tmp_path / "birds.parquet")
    sizes = {split: len(data.split(split)) for split in ("train", "val", "test")}
    assert sum(sizes.values()) == 30
    assert min(sizes.values()) == 6
    assert data.describe()["held_out"]["test"] == 0.2


@pytest.mark.parametrize("kind", ["cls", "names"])
def test_an_address_is_read_without_being_fetched(tmp_path: Path, kind: str) -> None:
    root = tars(tmp_path / "shards", kind) if kind == "cls" else parquets(tmp_path / "shards", kind)
    memory = fsspec.filesystem("memory")
    for path in root.rglob("*.*"):
        memory.pipe(f"/{kind}/{path.relative_to(root).as_posix()}", path.read_bytes())
    here, there = module(root), module(f"memory://{kind}")
    for split in ("train", "test"):
        rows = range(len(here.split(split)))
        assert torch.equal(here.split(split).batch(rows)["image"], there.split(split).batch(rows)["image"])
    assert here.describe()["fingerprints"] == there.describe()["fingerprints"]


def _read(images: PackedList, results: Any) -> None:
    results.put([np.asarray(images.decode(position)).sum() for position in range(len(images))])


@pytest.mark.parametrize("maker", ["tar with cls", "Parquet with names"])
def test_processes_that_are_forked_read_for_themselves(tmp_path: Path, maker: str) -> None:
    data = module(MAKERS[maker](tmp_path / "shards"))
    images = data._splits["train"].pixels.args[0]  # type: ignore[attr-defined]
    expected = [np.asarray(images.decode(position)).sum() for position in range(len(images))]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_read, args=(images, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert found == [expected, expected]


def test_names_of_shards_say_the_split_and_shifts(tmp_path: Path) -> None:
    for name in ("imagenet1k-train-0000", "imagenet1k-train-0001", "imagenet1k-validation-00"):
        start = 5 * len(list(tmp_path.iterdir()))
        files = {f"{n:06d}.jpg": jpeg(n) for n in range(start, start + 5)}
        write_tar(
            tmp_path / f"{name}.tar", files | {f"{n:06d}.cls": CLASSES[n % 3].encode() for n in range(start, start + 5)}
        )
    for number in range(2):
        files = {f"{n:06d}.jpg": jpeg(n) for n in range(20 + 3 * number, 23 + 3 * number)}
        classes = {name.replace("jpg", "cls"): b"dog" for name in files}
        write_tar(tmp_path / f"shift_night-{number:03d}.tar", files | classes)
    data = module(tmp_path)
    assert {name: len(split) for name, split in data._splits.items()} == {"train": 10, "val": 5, "night": 6}
    assert data.shift_names() == ["night"]


def test_training_images_and_those_for_validation_are_joined(tmp_path: Path) -> None:
    data = module(tars(tmp_path, "cls"), train_on_val=True)
    assert len(data.split("train")) == 18
    assert torch.equal(data.split("train").batch(range(12, 18))["image"], data.split("val").batch(range(6))["image"])


def test_a_table_of_paths_and_photos_beside_an_archive_stay_what_they_are(tmp_path: Path) -> None:
    root = folder(tmp_path / "photos")
    write_tar(root / "backup.tar", {"a.jpg": jpeg(0), "a.cls": b"cat"})
    assert module(root).split("train").paths[0] == "train/cat/000000.jpg"
    rows = [(str(path.relative_to(root)), path.parent.name) for path in sorted(root.rglob("*.jpg"))]
    pq.write_table(pa.table({"path": [row[0] for row in rows], "label": [row[1] for row in rows]}), root / "t.parquet")
    assert module(root / "t.parquet").class_names == list(CLASSES)


def bad_class(root: Path) -> None:
    write_tar(root / "train.tar", {"1.jpg": jpeg(1), "2.jpg": jpeg(2), "2.cls": b"dog"})


def bad_json(root: Path) -> None:
    write_tar(root / "train.tar", {"1.jpg": jpeg(1), "1.json": b"{label: 3"})


def some_splits(root: Path) -> None:
    tars(root, "cls")
    write_tar(root / "more.tar", {"1.jpg": jpeg(1), "1.cls": b"dog"})


def no_training(root: Path) -> None:
    write_tar(root / "test.tar", {"1.jpg": jpeg(1), "1.cls": b"dog"})


def compressed(root: Path) -> None:
    root.mkdir()
    (root / "train.tar").write_bytes(b"\x1f\x8b" + bytes(600))


def two_columns(root: Path) -> None:
    write_parquet(root / "train.parquet", range(9), mask=[b"x"] * 9)


def other_label(root: Path) -> None:
    write_parquet(root / "train.parquet", range(9))
    table = pq.read_table(root / "train.parquet").rename_columns(["image", "species"])
    pq.write_table(table, root / "train.parquet")


def no_number(root: Path) -> None:
    write_parquet(root / "train.parquet", range(9))
    table = pq.read_table(root / "train.parquet")
    pq.write_table(table.set_column(1, "label", pa.array([0, 1, 3, *[0] * 6])), root / "train.parquet")


@pytest.mark.parametrize(
    ("make", "options", "sentence"),
    [
        (bad_class, {}, r"train\.tar: 1 has no class: it needs 1\.cls, 1\.json with 'label', or a folder named by it"),
        (bad_json, {}, r"train\.tar: 1\.json is no JSON"),
        (some_splits, {}, r"more\.tar names no split, and other shards do: name all by train"),
        (no_training, {}, r"has no images to train on: name shards by train"),
        (compressed, {}, r"train\.tar is no tar file that can be read \(.*\): it must not be compressed"),
        (two_columns, {}, r"train\.parquet has 2 columns of images \(image,mask\): name one by path_column"),
        (other_label, {}, r"has no column 'label'; it has image, species: name one by label_column"),
        (no_number, {}, r"train\.parquet, row 2: label is 3: give a class, or remove the row"),
        (two_columns, {"path_column": "photo"}, r"has no column 'photo'; it has image, label, mask: name one by path_"),
    ],
)
def test_what_is_wrong_with_shards_is_one_sentence(
    tmp_path: Path, make: Any, options: dict[str, Any], sentence: str
) -> None:
    make(tmp_path / "shards")
    with pytest.raises(DataError, match=sentence):
        module(tmp_path / "shards", **options)


def test_a_damaged_image_and_a_shard_that_is_gone_are_named(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "train.tar",
        {f"{n}.jpg": jpeg(n) if n else b"no image" for n in range(8)}
        | {f"{n}.cls": CLASSES[n % 3].encode() for n in range(8)},
    )
    data = module(tmp_path, test_fraction=0.0)
    with pytest.raises(DataError, match=r"train\.tar/0\.jpg of .* cannot be decoded"):
        data.setup("fit")


@pytest.mark.parametrize("options", [{"channels": 3}, {"targets": "multilabel", "label_separator": "|"}])
def test_shards_have_one_class_an_image_and_plain_colours(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Images in shards are of 8-bit RGB, with one class each"):
        module(tars(tmp_path, "cls"), **options)


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("memory://nowhere/at/all", r"^memory://nowhere/at/all holds no shards: they are files \.tar or \.parquet\.$"),
        ("nothing://bucket/photos", r"^nothing://bucket/photos cannot be read here \(Protocol not known: nothing\)\.$"),
    ],
)
def test_an_address_without_shards_is_one_sentence(address: str, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        module(address)


def test_a_run_on_shards_is_trained_and_tested_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = parquets(tmp_path / "shards", "names")
    config = Path(__file__).parents[2] / "configs" / "local" / "folder.yaml"
    given = [f"--data.root={root}", "--data.image_size=64", "--data.batch_size=6"]
    given += ["--model.backbone=vit_nano_patch8_64", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    assert main(["fit", "-c", str(config), *given, f"--trainer.default_root_dir={tmp_path / 'runs'}"]) == 0
    (record,) = (tmp_path / "runs").rglob("run.json")
    run = record.parent
    checkpoint = run / "checkpoints" / "last.ckpt"
    assert main(["test", "-c", str(run / "config.yaml"), "--ckpt_path", str(checkpoint)]) == 0
    assert json.loads(record.read_text())["read"] == {"train": 12, "val": 6, "test": 6}
    assert main(["data", "verify", str(root)]) == 0
    assert "every image can be decoded" in capsys.readouterr().out
