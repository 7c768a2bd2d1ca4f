"""The five fine-grained tasks of the VPT paper (Jia et al. 2022, section 4.1), from their authors' own files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vpt.data.cache import decoded
from vpt.data.catalog.cards import Card, load_card
from vpt.data.datasets.published_folder import check_count, find_folder, hold_out, image_list
from vpt.data.datasets.vtab import default_root
from vpt.data.images import ImageList
from vpt.data.module import ImageDataModule, Split
from vpt.data.transforms import get_preset
from vpt.errors import DataError, UnknownNameError


@dataclass(frozen=True)
class Official:
    """What the authors' files say.

    Attributes:
        class_names: One name a class.
        lists: ``"train"`` and ``"test"``, and ``"val"`` where the authors have one; labels count from 0.
    """

    class_names: list[str]
    lists: dict[str, ImageList]


@dataclass(frozen=True)
class Layout:
    """How a dataset is unpacked.

    Attributes:
        folder: The folder that the authors' archive unpacks to.
        needed: Files and folders that must be in it.
        images: The folder that the paths in the reference's JSON splits are relative to.
        read: Reads the authors' files.
    """

    folder: str
    needed: tuple[str, ...]
    images: str
    read: Callable[[Path], Official]


def read_birds(folder: Path) -> Official:
    """CUB-200-2011 and NABirds: five text files with ``key value`` lines.

    NABirds' classes.txt also names the inner nodes of its hierarchy.txt, which label no image; classes are therefore
    those that label one, in the order of their ids. CUB-200-2011 uses all of its classes.

    Args:
        folder: Holds images.txt, image_class_labels.txt, train_test_split.txt, classes.txt and images/.
    """
    names = _table(folder / "classes.txt")
    paths = _table(folder / "images.txt")
    kinds = _table(folder / "image_class_labels.txt", keys_of=paths)
    training = _table(folder / "train_test_split.txt", keys_of=paths)
    used = sorted(set(kinds.values()), key=lambda kind: (len(kind), kind))
    for kind in used:
        if kind not in names:
            raise DataError(f"{folder / 'classes.txt'} does not name class {kind}, which labels an image.")
    label = {kind: position for position, kind in enumerate(used)}
    lists = {}
    for name, flag in (("train", "1"), ("test", "0")):
        lines = {key: line for line, key in enumerate(paths, start=1) if training[key] == flag}
        chosen, labels = [paths[key] for key in lines], [label[kinds[key]] for key in lines]
        lists[name] = image_list(folder / "images.txt", folder / "images", chosen, labels, list(lines.values()))
    return Official([names[kind] for kind in used], lists)


def read_flowers(folder: Path) -> Official:
    """Oxford Flowers-102; its files do not name the classes, so that these are ``"flower 1"`` to ``"flower 102"``.

    Args:
        folder: Holds jpg/image_00001.jpg and so on, imagelabels.mat (labels from 1) and setid.mat (numbers from 1).
    """
    labels = _mat(folder / "imagelabels.mat", "labels")["labels"].ravel().astype(np.int64) - 1
    numbers = _mat(folder / "setid.mat", "trnid", "valid", "tstid")
    lists = {}
    for name, key in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
        chosen = numbers[key].ravel().astype(np.int64)
        if chosen.size and not 1 <= chosen.min() <= chosen.max() <= len(labels):
            raise DataError(f"{folder / 'setid.mat'}: {key} names images outside 1..{len(labels)} of imagelabels.mat.")
        paths = [f"jpg/image_{number:05d}.jpg" for number in chosen]
        lists[name] = image_list(folder / "setid.mat", folder, paths, labels[chosen - 1])
    return Official([f"flower {number}" for number in range(1, int(labels.max()) + 2)], lists)


def read_dogs(folder: Path) -> Official:
    """Stanford Dogs.

    Args:
        folder: Holds Images/n02085620-Chihuahua/n02085620_10074.jpg and so on, and train_list.mat and test_list.mat,
            in lists/ or beside Images/.
    """
    lists: dict[str, ImageList] = {}
    names: dict[int, str] = {}
    for name in ("train", "test"):
        file = _first(folder / "lists" / f"{name}_list.mat", folder / f"{name}_list.mat")
        content = _mat(file, "file_list", "labels")
        paths = [str(cell.item()) for cell in content["file_list"].ravel()]
        labels = content["labels"].ravel().astype(np.int64) - 1
        for path, label in zip(paths, labels, strict=True):
            breed = path.split("/")[0].partition("-")[2]
            if names.setdefault(int(label), breed) != breed:
                raise DataError(f"{file}: label {label + 1} is given to {names[int(label)]} and to {breed}.")
        lists[name] = image_list(file, folder / "Images", paths, labels)
    return Official(_dense(names, folder / "lists"), lists)


def read_cars(folder: Path) -> Official:
    """Stanford Cars; the labels of the test images are a file of its own, which the devkit does not contain.

    Args:
        folder: Holds cars_train/, cars_test/, devkit/ with cars_meta.mat and cars_train_annos.mat, and
            cars_test_annos_withlabels.mat beside or in devkit/.
    """
    names = [
        str(cell.item()) for cell in _mat(folder / "devkit" / "cars_meta.mat", "class_names")["class_names"].ravel()
    ]
    lists = {}
    for name, file in (
        ("train", folder / "devkit" / "cars_train_annos.mat"),
        ("test", _first(*(home / "cars_test_annos_withlabels.mat" for home in (folder, folder / "devkit")))),
    ):
        rows = _mat(file, "annotations")["annotations"].ravel()
        if not {"class", "fname"} <= set(rows.dtype.names or ()):
            raise DataError(f"{file} has no class for each fname; the test labels are cars_test_annos_withlabels.mat.")
        paths = [f"cars_{name}/{row['fname'].item()}" for row in rows]
        labels = [int(row["class"].item()) - 1 for row in rows]
        lists[name] = image_list(file, folder, paths, labels)
        lists[name].check_labels(len(names))
    return Official(names, lists)


LAYOUTS = {
    "cub_200_2011": Layout(
        "CUB_200_2011",
        ("images", "images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"),
        "images",
        read_birds,
    ),
    "nabirds": Layout(
        "nabirds",
        ("images", "images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"),
        "images",
        read_birds,
    ),
    "oxford_flowers": Layout("flowers-102", ("jpg", "imagelabels.mat", "setid.mat"), "", read_flowers),
    "stanford_dogs": Layout("StanfordDogs", ("Images",), "Images", read_dogs),
    "stanford_cars": Layout(
        "stanford_cars",
        ("cars_train", "cars_test", "devkit/cars_meta.mat", "devkit/cars_train_annos.mat"),
        "",
        read_cars,
    ),
}


def _table(file: Path, keys_of: Mapping[str, str] | None = None) -> dict[str, str]:
    """Reads ``key value`` lines; with `keys_of`, each of those keys must have one."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not a readable text file ({error}).") from error
    values: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        key, _, value = line.strip().partition(" ")
        if not value:
            raise DataError(f"{file}, line {number}: expected 'key value', found {line!r}.")
        if key in values:
            raise DataError(f"{file}, line {number}: {key} has a line already; remove one of the two.")
        values[key] = value.strip()
    for key in keys_of or ():
        if key not in values:
            raise DataError(f"{file} has no line for {key}, which images.txt lists.")
    return values


def _first(*files: Path) -> Path:
    """Returns the first file that exists, else the first."""
    return next((file for file in files if file.is_file()), files[0])


def _mat(file: Path, *names: str) -> dict[str, Any]:
    """Reads variables of a MATLAB file, which holds numbers, characters, cells and structures, but no code."""
    from scipy.io import loadmat

    if not file.is_file():
        raise DataError(f"{file} does not exist; unpack the archive that holds it there.")
    try:
        content = loadmat(file)
        return {name: content[name] for name in names}
    except Exception as error:  # scipy raises a dozen unrelated types on damaged files
        raise DataError(f"{file} is not a MATLAB file with {', '.join(names)} ({error}).") from error


def _dense(names: Mapping[int, str], where: Path) -> list[str]:
    """Turns names by label into a list; every label 0..C-1 must have one."""
    missing = sorted(set(range(max(names) + 1)) - names.keys())
    if missing or min(names) < 0:
        raise DataError(f"{where}: no image has label {missing[0] + 1 if missing else min(names) + 1}.")
    return [names[label] for label in range(len(names))]


_HELD_OUT = 10  # one in ten, as the sizes of the published splits say
_JSON = ("train.json", "val.json", "test.json")


class FGVCDataModule(ImageDataModule):
    """CUB-200-2011, NABirds, Oxford Flowers-102, Stanford Dogs or Stanford Cars.

    The test images are the authors'. Training and validation images come, in this order, from the reference's
    train.json, val.json and test.json if they lie in the folder, from the authors' own validation list (Flowers), or
    from :func:`vpt.data.datasets.published_folder.hold_out`, which keeps one in ten of the official training images.

    Attributes:
        partial: True if some list has not the official number of images.
        split_source: ``"json"``, ``"authors"`` or ``"held out"``.
    """

    def __init__(
        self,
        dataset: str,
        root: str | Path | None = None,
        train: str = "train",
        val: str = "val",
        test: str = "test",
        preset: str = "fgvc",
        image_size: int = 224,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        augment: str = "none",
        allow_partial: bool = False,
        **options: Any,
    ) -> None:
        """Reads the lists and class names; no image yet.

        VPT chooses hyperparameters and reports with ``train="train"``; Adapter+ trains on ``"trainval"``, with which
        numbers of the former do not compare.

        Args:
            dataset: ``"cub_200_2011"``, ``"nabirds"``, ``"oxford_flowers"``, ``"stanford_dogs"`` or
                ``"stanford_cars"``.
            root: Folder of all datasets; None for :func:`vpt.data.default_root`.
            train: List to train on: ``"train"`` or ``"trainval"``.
            val: List to validate on.
            test: List to test on.
            preset: Name of the preprocessing (:data:`vpt.data.transforms.PRESETS`).
            image_size: Side of the square images in pixels.
            batch_size: Images in a batch.
            num_workers: Loader processes; 0 loads in the main process.
            seed: Seed of order and augmentation of the training images; the splits do not depend on it.
            augment: Name of the training augmentation (:data:`vpt.data.transforms.AUGMENTATIONS`).
            allow_partial: Accept lists of another length than the official one.
            **options: Few-shot subsets, see :class:`ImageDataModule`.

        Raises:
            DataError: A file is missing or malformed, or a list has not its official number of images.
            UnknownNameError: Dataset, list, preset or augmentation is unknown.
            ConfigError: A number is out of range.
        """
        card = load_card(dataset)
        if dataset not in LAYOUTS or card is None:
            raise UnknownNameError("FGVC dataset", dataset, LAYOUTS)
        chosen = get_preset(preset)
        found, self.split_source = _read(card, (Path(root) if root is not None else default_root()).expanduser())
        names = found.class_names
        self.partial = not _check_counts(card, found, allow_partial)
        splits = {}
        for split, stem in (("train", train), ("val", val), ("test", test)):
            if stem not in found.lists:
                raise UnknownNameError(f"list of {dataset}", stem, found.lists)
            images = found.lists[stem]
            pixels = partial(decoded, images, chosen, image_size)
            splits[split] = Split(f"{dataset}/{stem}", images.paths, images.labels, images.fingerprint, pixels)
        super().__init__(
            dataset, names, splits, preset, image_size, batch_size, num_workers, seed, augment, card, **options
        )

    def describe(self) -> dict[str, Any]:
        """Says which data these are; adds ``partial`` and ``split_source`` to the base's description."""
        return super().describe() | {"partial": self.partial, "split_source": self.split_source}


def _read(card: Card, root: Path) -> tuple[Official, str]:
    """Returns the lists train, val, trainval and test, and where train and val come from."""
    layout = LAYOUTS[card.name]
    folder = find_folder(card, root, layout.folder, layout.needed)
    official = layout.read(folder)
    lists, source = official.lists, "authors"
    if present := [name for name in _JSON if (folder / name).is_file()]:
        if missing := sorted(set(_JSON) - set(present)):
            raise DataError(f"{folder / missing[0]} does not exist beside {present[0]}; give all three or none.")
        lists, source = _json_lists(folder, layout, official), "json"
    elif "val" not in lists:
        train, val = hold_out(lists["train"], _HELD_OUT)
        lists, source = {"train": train, "val": val, "test": lists["test"]}, "held out"
    lists["trainval"] = _joined(lists["train"], lists["val"])
    return Official(official.class_names, lists), source


def _joined(train: ImageList, val: ImageList) -> ImageList:
    labels = np.concatenate([train.labels, val.labels])
    return image_list(train.file, train.folder, [*train.paths, *val.paths], labels, [*train.lines, *val.lines])


def _check_counts(card: Card, found: Official, allow_partial: bool) -> bool:
    """Compares classes and images with the card."""
    if len(found.class_names) != card.num_classes and not allow_partial:
        raise DataError(
            f"{card.name}: found {len(found.class_names)} classes, expected {card.num_classes}; "
            "complete the copy, or set allow_partial=true, which the record of every result then states."
        )
    complete = [
        check_count(f"{card.name}/{name}", len(found.lists[name].paths), size, allow_partial)
        for name, size in card.sizes.items()
    ]
    return all(complete) and len(found.class_names) == card.num_classes


def _json_lists(folder: Path, layout: Layout, official: Official) -> dict[str, ImageList]:
    """Takes the membership from the reference's splits, path -> class, and the labels from the authors.

    The reference numbers its classes its own way; they must be the authors' under other numbers.
    """
    truth = {
        (images.folder / path).relative_to(folder).as_posix(): int(label)
        for images in official.lists.values()
        for path, label in zip(images.paths, images.labels, strict=True)
    }
    lists: dict[str, ImageList] = {}
    meaning: dict[int, int] = {}
    for name in _JSON:
        file, labels = folder / name, []
        content = _json(file)
        for path, kind in content.items():
            label = truth.get((Path(layout.images) / path).as_posix())
            if label is None:
                raise DataError(f"{file}: the authors' files do not list {path}; get the splits of this dataset.")
            if meaning.setdefault(kind, label) != label:
                one, other = official.class_names[label], official.class_names[meaning[kind]]
                raise DataError(f"{file}: {path} ({one}) has class {kind}, as has {other}; get the splits again.")
            labels.append(label)
        lists[file.stem] = image_list(file, folder / layout.images, list(content), labels)
    return lists


def _json(file: Path) -> Mapping[str, int]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is not JSON ({error}).") from error
    if not isinstance(content, dict) or not all(type(kind) is int for kind in content.values()):
        raise DataError(f"{file} is not a map from image paths to whole numbers.")
    return content
