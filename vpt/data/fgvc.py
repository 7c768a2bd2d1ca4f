"""The five fine-grained tasks of the VPT paper (Jia et al. 2022, section 4.1), from their authors' own files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vpt.data.cache import decoded
from vpt.data.cards import Card, load_card
from vpt.data.fgvc_layouts import LAYOUTS, Layout, Official
from vpt.data.holdout import hold_out
from vpt.data.images import ImageList
from vpt.data.layout import check_count, find_folder, image_list
from vpt.data.module import ImageDataModule, Split
from vpt.data.presets import get_preset
from vpt.data.vtab import default_root
from vpt.errors import DataError, UnknownNameError

_HELD_OUT = 10  # one in ten, as the sizes of the published splits say
_JSON = ("train.json", "val.json", "test.json")


class FGVCDataModule(ImageDataModule):
    """CUB-200-2011, NABirds, Oxford Flowers-102, Stanford Dogs or Stanford Cars.

    The test images are the authors'. Training and validation images come, in this order, from the reference's
    train.json, val.json and test.json if they lie in the folder, from the authors' own validation list (Flowers), or
    from :func:`vpt.data.holdout.hold_out`, which keeps one in ten of the official training images.

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
            preset: Name of the preprocessing (:data:`vpt.data.presets.PRESETS`).
            image_size: Side of the square images in pixels.
            batch_size: Images in a batch.
            num_workers: Loader processes; 0 loads in the main process.
            seed: Seed of order and augmentation of the training images; the splits do not depend on it.
            augment: Name of the training augmentation (:data:`vpt.data.presets.AUGMENTATIONS`).
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
