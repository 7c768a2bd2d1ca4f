"""Your own images: folders of classes, a table, or a torchvision dataset by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vpt.argument_types import checked
from vpt.data.datamodule import ImageDataModule
from vpt.data.datasets.torchvision_datasets import TorchvisionList, torchvision_lists
from vpt.data.images import ImageList, first_repeated
from vpt.data.splits import hold_out, listed_split
from vpt.data.transforms import get_preset
from vpt.errors import DataError

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""How folders and tables may name their splits; ``shift_<name>`` is a further test set."""

_SHIFT = "shift_"
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_SIGNS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_TREE = """\
{root}/
  train/<class>/...          the pictures of a class, in any folders
  val/<class>/...            optional (also valid or validation): else a part of each class of train is held out
  test/<class>/...           optional
  shift_<name>/<class>/...   optional: test sets under shift
or name a table (.csv, .tsv or .parquet) with the columns path, label and optionally split."""


Lists = tuple[list[str], dict[str, ImageList | TorchvisionList]]


class FolderDataModule(ImageDataModule):
    """Images of your own, in two lines of YAML.

    A folder holds ``train/<class>/``, and optionally ``val/``, ``test/`` and ``shift_<name>/`` with the same classes.
    A table (CSV, TSV or Parquet) has the columns ``path`` (relative to the table's folder), ``label`` (a name or a
    whole number) and optionally ``split``. Classes are told apart by name, so that a class that is missing from the
    test images moves no other. Their order: by number if all names are whole numbers (2 before 10), else by name.
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
            **options: See :class:`ImageDataModule`.
        """
        root = Path(root).expanduser()
        chosen = get_preset(preset)
        lists: dict[str, ImageList | TorchvisionList]
        if torchvision is not None:
            name = torchvision.lower()
            class_names, lists = torchvision_lists(torchvision, root, torchvision_args or {})
        elif root.suffix.lower() in {*_SEPARATORS, ".parquet"} and not root.is_dir():
            name, (class_names, lists) = root.stem, _read_table(root)
        else:
            name, (class_names, lists) = root.resolve().name, _read_folders(root)
        sources = {split: f"{name}/{split}" for split in ("train", "val", *lists)}
        if "val" not in lists:
            train = lists["train"]
            rest, held = hold_out(train.paths, train.labels, val_fraction, split_seed)
            lists = {**lists, "train": train.take(rest), "val": train.take(held)}
            sources["val"] = f"{name}/train (held out)"
        splits = {split: listed_split(sources[split], lists[split], chosen, image_size) for split in sources}
        super().__init__(name, class_names, splits, preset, image_size, card=None, **options)


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
    for folder in _subfolders(root):
        if folder.name in SPLIT_NAMES or folder.name.startswith(_SHIFT):
            split = _split_name(folder.name, str(folder))
            if split in found:
                raise DataError(f"{found[split]} and {folder} are the same split: keep one of them.")
            found[split] = folder
    if "train" not in found:
        missing = root / "train" if root.is_dir() else root
        raise DataError(f"{missing} does not exist; lay the images out as\n{_TREE.format(root=root)}")
    rows = {split: _Rows(folder) for split, folder in found.items()}
    for split, folder in found.items():
        for name, path in _class_files(folder):
            rows[split].paths.append(path.relative_to(root).as_posix())
            rows[split].names.append(name)
    return _label(root, rows)


def _class_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yields (class name, image) of one split folder, sorted."""
    stray = next((path for path in sorted(folder.iterdir()) if _is_image(path, folder)), None)
    if stray is not None:
        raise DataError(f"{stray} lies in no class folder: move it into {folder}/<class>/.")
    for home in _subfolders(folder):
        files = sorted(path for path in home.rglob("*") if _is_image(path, home))
        if not files:
            raise DataError(f"{home} holds no image: add some, or remove the folder.")
        yield from ((home.name, path) for path in files)


def _subfolders(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if path.is_dir() and not path.name.startswith("."))


def _is_image(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.suffix.lower() in _suffixes() and not hidden and path.is_file()


@cache
def _suffixes() -> frozenset[str]:
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in known.items() if kind in Image.OPEN)


def _read_table(file: Path) -> Lists:
    """Lists the images of a table, split by split."""
    table, lines = _read_text(file)
    missing = [column for column in ("path", "label") if column not in table]
    if missing:
        raise DataError(
            f"{file} has no column {missing[0]!r}; it has {', '.join(map(repr, table))}{_separator(file, table)}."
        )
    for column in {"path", "label", "split"} & table.keys():
        if "" in table[column]:
            raise DataError(f"{file}, line {lines[table[column].index('')]}: the {column} is empty.")
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
        part.names.append(name)
        part.lines.append(line)
    if "train" not in rows:
        raise DataError(f"{file} lists no training images: give some rows the split 'train'.")
    return _label(file.parent, rows)


def _separator(file: Path, columns: Iterable[str]) -> str:
    """Names the separator that a text file should have, if its one column looks like several."""
    expected, (first, *others) = _SEPARATORS.get(file.suffix.lower()), columns
    found = next((sign for sign in _SIGNS if sign in first), None)
    if others or expected is None or found in (None, expected):
        return ""
    return f": separate the columns by a {_SIGNS[expected]}, not a {_SIGNS[found]}"


def _read_text(file: Path) -> tuple[dict[str, list[str]], list[int]]:
    """Reads a table column by column, without empty rows, and the line of each row: from 1, a header included."""
    import pandas as pd

    binary = file.suffix.lower() == ".parquet"
    try:
        if binary:
            frame = pd.read_parquet(file)
            if "label" in frame and frame["label"].dtype.kind == "f":
                raise ValueError("its labels are decimal numbers, or some are missing")
            frame = frame.astype(object).where(frame.notna(), "").astype(str)
        else:
            # As text: 007 is a class name and no number, and a class may be called NA.
            text = {"dtype": str, "keep_default_na": False, "skip_blank_lines": False, "encoding": "utf-8-sig"}
            frame = pd.read_csv(file, sep=_SEPARATORS[file.suffix.lower()], **text).fillna("")
    except (OSError, ValueError) as error:  # pandas' and pyarrow's own errors are ValueErrors
        raise DataError(f"{file} is not a readable table ({' '.join(str(error).split())}).") from error
    kept = (frame != "").any(axis=1)
    table = {str(column): [value.strip() for value in frame.loc[kept, column]] for column in frame}
    lines = [int(number) + (1 if binary else 2) for number in kept.to_numpy().nonzero()[0]]
    if not lines:
        raise DataError(f"{file} lists no images.")
    return table, lines


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
            raise DataError(f"{where}{part.paths[unknown]} is of class {name!r}, of which there is no training image.")
        labels = np.array([numbers[name] for name in part.names], dtype=np.int64)
        lists[split] = ImageList(part.file, folder, part.paths, labels, part.lines)
    return class_names, lists


def class_order(names: Iterable[str]) -> list[str]:
    """Orders class names, all different: by number if all are whole numbers (2 before 10), else by name."""
    listed = sorted(names)
    return sorted(listed, key=int) if all(name.isdecimal() for name in listed) else listed


def _split_name(written: str, where: str) -> str:
    """Returns the split that a folder or a row names."""
    shift = written.removeprefix(_SHIFT)
    if written in SPLIT_NAMES:
        return SPLIT_NAMES[written]
    if shift in ("", written) or shift in SPLIT_NAMES:
        raise DataError(f"{where}: unknown split {written!r}; use {', '.join(SPLIT_NAMES)} or {_SHIFT}<name>.")
    return shift
