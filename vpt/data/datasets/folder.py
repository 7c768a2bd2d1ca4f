"""Your own images: folders of classes, a table, or a torchvision dataset by name."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vpt.argument_types import checked
from vpt.data.cache.content_hashes import home_path
from vpt.data.channels import Channels
from vpt.data.datamodule import ImageDataModule
from vpt.data.datasets.shards import find_shards, is_address, read_shards
from vpt.data.datasets.table import SPLIT_NAMES, UNDERSTOOD, Columns, Lists, Rows, label_rows, read_rows, split_name
from vpt.data.datasets.torchvision_datasets import TorchvisionList, torchvision_lists
from vpt.data.images import ImageList, LeftOut, find_images, list_folder, shown
from vpt.data.list_files import SEPARATORS, class_name
from vpt.data.splits import hold_out, listed_split
from vpt.data.targets import Targets, positives, strata
from vpt.data.transforms import get_preset
from vpt.errors import ConfigError, DataError, VPTWarning

TEST_FRACTION = 0.2
"""Share of each class that is held out for testing where folders of classes name no split."""

_LAYOUT = (
    "lay the images out as train/<class>/, and if you have them val/<class>/, test/<class>/ and shift_<name>/<class>/, "
    "or as <class>/ alone, or name a table (.csv, .tsv or .parquet) with the columns path, label and optionally split"
)


_OF_TABLES = (
    "path_column, label_column, label_separator, targets, split_column, columns and images_root are of tables only."
)


class FolderDataModule(ImageDataModule):
    """Images of your own, in three lines of YAML.

    A folder holds ``train/<class>/``, and optionally ``val/``, ``test/`` and ``shift_<name>/`` with the same classes;
    or ``<class>/`` alone, of which test and validation images are held out. A table (CSV, TSV or Parquet) has the
    columns ``path`` (relative to the table's folder), ``label`` (a name or a whole number) and optionally ``split``;
    images may also have several labels each, or numbers. Shards are tar files as of WebDataset, with ``.cls`` or
    ``.json`` beside each image or folders of classes inside, or Parquet files with embedded images, as of Hugging Face;
    their names or folders say the split, and the root may be an address such as ``hf://datasets/...``.

    Classes are matched by name, so that label indices stay fixed where a class is missing from the test images. Their
    order: by number if all names are whole numbers (2 before 10),
    else by name. A torchvision dataset keeps its own order.
    """

    @checked
    def __init__(
        self,
        root: str | Path,
        torchvision: str | None = None,
        val_fraction: float = 0.2,
        split_seed: int = 0,
        preset: str = "square",
        image_size: int | list[int] = 224,
        torchvision_args: dict[str, Any] | None = None,
        test_fraction: float | None = None,
        path_column: str = "path",
        label_column: str | list[str] = "label",
        label_separator: str | None = None,
        targets: Targets = "multiclass",
        split_column: str | None = None,
        columns: list[str] | None = None,
        images_root: str | Path | None = None,
        train_on_val: bool = False,
        channels: int | list[int] | None = None,
        **options: Any,
    ) -> None:
        """Lists the images; decodes none.

        Args:
            root: The folder of folders, the table, or a shard or a folder of shards, which may be an address of fsspec;
                for a torchvision dataset its ``root``.
            torchvision: Class in ``torchvision.datasets``, e.g. ``"CIFAR10"``; it is read and never downloaded.
            val_fraction: Share of each training class that is held out for validation where no validation images exist,
                in (0, 1).
            split_seed: Chooses which are held out, with the names of the images and nothing else; not the seed of the
                run.
            preset: Name of the preprocessing.
            image_size: Pixels of the images, or [height, width].
            torchvision_args: Further arguments of the torchvision class, e.g. ``{"split": "letters"}`` of ``"EMNIST"``.
            test_fraction: Share of each class that is held out for testing, in (0, 1), before any for validation; 0 for
                none; None for 0.2 where folders of classes name no split, else 0. Two images of each class stay.
            path_column: Name of a table's column of paths, or of a Parquet file's column of images. A path may have
                backslashes between folders, and no suffix where one image has its name.
            label_column: Name of its column of classes, of several classes each, or of numbers; or the names of several
                columns, of 0 and 1 for a class each, or of numbers.
            label_separator: The sign between the classes of an image in a column of several, e.g. ``"|"``; an empty
                field is an image of no class.
            targets: ``"multiclass"``, a class an image; ``"multilabel"``, any number of classes; ``"regression"``,
                numbers, as many as there are columns of them. All but the first are of tables.
            split_column: Name of its column of splits; None for ``"split"`` where there is one.
            columns: The names of all columns of a text file without a header.
            images_root: Folder that its paths are relative to; None for that of the table.
            train_on_val: Train on the validation images as well.
            channels: Read image files (TIFF, ``.npy``, PNG, JPEG, WebP) as that many channels of 8, 16 or 32 bits,
                or those listed, by number from 0, and never scale them; None for 8-bit RGB. The statistics that
                normalise them are those of the training images, unless the model is given others; the first three are
                shown as red, green and blue.
            **options: See :class:`ImageDataModule`.
        """
        if torchvision_args and torchvision is None:
            raise ConfigError("torchvision_args are arguments of a torchvision dataset: name it by torchvision.")
        if torchvision and channels is not None:
            raise ConfigError("channels are of image files, and torchvision's images are read by torchvision.")
        chosen = get_preset(preset, channels)
        table = Columns(path_column, label_column, label_separator, targets, split_column, columns, images_root)
        if torchvision is not None and table != Columns():
            raise ConfigError(_OF_TABLES)
        lists: dict[str, ImageList | TorchvisionList]
        if torchvision is not None:
            name, share = torchvision.lower(), 0.0
            class_names, lists = torchvision_lists(torchvision, home_path(root), torchvision_args or {})
        else:
            name, class_names, lists, share = _read_root(root, table, channels is not None)
        if test_fraction and "test" in lists:
            raise ConfigError(f"test_fraction has no effect: {name} has test images; leave it out.")
        shares = {"test": share if test_fraction is None else test_fraction, "val": val_fraction}
        held = {split: each for split, each in shares.items() if split not in lists and (each or split == "val")}
        sources = {split: f"{name}/{split}" for split in ("train", "val", *lists)}
        lists = _hold_out(name, class_names, lists, held, split_seed)
        sources |= {split: f"{name}/{'test' if split == 'test' else 'train'} (held out)" for split in held}
        if train_on_val:
            lists, sources["train"] = {**lists, "train": _joined(lists["train"], lists["val"])}, f"{name}/train+val"
        lists = {split: _of_channels(lists[split], chosen.channels) for split in sources}
        splits = {split: listed_split(sources[split], each, chosen, image_size) for split, each in lists.items()}
        self._held_out = {**held, "split_seed": split_seed} if "test" in held else None
        super().__init__(name, class_names, splits, chosen, image_size, card=None, targets=targets, **options)

    def outline(self) -> dict[str, Any]:
        """Says which data these are, as the base class does; ``held_out`` has the shares where one is for testing."""
        return super().outline() | ({"held_out": self._held_out} if self._held_out else {})


def _read_root(
    given: str | Path, table: Columns, channels: bool
) -> tuple[str, list[str], dict[str, ImageList | TorchvisionList], float]:
    """Name, class names and lists of shards, a table or folders, and the share to be tested on where none is named."""
    root = Path(given) if is_address(given) else home_path(given)
    if shards := find_shards(given if is_address(given) else root):
        own = {"path_column": table.path_column, "label_column": table.label_column}
        if channels or table != Columns(**own) or not isinstance(table.label_column, str):  # type: ignore[arg-type]
            raise ConfigError(
                "Images in shards are of 8-bit RGB, with one class each: path_column and label_column say where."
            )
        column = None if table.path_column == Columns().path_column else table.path_column
        class_names, lists = read_shards(root, shards, table.label_column, column)
        return root.stem, class_names, lists, 0.0 if len(lists) > 1 else TEST_FRACTION
    if root.suffix.lower() in {*SEPARATORS, ".parquet"} and not root.is_dir():
        return (root.stem, *read_rows(root, table), 0.0)
    if table != Columns():
        raise ConfigError(_OF_TABLES)
    if root.is_file():
        raise DataError(f"{root} is no folder, and no table that is read: these are .csv, .tsv and .parquet.")
    found, left = _find_splits(root, channels)
    class_names, lists = _read_folders(root, found or {"train": root}, left, channels)
    return Path(os.path.realpath(root)).name, class_names, lists, 0.0 if found else TEST_FRACTION


def _of_channels(images: ImageList | TorchvisionList, channels: Channels | None) -> ImageList | TorchvisionList:
    return replace(images, channels=channels) if isinstance(images, ImageList) else images


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
        rest, held = hold_out(train.paths, strata(train.labels), share, seed, split)
        lists = {**lists, "train": train.take(rest), split: train.take(held)}
        known, there = (positives(each.labels, len(class_names)) > 0 for each in (whole, lists[split]))
        lacking = [name for name, is_lacking in zip(class_names, known & ~there, strict=True) if is_lacking]
        if lacking:
            few = ", ".join(map(repr, lacking[:3])) + (f" and {len(lacking) - 3:,} more" if lacking[3:] else "")
            text = f"{name} has too few images of {few} to hold one out for {split}: add some."
            warnings.warn(text, VPTWarning, stacklevel=3)
    before, left = (positives(each.labels, len(class_names)) > 0 for each in (whole, lists["train"]))
    if gone := [each for each, is_gone in zip(class_names, before & ~left, strict=True) if is_gone]:
        raise DataError(
            f"{name} has too few images of {gone[0]!r}: all were held out, with others of their labels. Add some, or "
            "say by a column of splits which images are trained on."
        )
    return lists


def _joined(train: ImageList | TorchvisionList, val: ImageList | TorchvisionList) -> ImageList | TorchvisionList:
    if isinstance(train, ImageList) and isinstance(val, ImageList):
        return train.joined(val)
    labels = np.concatenate([train.labels, val.labels])
    if isinstance(train, TorchvisionList) and isinstance(val, TorchvisionList) and train.dataset is val.dataset:
        return replace(train, positions=np.concatenate([train.positions, val.positions]), labels=labels)
    raise ConfigError("train_on_val is not known of a torchvision dataset that has validation images: leave it out.")


def _find_splits(root: Path, arrays: bool) -> tuple[dict[str, Path], LeftOut]:
    """Finds the folders of splits; none where no folder has the name of one, which are then classes."""
    found: dict[str, Path] = {}
    left = LeftOut()
    folders, stray = list_folder(root, LeftOut(), arrays) if root.is_dir() else ([], [])
    others = []
    for folder in folders:
        split = split_name(folder.name, str(folder))
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
        if images := find_images(folder, LeftOut(), arrays):
            raise DataError(
                f"{shown(folder)} lies beside splits, holds images ({len(images):,}) and is none: rename it to "
                f"{UNDERSTOOD}, or move it away."
            )
        left.folders.append((folder, "no split"))
    if found and stray:
        left.files["beside the splits"] += len(stray)
    return found, left


def _read_folders(root: Path, found: Mapping[str, Path], left: LeftOut, arrays: bool) -> Lists:
    """Lists the images of every split folder; the root itself is one where it holds the classes."""
    rows = {split: Rows(folder) for split, folder in found.items()}
    above = "" if str(root) == "." else f"{root}{os.sep}" if root.name else str(root)
    for split, folder in found.items():
        for name, path in _class_files(folder, left, arrays):
            below = path.removeprefix(above).replace(os.sep, "/")
            parts = below.split("/")
            if folder == root and len(parts) > 2 and SPLIT_NAMES.get(parts[1].casefold()) == "train":
                raise DataError(f"{shown(root / parts[0])} holds splits itself ({parts[1]}): name that folder as root.")
            rows[split].paths.append(below)
            rows[split].names.append(name)
    left.warn(root)
    return label_rows(root, rows)


def _class_files(folder: Path, left: LeftOut, arrays: bool) -> Iterator[tuple[str, str]]:
    """Yields (class name, image) of one split folder, sorted."""
    homes, stray = list_folder(folder, left, arrays)
    if stray:
        raise DataError(f"{shown(stray[0])} lies in no class folder: move it into {folder}/<class>/.")
    for home in sorted(homes):
        inside = LeftOut()
        files = find_images(home, inside, arrays)
        left.add(inside)
        if not files:
            instead = f" (not read: {text})" if (text := inside.text(home)) else ""
            raise DataError(f"{shown(home)} holds no image{instead}: add some, or remove the folder.")
        yield from ((class_name(home.name), path) for path in files)
