"""The five fine-grained tasks of the VPT paper (Jia et al. 2022, section 4.1), from their authors' own files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vpt.argument_types import checked
from vpt.data.catalog.cards import Card, find_card
from vpt.data.datamodule import ImageDataModule
from vpt.data.datasets.published_files import check_count, find_folder, hold_out, image_list, read_mat
from vpt.data.images import ImageList
from vpt.data.list_files import read_json, read_text
from vpt.data.splits import chosen_splits, listed_split
from vpt.data.transforms import get_preset
from vpt.errors import DataError, UnknownNameError

_FLOWERS = 102  # classes of Oxford Flowers


@dataclass(frozen=True)
class Official:
    """What the authors' files say: names of classes, and the lists train, test and perhaps val; labels from 0."""

    class_names: list[str]
    lists: dict[str, ImageList]


@dataclass(frozen=True)
class Layout:
    """How a dataset is unpacked; paths in the reference's JSON splits are relative to its folder `images`."""

    folder: str
    needed: tuple[str, ...]
    images: str
    read: Callable[[Path], Official]


def read_birds(folder: Path) -> Official:
    """CUB-200-2011 and NABirds: images.txt, image_class_labels.txt, train_test_split.txt, classes.txt and images/.

    NABirds' classes.txt also names inner nodes of its hierarchy: classes are those that label an image, by id.
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
    """Oxford Flowers-102: jpg/, imagelabels.mat and setid.mat (from 1); classes are ``"flower 1"`` and so on."""
    labels = read_mat(folder / "imagelabels.mat", "labels")[0].ravel().astype(np.int64) - 1
    if not labels.size or labels.min() < 0 or labels.max() >= _FLOWERS:
        raise DataError(f"{folder / 'imagelabels.mat'} has labels outside 1..{_FLOWERS}; get the file again.")
    keys = {"train": "trnid", "val": "valid", "test": "tstid"}
    lists = {}
    for (name, key), numbers in zip(keys.items(), read_mat(folder / "setid.mat", *keys.values()), strict=True):
        chosen = numbers.ravel().astype(np.int64)
        if chosen.size and not 1 <= chosen.min() <= chosen.max() <= len(labels):
            raise DataError(f"{folder / 'setid.mat'}: {key} names images outside 1..{len(labels)} of imagelabels.mat.")
        paths = [f"jpg/image_{number:05d}.jpg" for number in chosen]
        lists[name] = image_list(folder / "setid.mat", folder, paths, labels[chosen - 1])
    return Official([f"flower {number}" for number in range(1, int(labels.max()) + 2)], lists)


def read_dogs(folder: Path) -> Official:
    """Stanford Dogs: Images/n02085620-Chihuahua/*.jpg; train_list.mat and test_list.mat in lists/ or beside."""
    lists: dict[str, ImageList] = {}
    names: dict[int, str] = {}
    for name in ("train", "test"):
        file = _first(folder / "lists" / f"{name}_list.mat", folder / f"{name}_list.mat")
        cells, numbers = read_mat(file, "file_list", "labels")
        paths, labels = [str(cell.item()) for cell in cells.ravel()], numbers.ravel().astype(np.int64) - 1
        for path, label in zip(paths, labels, strict=True):
            breed = path.split("/")[0].partition("-")[2]
            if names.setdefault(int(label), breed) != breed:
                raise DataError(f"{file}: label {label + 1} is given to {names[int(label)]} and to {breed}.")
        lists[name] = image_list(file, folder / "Images", paths, labels)
    return Official(_dense(names, folder / "lists"), lists)


def read_cars(folder: Path) -> Official:
    """Stanford Cars: cars_train/, cars_test/, devkit/ with cars_meta.mat and cars_train_annos.mat.

    The devkit lacks the test images' labels: cars_test_annos_withlabels.mat lies beside it or in it.
    """
    names = [str(cell.item()) for cell in read_mat(folder / "devkit" / "cars_meta.mat", "class_names")[0].ravel()]
    lists = {}
    for name, file in (
        ("train", folder / "devkit" / "cars_train_annos.mat"),
        ("test", _first(*(home / "cars_test_annos_withlabels.mat" for home in (folder, folder / "devkit")))),
    ):
        rows = read_mat(file, "annotations")[0].ravel()
        if not {"class", "fname"} <= set(rows.dtype.names or ()):
            raise DataError(f"{file} has no class for each fname; the test labels are cars_test_annos_withlabels.mat.")
        paths = [f"cars_{name}/{row['fname'].item()}" for row in rows]
        labels = [int(row["class"].item()) - 1 for row in rows]
        lists[name] = image_list(file, folder, paths, labels)
        lists[name].check_labels(len(names))
    return Official(names, lists)


_BIRDS = ("images", "images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
LAYOUTS = {
    "cub_200_2011": Layout("CUB_200_2011", _BIRDS, "images", read_birds),
    "nabirds": Layout("nabirds", _BIRDS, "images", read_birds),
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
    values: dict[str, str] = {}
    for number, line in enumerate(read_text(file).splitlines(), start=1):
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


def _dense(names: Mapping[int, str], where: Path) -> list[str]:
    """Turns names by label into a list; every label 0..C-1 must have one."""
    missing = next((label for label in range(len(names)) if label not in names), None)
    if missing is not None:
        raise DataError(f"{where}: no image has label {missing + 1}.")
    return [names[label] for label in range(len(names))]


_HELD_OUT = 10  # one in ten, as the sizes of the published splits say
_JSON = ("train.json", "val.json", "test.json")


class FGVCDataModule(ImageDataModule):
    """CUB-200-2011, NABirds, Oxford Flowers-102, Stanford Dogs or Stanford Cars.

    The test images are the authors'. Training and validation images come, as `split_source` says, from the reference's
    train.json, val.json and test.json if they lie in the folder (``"json"``), from the authors' own validation list
    (Flowers, ``"authors"``), or from :func:`vpt.data.datasets.published_files.hold_out`, which keeps one in ten of the
    official training images (``"held out"``).
    """

    @checked
    def __init__(
        self,
        dataset: str,
        root: str | Path | None = None,
        train: str = "train",
        val: str = "val",
        test: str = "test",
        preset: str = "fgvc",
        image_size: int | list[int] = 224,
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
            image_size: Pixels of the images, or [height, width].
            allow_partial: Accept lists of another length than the official one.
            **options: See :class:`ImageDataModule`. The splits do not depend on its seed.
        """
        if dataset not in LAYOUTS:
            raise UnknownNameError("FGVC dataset", dataset, LAYOUTS)
        card, resize = find_card(dataset), get_preset(preset)
        found, self.split_source = _read(card, root)
        complete = check_count(dataset, len(found.class_names), card.num_classes, allow_partial, "classes")
        for name, size in card.sizes.items():
            complete &= check_count(f"{dataset}/{name}", len(found.lists[name]), size, allow_partial)
        self.partial = not complete
        splits = chosen_splits(
            found.lists,
            {"train": train, "val": val, "test": test},
            lambda stem, images: listed_split(f"{dataset}/{stem}", images, resize, image_size),
            f"list of {dataset}",
        )
        super().__init__(dataset, found.class_names, splits, preset, image_size, card=card, **options)

    def outline(self) -> dict[str, Any]:
        """Adds ``split_source`` to the base's description."""
        return super().outline() | {"split_source": self.split_source}


def _read(card: Card, root: str | Path | None) -> tuple[Official, str]:
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
    train, val = lists["train"], lists["val"]
    labels, lines = np.concatenate([train.labels, val.labels]), [*train.lines, *val.lines]
    lists["trainval"] = image_list(train.file, train.folder, [*train.paths, *val.paths], labels, lines)
    return Official(official.class_names, lists), source


def _json_lists(folder: Path, layout: Layout, official: Official) -> dict[str, ImageList]:
    """Membership from the reference's splits, path -> class; labels from the authors, who number otherwise."""
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
    content = read_json(file, "a map from image paths to whole numbers")
    if not isinstance(content, dict) or not all(type(kind) is int for kind in content.values()):
        raise DataError(f"{file} is not a map from image paths to whole numbers.")
    return content
