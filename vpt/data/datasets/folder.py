"""Your own images: folders of classes, a table, or a torchvision dataset by name."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vpt.argument_types import checked
from vpt.data.content_hashes import home_path
from vpt.data.datamodule import ImageDataModule
from vpt.data.datasets.torchvision_datasets import TorchvisionList, torchvision_lists
from vpt.data.images import ImageList, LeftOut, find_images, first_repeated, is_image_name, list_folder, shown
from vpt.data.list_files import SEPARATORS, check_class_names, class_name, read_table, whole_number
from vpt.data.splits import hold_out, listed_split
from vpt.data.transforms import get_preset
from vpt.errors import ConfigError, DataError, VPTWarning

_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_NAMES = {name: split for split, names in _NAMES.items() for name in names}
"""How folders and tables may name their splits, in any case: as Hugging Face's datasets do; ``shift_<name>`` is a
further test set."""
TEST_FRACTION = 0.2
"""Share of each class that is held out for testing where folders of classes name no split."""

_SHIFT = "shift_"
_UNDERSTOOD = f"{', '.join(SPLIT_NAMES)} or {_SHIFT}<name>"
_LAYOUT = (
    "lay the images out as train/<class>/, and if you have them val/<class>/, test/<class>/ and shift_<name>/<class>/, "
    "or as <class>/ alone, or name a table (.csv, .tsv or .parquet) with the columns path, label and optionally split"
)


Lists = tuple[list[str], dict[str, ImageList | TorchvisionList]]


@dataclass(frozen=True)
class _Columns:
    """How a table is read; the defaults are those of `FolderDataModule`."""

    path_column: str = "path"
    label_column: str = "label"
    split_column: str | None = None
    columns: list[str] | None = None
    images_root: str | Path | None = None


class FolderDataModule(ImageDataModule):
    """Images of your own, in three lines of YAML.

    A folder holds ``train/<class>/``, and optionally ``val/``, ``test/`` and ``shift_<name>/`` with the same classes;
    or ``<class>/`` alone, of which test and validation images are held out. A table (CSV, TSV or Parquet) has the
    columns ``path`` (relative to the table's folder), ``label`` (a name or a whole number) and optionally ``split``.
    Classes are matched by name, so that label indices stay fixed where a class is missing from the test images. Their
    order: by number if all names are whole numbers (2 before 10), else by name. A torchvision dataset keeps its own
    order.
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
        test_fraction: float | None = None,
        path_column: str = "path",
        label_column: str = "label",
        split_column: str | None = None,
        columns: list[str] | None = None,
        images_root: str | Path | None = None,
        train_on_val: bool = False,
        **options: Any,
    ) -> None:
        """Lists the images; decodes none.

        Args:
            root: The folder of folders, or the table; for a torchvision dataset its ``root``.
            torchvision: Class in ``torchvision.datasets``, e.g. ``"CIFAR10"``; it is read and never downloaded.
            val_fraction: Share of each training class that is held out for validation where no validation images exist,
                in (0, 1).
            split_seed: Chooses which are held out, with the names of the images and nothing else; not the seed of the
                run.
            preset: Name of the preprocessing.
            image_size: Side of the square images in pixels.
            torchvision_args: Further arguments of the torchvision class, e.g. ``{"split": "letters"}`` of ``"EMNIST"``.
            test_fraction: Share of each class that is held out for testing, in (0, 1), before any for validation; 0 for
                none; None for 0.2 where folders of classes name no split, else 0. Two images of each class stay.
            path_column: Name of a table's column of paths. A path may have backslashes between folders, and no
                suffix where one image has its name.
            label_column: Name of its column of classes.
            split_column: Name of its column of splits; None for ``"split"`` where there is one.
            columns: The names of all columns of a text file without a header.
            images_root: Folder that its paths are relative to; None for that of the table.
            train_on_val: Train on the validation images as well.
            **options: See :class:`ImageDataModule`.
        """
        if torchvision_args and torchvision is None:
            raise ConfigError("torchvision_args are arguments of a torchvision dataset: name it by torchvision.")
        root = home_path(root)
        chosen = get_preset(preset)
        table = _Columns(path_column, label_column, split_column, columns, images_root)
        is_table = torchvision is None and root.suffix.lower() in {*SEPARATORS, ".parquet"} and not root.is_dir()
        if not is_table and table != _Columns():
            raise ConfigError("path_column, label_column, split_column, columns and images_root are of tables only.")
        lists: dict[str, ImageList | TorchvisionList]
        share = 0.0
        if torchvision is not None:
            name = torchvision.lower()
            class_names, lists = torchvision_lists(torchvision, root, torchvision_args or {})
        elif is_table:
            name, (class_names, lists) = root.stem, _read_table(root, table)
        elif root.is_file():
            raise DataError(f"{root} is no folder, and no table that is read: these are .csv, .tsv and .parquet.")
        else:
            found, left = _find_splits(root)
            share = 0.0 if found else TEST_FRACTION
            name = Path(os.path.realpath(root)).name
            class_names, lists = _read_folders(root, found or {"train": root}, left)
        if test_fraction and "test" in lists:
            raise ConfigError(f"test_fraction has no effect: {name} has test images; leave it out.")
        shares = {"test": share if test_fraction is None else test_fraction, "val": val_fraction}
        held = {split: each for split, each in shares.items() if split not in lists and (each or split == "val")}
        sources = {split: f"{name}/{split}" for split in ("train", "val", *lists)}
        lists = _hold_out(name, class_names, lists, held, split_seed)
        sources |= {split: f"{name}/{'test' if split == 'test' else 'train'} (held out)" for split in held}
        if train_on_val:
            lists, sources["train"] = {**lists, "train": _joined(lists["train"], lists["val"])}, f"{name}/train+val"
        splits = {split: listed_split(sources[split], lists[split], chosen, image_size) for split in sources}
        self._held_out = {**held, "split_seed": split_seed} if "test" in held else None
        super().__init__(name, class_names, splits, preset, image_size, card=None, **options)

    def describe(self) -> dict[str, Any]:
        """Says which data these are, as the base class does; ``held_out`` has the shares where one is for testing."""
        return super().describe() | ({"held_out": self._held_out} if self._held_out else {})


def _hold_out(
    name: str,
    class_names: list[str],
    lists: dict[str, ImageList | TorchvisionList],
    shares: Mapping[str, float],
    seed: int,
) -> dict[str, ImageList | TorchvisionList]:
    """Holds shares of the training images out, in order; warns of classes of which none are."""
    whole = lists["train"]
    for split, share in shares.items():
        train = lists["train"]
        rest, held = hold_out(train.paths, train.labels, share, seed, split)
        lists = {**lists, "train": train.take(rest), split: train.take(held)}
        lacking = [class_names[label] for label in sorted({*whole.labels.tolist()} - {*lists[split].labels.tolist()})]
        if lacking:
            few = ", ".join(map(repr, lacking[:3])) + (f" and {len(lacking) - 3:,} more" if lacking[3:] else "")
            text = f"{name} has too few images of {few} to hold one out for {split}: add some."
            warnings.warn(text, VPTWarning, stacklevel=3)
    return lists


def _joined(train: ImageList | TorchvisionList, val: ImageList | TorchvisionList) -> ImageList | TorchvisionList:
    labels = np.concatenate([train.labels, val.labels])
    if isinstance(train, ImageList) and isinstance(val, ImageList):
        return replace(train, paths=[*train.paths, *val.paths], labels=labels, lines=[*train.lines, *val.lines])
    if isinstance(train, TorchvisionList) and isinstance(val, TorchvisionList) and train.dataset is val.dataset:
        return replace(train, positions=np.concatenate([train.positions, val.positions]), labels=labels)
    raise ConfigError("train_on_val is not known of a torchvision dataset that has validation images: leave it out.")


@dataclass
class _Rows:
    """The images of one split before their classes have numbers."""

    file: Path
    paths: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)


def _find_splits(root: Path) -> tuple[dict[str, Path], LeftOut]:
    """Finds the folders of splits; none where no folder has the name of one, which are then classes."""
    found: dict[str, Path] = {}
    left = LeftOut()
    folders, stray = list_folder(root, LeftOut()) if root.is_dir() else ([], [])
    others = []
    for folder in folders:
        split = _split_name(folder.name, str(folder))
        if split is None:
            others.append(folder)
        elif split in found:
            raise DataError(f"{found[split]} and {folder} are the same split: keep one of them.")
        else:
            found[split] = folder
    for entry in root.iterdir() if folders else ():
        if entry.name.casefold() in SPLIT_NAMES and entry.is_symlink() and not entry.exists():
            raise DataError(f"{entry} is a link that leads nowhere: mend it, or remove it.")
    named = f"; {', '.join(path.name for path in found.values())} named as a split" if found else ""
    has = f" (it has {', '.join(shown(path.name) for path in folders[:5])}{named})" if folders else ""
    if not folders or (found and "train" not in found):
        missing = f"{root / 'train'} does not exist{has}" if root.is_dir() else f"{root} does not exist"
        missing = f"{shown(stray[0])} lies in no class folder" if stray and not folders else missing
        raise DataError(f"{missing}: {_LAYOUT}.")
    for folder in others if found else ():
        if images := find_images(folder, LeftOut()):
            raise DataError(
                f"{shown(folder)} lies beside splits, holds images ({len(images):,}) and is none: rename it to "
                f"{_UNDERSTOOD}, or move it away."
            )
        left.folders.append((folder, "no split"))
    if found and stray:
        left.files["beside the splits"] += len(stray)
    return found, left


def _read_folders(root: Path, found: Mapping[str, Path], left: LeftOut) -> Lists:
    """Lists the images of every split folder; the root itself is one where it holds the classes."""
    rows = {split: _Rows(folder) for split, folder in found.items()}
    for split, folder in found.items():
        for name, path in _class_files(folder, left):
            parts = path.relative_to(root).parts
            if folder == root and len(parts) > 2 and SPLIT_NAMES.get(parts[1].casefold()) == "train":
                raise DataError(f"{shown(root / parts[0])} holds splits itself ({parts[1]}): name that folder as root.")
            rows[split].paths.append("/".join(parts))
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


def _read_table(file: Path, table: _Columns) -> Lists:
    """Lists the images of a table, split by split."""
    path, label, split = table.path_column, table.label_column, table.split_column or "split"
    wanted = [path, label, *([split] if table.split_column else [])]
    remedy = ": give their names by path_column, label_column and split_column"
    if table.columns is not None and (absent := [name for name in wanted if name not in table.columns]):
        raise ConfigError(f"columns has no {absent[0]!r}: name all columns of {file}, in order, and which is which.")
    rows, lines = read_table(file, wanted, (), table.columns, remedy)
    folder = file.parent if table.images_root is None else home_path(table.images_root)
    if not folder.is_dir():
        raise DataError(f"images_root is {folder}, which is no folder: name the one that the paths are relative to.")
    for column in (path, label):
        if (odd := next((position for position, text in enumerate(rows[column]) if "\0" in text), None)) is not None:
            raise DataError(f"{file}, line {lines[odd]}: the {column} has a NUL; correct it.")
    paths, names = _find_files(file, folder, rows[path], lines), [class_name(name) for name in rows[label]]
    if (twice := first_repeated(paths, folder)) is not None:
        first, again = twice
        other = "" if names[first] == names[again] else f", as {names[first]!r} and here as {names[again]!r}"
        raise DataError(
            f"{file}, line {lines[again]}: {rows[path][again]} is listed on line {lines[first]} already{other}; remove "
            "one line."
        )
    written = rows.get(split, ["train"] * len(lines))
    found: dict[str, _Rows] = {}
    for each, name, word, line in zip(paths, names, written, lines, strict=True):
        where = f"{file}, line {line}"
        if (named := _split_name(word, where)) is None:
            raise DataError(f"{where}: unknown split {word!r}; use {_UNDERSTOOD}.")
        part = found.setdefault(named, _Rows(file))
        part.paths.append(each)
        part.names.append(name)
        part.lines.append(line)
    if "train" not in found:
        raise DataError(f"{file} lists no training images: give some rows the split 'train'.")
    _refuse_measurements(found["train"])
    return _label(folder, found)


def _find_files(file: Path, folder: Path, paths: Iterable[str], lines: Iterable[int]) -> list[str]:
    """Paths as they are here: with slashes, and of a name without a suffix the one image that has it."""
    found, stems = [], dict[str, dict[str, list[str]]]()
    for path, line in zip(paths, lines, strict=True):
        here = path if "\\" not in path or os.path.lexists(folder / path) else path.replace("\\", "/")
        if not is_image_name(here):
            home, _, stem = here.rpartition("/")
            if home not in stems:
                stems[home] = {}
                for image in list_folder(folder / home, LeftOut())[1]:
                    stems[home].setdefault(image.stem, []).append(image.name)
            names = stems[home].get(stem, [])
            if names and not os.path.lexists(folder / here):
                if len(names) > 1:
                    raise DataError(f"{file}, line {line}: {path} may be {' or '.join(names)}; write the one meant.")
                here = f"{home}/{names[0]}" if home else names[0]
        found.append(here)
    return found


def _refuse_measurements(train: _Rows) -> None:
    """Refuses what stands for no class, NaN and -1, and a column of decimal numbers."""
    try:
        values = [float(name) for name in train.names]
    except ValueError:
        for name, line in zip(train.names, train.lines, strict=True):
            if name.lower() == "nan":
                raise DataError(f"{train.file}, line {line}: the label is NaN: give one, or remove the line.") from None
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


def _split_name(written: str, where: str) -> str | None:
    """Returns the split that a folder or a row names, None where it names none; a DataError where a shift has none."""
    plain = written.casefold()
    if not plain.startswith(_SHIFT):
        return SPLIT_NAMES.get(plain)
    shift = written[len(_SHIFT) :]
    if not shift or shift.casefold() in SPLIT_NAMES:
        raise DataError(f"{where}: unknown split {written!r}; use {_UNDERSTOOD}.")
    return shift
