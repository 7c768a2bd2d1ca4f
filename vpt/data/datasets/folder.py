"""Your own images: folders of classes, a table, or a torchvision dataset by name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vpt.argument_types import checked
from vpt.data.content_hashes import home_path
from vpt.data.datamodule import ImageDataModule
from vpt.data.datasets.torchvision_datasets import TorchvisionList, torchvision_lists
from vpt.data.images import ImageList, LeftOut, find_images, first_repeated, list_folder, shown
from vpt.data.list_files import SEPARATORS, check_class_names, class_name, read_table, whole_number
from vpt.data.splits import hold_out, listed_split
from vpt.data.transforms import get_preset
from vpt.errors import ConfigError, DataError

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""How folders and tables may name their splits; ``shift_<name>`` is a further test set."""

_SHIFT = "shift_"
_LAYOUT = (
    "lay the images out as train/<class>/, and if you have them val/<class>/, test/<class>/ and shift_<name>/<class>/, "
    "or name a table (.csv, .tsv or .parquet) with the columns path, label and optionally split"
)


Lists = tuple[list[str], dict[str, ImageList | TorchvisionList]]


class FolderDataModule(ImageDataModule):
    """Images of your own, in three lines of YAML.

    A folder holds ``train/<class>/``, and optionally ``val/``, ``test/`` and ``shift_<name>/`` with the same classes.
    A table (CSV, TSV or Parquet) has the columns ``path`` (relative to the table's folder), ``label`` (a name or a
    whole number) and optionally ``split``. Classes are matched by name, so that label indices stay fixed where a class
    is missing from the test images. Their order: by number if all names are whole numbers (2 before 10), else by name.
    A torchvision dataset keeps its own order.
    """

    @checked
    def __init__(
        self,
        root: str | Path,
        torchvision: str | None = None,
        val_fraction: float = 0.2,
        split_seed: int = 0,
        preset: str = "square",
        image_size: int = 224,
        torchvision_args: dict[str, Any] | None = None,
        train: Literal["train", "train+val"] = "train",
        **options: Any,
    ) -> None:
        """Lists the images; decodes none.

        Args:
            root: The folder of folders, or the table; for a torchvision dataset its ``root``.
            torchvision: Class in ``torchvision.datasets``, e.g. ``"CIFAR10"``; it is read and never downloaded.
            val_fraction: Share of each training class that is held out for validation where no validation images exist,
                in (0, 1).
            split_seed: Chooses which; not the seed of the run.
            preset: Name of the preprocessing.
            image_size: Side of the square images in pixels.
            torchvision_args: Further arguments of the torchvision class, e.g. ``{"split": "letters"}`` of ``"EMNIST"``.
            train: What is trained on: ``"train+val"`` for the validation images as well.
            **options: See :class:`ImageDataModule`.
        """
        if torchvision_args and torchvision is None:
            raise ConfigError("torchvision_args are arguments of a torchvision dataset: name it by torchvision.")
        root = home_path(root)
        chosen = get_preset(preset)
        lists: dict[str, ImageList | TorchvisionList]
        if torchvision is not None:
            name = torchvision.lower()
            class_names, lists = torchvision_lists(torchvision, root, torchvision_args or {})
        elif root.suffix.lower() in {*SEPARATORS, ".parquet"} and not root.is_dir():
            name, (class_names, lists) = root.stem, _read_table(root)
        elif root.is_file():
            raise DataError(f"{root} is no folder, and no table that is read: these are .csv, .tsv and .parquet.")
        else:
            name, (class_names, lists) = Path(os.path.realpath(root)).name, _read_folders(root)
        sources = {split: f"{name}/{split}" for split in ("train", "val", *lists)}
        if "val" not in lists:
            every = lists["train"]
            rest, held = hold_out(every.paths, every.labels, val_fraction, split_seed)
            lists = {**lists, "train": every.take(rest), "val": every.take(held)}
            sources["val"] = f"{name}/train (held out)"
            if train == "train+val":
                lists["train"] = every
        elif train == "train+val":
            lists = {**lists, "train": _joined(lists["train"], lists["val"])}
        sources["train"] = f"{name}/{train}"
        splits = {split: listed_split(sources[split], lists[split], chosen, image_size) for split in sources}
        super().__init__(name, class_names, splits, preset, image_size, card=None, **options)


def _joined(train: ImageList | TorchvisionList, val: ImageList | TorchvisionList) -> ImageList:
    if not isinstance(train, ImageList) or not isinstance(val, ImageList):
        raise ConfigError("train+val is not known of a torchvision dataset with validation images: leave train out.")
    labels = np.concatenate([train.labels, val.labels])
    return replace(train, paths=[*train.paths, *val.paths], labels=labels, lines=[*train.lines, *val.lines])


@dataclass
class _Rows:
    """The images of one split before their classes have numbers."""

    file: Path
    paths: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)


def _read_folders(root: Path) -> Lists:
    """Lists the images of every split folder."""
    found: dict[str, Path] = {}
    left = LeftOut()
    for folder in list_folder(root, LeftOut())[0] if root.is_dir() else ():
        if folder.name in SPLIT_NAMES or folder.name.startswith(_SHIFT):
            split = _split_name(folder.name, str(folder))
            if split in found:
                raise DataError(f"{found[split]} and {folder} are the same split: keep one of them.")
            found[split] = folder
        else:
            left.folders.append((folder, "no split"))
    if "train" not in found:
        missing = root / "train" if root.is_dir() else root
        others = f" (it has {', '.join(shown(path.name) for path, _ in left.folders[:5])})" if left.folders else ""
        raise DataError(f"{missing} does not exist{others}: {_LAYOUT}.")
    rows = {split: _Rows(folder) for split, folder in found.items()}
    for split, folder in found.items():
        for name, path in _class_files(folder, left):
            rows[split].paths.append(path.relative_to(root).as_posix())
            rows[split].names.append(name)
    left.warn(root)
    return _label(root, rows)


def _class_files(folder: Path, left: LeftOut) -> Iterator[tuple[str, Path]]:
    """Yields (class name, image) of one split folder, sorted."""
    homes, stray = list_folder(folder, left)
    if stray:
        raise DataError(f"{shown(stray[0])} lies in no class folder: move it into {folder}/<class>/.")
    for home in sorted(homes):
        inside = LeftOut()
        files = find_images(home, inside)
        left.add(inside)
        if not files:
            instead = f" (not read: {text})" if (text := inside.text(home)) else ""
            raise DataError(f"{shown(home)} holds no image{instead}: add some, or remove the folder.")
        yield from ((class_name(home.name), path) for path in files)


def _read_table(file: Path) -> Lists:
    """Lists the images of a table, split by split."""
    table, lines = read_table(file, ["path", "label"])
    for column in ("path", "label"):
        if (odd := next((position for position, text in enumerate(table[column]) if "\0" in text), None)) is not None:
            raise DataError(f"{file}, line {lines[odd]}: the {column} has a NUL; correct it.")
    if (twice := first_repeated(table["path"], file.parent)) is not None:
        first, again = (lines[position] for position in twice)
        raise DataError(
            f"{file}, line {again}: {table['path'][twice[1]]} is listed on line {first} already; remove one line."
        )
    written = table.get("split", ["train"] * len(lines))
    rows: dict[str, _Rows] = {}
    for path, name, split, line in zip(table["path"], table["label"], written, lines, strict=True):
        part = rows.setdefault(_split_name(split, f"{file}, line {line}"), _Rows(file))
        part.paths.append(path)
        part.names.append(class_name(name))
        part.lines.append(line)
    if "train" not in rows:
        raise DataError(f"{file} lists no training images: give some rows the split 'train'.")
    _refuse_measurements(rows["train"])
    return _label(file.parent, rows)


def _refuse_measurements(train: _Rows) -> None:
    """Refuses a column of numbers that are no classes: decimal ones, and -1, which stands for none."""
    try:
        values = [float(name) for name in train.names]
    except ValueError:
        return
    for name, value, line in zip(train.names, values, train.lines, strict=True):
        if value < 0 or "." in name or not value.is_integer():
            raise DataError(
                f"{train.file}, line {line}: the label {name} is no whole number from 0 on; where labels are numbers, "
                "all must be such."
            )


def _label(folder: Path, rows: Mapping[str, _Rows]) -> Lists:
    """Numbers the classes by name; those of the training images are all there are."""
    class_names = class_order(set(rows["train"].names))
    numbers = {name: number for number, name in enumerate(class_names)}
    lists: dict[str, ImageList | TorchvisionList] = {}
    for split in sorted(rows, key=["train", "val", "test", *rows].index):
        part = rows[split]
        unknown = next((position for position, name in enumerate(part.names) if name not in numbers), None)
        if unknown is not None:
            where = f"{part.file}, line {part.lines[unknown]}: " if part.lines else ""
            name = part.names[unknown]
            raise DataError(
                f"{where}{shown(part.paths[unknown])} is of class {name!r}, of which there is no training image."
            )
        labels = np.array([numbers[name] for name in part.names], dtype=np.int64)
        lists[split] = ImageList(part.file, folder, part.paths, labels, part.lines)
    check_class_names(class_names, rows["train"].file)
    return class_names, lists


def class_order(names: Iterable[str]) -> list[str]:
    """Orders class names, all different: by number if all are whole numbers (2 before 10), else by name."""
    listed = sorted(names)
    numbers = {name: whole_number(name) for name in listed}
    return listed if None in numbers.values() else sorted(listed, key=lambda name: numbers[name] or 0)


def _split_name(written: str, where: str) -> str:
    """Returns the split that a folder or a row names."""
    shift = written.removeprefix(_SHIFT)
    if written in SPLIT_NAMES:
        return SPLIT_NAMES[written]
    if shift in ("", written) or shift in SPLIT_NAMES:
        raise DataError(f"{where}: unknown split {written!r}; use {', '.join(SPLIT_NAMES)} or {_SHIFT}<name>.")
    return shift
