"""A table of images: which file, which targets, which split; and the rows of folders of classes, read likewise."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpt.data.cache.content_hashes import home_path
from vpt.data.datasets.torchvision_datasets import TorchvisionList
from vpt.data.images import ImageList, LeftOut, first_repeated, is_image_name, list_folder, shown
from vpt.data.list_files import check_class_names, class_name, read_table, whole_number
from vpt.data.targets import Targets, number, positives, several, truth
from vpt.errors import ConfigError, DataError

_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_NAMES = {name: split for split, names in _NAMES.items() for name in names}
"""How folders and tables may name their splits, in any case: as Hugging Face's datasets do; ``shift_<name>`` is a
further test set."""
_SHIFT = "shift_"
UNDERSTOOD = f"{', '.join(SPLIT_NAMES)} or {_SHIFT}<name>"
"""How splits may be named, for messages."""

Lists = tuple[list[str], dict[str, ImageList | TorchvisionList]]
"""Class names, and the list of each split."""


@dataclass(frozen=True)
class Columns:
    """How a table is read; the defaults are those of `FolderDataModule`."""

    path_column: str = "path"
    label_column: str | list[str] = "label"
    label_separator: str | None = None
    targets: Targets = "multiclass"
    split_column: str | None = None
    columns: list[str] | None = None
    images_root: str | Path | None = None


@dataclass
class Rows:
    """The images of one split, each with the name of its class, the names of several, or its numbers."""

    file: Path
    paths: list[str] = field(default_factory=list)
    names: list[Any] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)


def read_rows(file: Path, table: Columns) -> Lists:
    """Lists the images of a table, split by split; a DataError names the line of what is wrong with it.

    A ConfigError where columns are named that contradict each other.
    """
    path, split = table.path_column, table.split_column or "split"
    labels = _label_columns(table)
    texts = [path, *(labels if table.targets == "multiclass" else ())]  # which may not be empty, nor decimal numbers
    others = [*(labels if table.targets != "multiclass" else ()), *([split] if table.split_column else [])]
    remedy = ": give their names by path_column, label_column and split_column"
    if table.columns is not None and (absent := [name for name in (*texts, *others) if name not in table.columns]):
        raise ConfigError(f"columns has no {absent[0]!r}: name all columns of {file}, in order, and which is which.")
    rows, lines = read_table(file, texts, others, table.columns, remedy)
    folder = file.parent if table.images_root is None else home_path(table.images_root)
    if not folder.is_dir():
        raise DataError(f"images_root is {folder}, which is no folder: name the one that the paths are relative to.")
    for column in (path, *labels):
        if (odd := next((position for position, text in enumerate(rows[column]) if "\0" in text), None)) is not None:
            raise DataError(f"{file}, line {lines[odd]}: the {column} has a NUL; correct it.")
    paths = _find_files(file, folder, rows[path], lines)
    targets = _targets(file, table, labels, rows, lines)
    if (twice := first_repeated(paths, folder)) is not None:
        first, again = twice
        other = "" if targets[first] == targets[again] else f", as {targets[first]!r} and here as {targets[again]!r}"
        raise DataError(
            f"{file}, line {lines[again]}: {rows[path][again]} is listed on line {lines[first]} already{other}; remove "
            "one line."
        )
    written = rows.get(split, ["train"] * len(lines))
    found: dict[str, Rows] = {}
    for each, target, word, line in zip(paths, targets, written, lines, strict=True):
        where = f"{file}, line {line}"
        if (named := split_name(word, where)) is None:
            raise DataError(f"{where}: unknown split {word!r}; use {UNDERSTOOD}.")
        part = found.setdefault(named, Rows(file))
        part.paths.append(each)
        part.names.append(target)
        part.lines.append(line)
    if "train" not in found:
        raise DataError(f"{file} lists no training images: give some rows the split 'train'.")
    if table.targets == "multiclass":
        _refuse_measurements(found["train"])
    columns = table.targets == "regression" or (table.targets == "multilabel" and table.label_separator is None)
    return label_rows(folder, found, table.targets, labels if columns else None)


def _label_columns(table: Columns) -> list[str]:
    """The columns that hold the targets; a ConfigError where these contradict the targets."""
    given = [table.label_column] if isinstance(table.label_column, str) else table.label_column
    if not given or len(set(given)) < len(given):
        raise ConfigError("label_column names no column, or one twice: name each column of labels once.")
    if table.targets == "multiclass" and len(given) > 1:
        raise ConfigError(
            "label_column names several columns: set targets to multilabel, for columns of 0 and 1, or to regression, "
            "for columns of numbers."
        )
    if (separator := table.label_separator) is not None:
        if table.targets != "multilabel" or len(given) > 1:
            raise ConfigError("label_separator is of one column that names several classes: set targets to multilabel.")
        if not separator:
            raise ConfigError("label_separator is empty: give the sign between the classes of an image, such as '|'.")
    elif table.targets == "multilabel" and isinstance(table.label_column, str):
        raise ConfigError(
            f"targets are multilabel: give label_separator, the sign between the classes in the column {given[0]!r} "
            "(twice in quotes where YAML reads it otherwise, as '#' and '~'), or name a column of 0 and 1 for each "
            "class by label_column."
        )
    return given


def _targets(
    file: Path, table: Columns, labels: Sequence[str], rows: Mapping[str, Sequence[str]], lines: Sequence[int]
) -> list[Any]:
    """Of each row the name of its class, the names of several in alphabetical order, or its numbers."""
    if table.targets == "multiclass":
        return [class_name(name) for name in rows[labels[0]]]
    if table.label_separator is not None:
        found = several(rows[labels[0]], table.label_separator)
        return [tuple(sorted({class_name(name) for name in names})) for names in found]
    read = number if table.targets == "regression" else truth
    columns = [
        [read(text, f"{file}, line {line}: the {name}") for text, line in zip(rows[name], lines, strict=True)]
        for name in labels
    ]
    if table.targets == "regression":
        return list(zip(*columns, strict=True))
    return [tuple(name for name, is_of in zip(labels, row, strict=True) if is_of) for row in zip(*columns, strict=True)]


def _find_files(file: Path, folder: Path, paths: Iterable[str], lines: Iterable[int]) -> list[str]:
    """Paths as they are here: with slashes, and of a name without a suffix the one image that has it."""
    found, stems = [], dict[str, dict[str, list[str]]]()
    for path, line in zip(paths, lines, strict=True):
        here = path if "\\" not in path or os.path.lexists(folder / path) else path.replace("\\", "/")
        if not is_image_name(here, arrays=True):
            home, _, stem = here.rpartition("/")
            if home not in stems:
                stems[home] = {}
                for image in map(Path, list_folder(folder / home, LeftOut())[1]):
                    stems[home].setdefault(image.stem, []).append(image.name)
            names = stems[home].get(stem, [])
            if names and not os.path.lexists(folder / here):
                if len(names) > 1:
                    raise DataError(f"{file}, line {line}: {path} may be {' or '.join(names)}; write the one meant.")
                here = f"{home}/{names[0]}" if home else names[0]
        found.append(here)
    return found


def _refuse_measurements(train: Rows) -> None:
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


def label_rows(
    folder: Path, rows: Mapping[str, Rows], targets: Targets = "multiclass", names: Sequence[str] | None = None
) -> Lists:
    """Gives the targets numbers: those of classes by name; those of the training images are all there are.

    `names` are those of the classes, in order, where columns say so.
    """
    file = rows["train"].file
    if targets == "regression":
        class_names = list(names or ())
    elif targets == "multilabel":
        class_names = list(names or class_order({name for each in rows["train"].names for name in each}))
    else:
        class_names = class_order(set(rows["train"].names))
    lists: dict[str, ImageList | TorchvisionList] = {}
    for split in sorted(rows, key=["train", "val", "test", *rows].index):
        part = rows[split]
        lists[split] = ImageList(part.file, folder, part.paths, _numbered(part, class_names, targets), part.lines)
    if targets == "regression":
        _check_numbers(np.array(rows["train"].names, dtype=np.float64), class_names, file)
    else:
        _check_classes(lists["train"].labels, class_names, targets, file)
    return class_names, lists


def _numbered(part: Rows, class_names: Sequence[str], targets: Targets) -> NDArray[Any]:
    """The targets of the images of a split as numbers; a DataError where one is of an unknown class."""
    if targets == "regression":
        return np.array(part.names, dtype=np.float32).reshape(len(part.names), len(class_names))
    numbers = {name: position for position, name in enumerate(class_names)}
    of = [[each] for each in part.names] if targets == "multiclass" else part.names
    for position, names in enumerate(of):
        if unknown := [name for name in names if name not in numbers]:
            where = f"{part.file}, line {part.lines[position]}: " if part.lines else ""
            raise DataError(
                f"{where}{shown(part.paths[position])} is of class {unknown[0]!r}, of which there is no training image."
            )
    if targets == "multiclass":
        return np.array([numbers[name] for name in part.names], dtype=np.int64)
    labels = np.zeros((len(of), len(class_names)), dtype=np.uint8)
    for row, names in enumerate(of):
        labels[row, [numbers[name] for name in names]] = 1
    return labels


def _check_numbers(values: NDArray[np.float64], names: list[str], file: Path) -> None:
    """Refuses, by a DataError, training numbers (N, K) that do not vary, or by too little for single precision."""
    for name, column in zip(names, values.T, strict=True):
        if column.min() == column.max():
            raise DataError(f"{file}: the {name} of all training images is {column[0]:g}: there is none to learn.")
        if np.abs(column.astype(np.float32) - column).max() > 1e-3 * column.std():
            raise DataError(
                f"{file}: the {name} varies by {column.std():.3g} around {column.mean():.9g}, which single precision "
                "rounds: subtract a constant."
            )


def _check_classes(labels: NDArray[Any], class_names: list[str], targets: Targets, file: Path) -> None:
    """Refuses, by a DataError, training labels that nothing can be learned from."""
    if not class_names:
        raise DataError(f"{file} has no training image of any class: name some in its labels.")
    check_class_names(class_names, file, least=1 if targets == "multilabel" else 2)
    for name, count in zip(class_names, positives(labels, len(class_names)), strict=True):
        if not count or (targets == "multilabel" and count == len(labels)):
            raise DataError(
                f"{file} has {'no' if not count else 'nothing but'} training images of class {name!r}: it cannot be "
                "learned; add others, or leave the class out."
            )


def class_order(names: Iterable[str]) -> list[str]:
    """Orders class names, all different: by number if all are whole numbers (2 before 10), else by name."""
    listed = sorted(names)
    numbers = {name: whole_number(name) for name in listed}
    return listed if None in numbers.values() else sorted(listed, key=lambda name: numbers[name] or 0)


def split_name(written: str, where: str) -> str | None:
    """Returns the split that a folder or a row names, None where it names none; a DataError where a shift has none."""
    plain = written.casefold()
    if not plain.startswith(_SHIFT):
        return SPLIT_NAMES.get(plain)
    shift = written[len(_SHIFT) :]
    if not shift or shift.casefold() in SPLIT_NAMES:
        raise DataError(f"{where}: unknown split {written!r}; use {UNDERSTOOD}.")
    return shift
