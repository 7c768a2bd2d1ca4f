"""Any folder in the layout in which VTAB-1k circulates (Zhai et al. 2019, arXiv:1910.04867) is a task.

``<root>/<task>/`` has images, one list a split, perhaps ``classes.json``, and ``shift_<name>.txt`` as shifts.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from vpt.argument_types import checked
from vpt.data.catalog.cards import Card, load_card
from vpt.data.datamodule import ImageDataModule
from vpt.data.datasets.published_files import data_root
from vpt.data.images import ImageList
from vpt.data.list_files import check_class_names, class_name, read_json, read_list
from vpt.data.splits import listed_split
from vpt.data.transforms import get_preset
from vpt.errors import DataError, VPTWarning

_TREE = """\
{folder}/
  images/...            the pictures, in any folders
  {train}.txt           one 'path<whitespace>label' a line, paths relative to {folder}
  {val}.txt
  {test}.txt
  classes.json          optional: list of class names, or label -> name
  shift_<name>.txt      optional: test sets under shift"""


class VTABDataModule(ImageDataModule):
    """One VTAB-1k task, or any folder in that layout."""

    @checked
    def __init__(
        self,
        task: str,
        root: str | Path | None = None,
        train: str = "train800val200",
        val: str = "val200",
        test: str = "test",
        preset: str = "vpt",
        image_size: int | list[int] = 224,
        **options: Any,
    ) -> None:
        """Reads the lists and class names; no image yet.

        The VTAB-1k protocol trains on ``train800`` while choosing hyperparameters on ``val200``, then on
        ``train800val200``; in the latter case validation images have been trained on and their accuracy is no estimate.

        Args:
            task: Folder of the task below the root.
            root: Folder of all tasks; None for :func:`vpt.data.default_root`.
            train: List to train on, without ``.txt``.
            val: List to validate on.
            test: List to test on.
            preset: Name of the preprocessing (:data:`vpt.data.transforms.PRESETS`).
            image_size: Pixels of the images, or [height, width].
            **options: See :class:`ImageDataModule`. VTAB-1k has no augmentation.
        """
        folder = data_root(root) / task
        files = {"train": folder / f"{train}.txt", "val": folder / f"{val}.txt", "test": folder / f"{test}.txt"}
        _check_tree(folder, files)
        for file in sorted(folder.glob("shift_*.txt")):
            shift = file.stem.removeprefix("shift_")
            if not shift or shift in files:
                raise DataError(
                    f"{file}: a shift cannot be called {shift!r}, as a split or not at all; rename the list."
                )
            files[shift] = file
        lists = {name: read_list(file, folder) for name, file in files.items()}
        card = load_card(task)
        class_names = _class_names(folder, card, lists["train"])
        for images in lists.values():
            images.check_labels(len(class_names))
        chosen = get_preset(preset)
        splits = {
            name: listed_split(f"{task}/{images.file.name}", images, chosen, image_size)
            for name, images in lists.items()
        }
        super().__init__(task, class_names, splits, preset, image_size, card=card, **options)


def _check_tree(folder: Path, files: dict[str, Path]) -> None:
    """Raises a DataError with the expected tree if the folder or a list is missing."""
    missing = next((path for path in (folder, *files.values()) if not path.exists()), None)
    if missing is None:
        return
    tree = _TREE.format(folder=folder, **{name: file.stem for name, file in files.items()})
    card = load_card(folder.name)
    if card is not None and card.suite == "vtab":
        tree += f"\nFrom the original: vpt data prepare vtab/{card.name} --source FOLDER"
    raise DataError(
        f"{missing} does not exist; set VPT_DATA or the root to the folder that holds the task, laid out as\n{tree}"
    )


def _class_names(folder: Path, card: Card | None, train: ImageList) -> list[str]:
    """Names from classes.json, else from the card, else the labels that occur in training."""
    file = folder / "classes.json"
    if file.is_file():
        names = _named(file)
    elif card is not None:
        return card.class_names or [str(label) for label in range(card.num_classes)]
    else:
        names = _numbered(train)
    check_class_names(names, file if file.is_file() else train.file)
    return names


def _named(file: Path) -> list[str]:
    what = "a list of class names or a map from labels 0..C-1 to names"
    content = read_json(file, what)
    if isinstance(content, dict):
        content = [content.get(str(label)) for label in range(len(content))]
    if not isinstance(content, list) or not content or not all(isinstance(name, str) for name in content):
        raise DataError(f"{file} is not {what}.")
    return [class_name(name) for name in content]


def _numbered(train: ImageList) -> list[str]:
    """One class for each label up to the largest, of which a mistyped one would make millions."""
    largest = int(train.labels.argmax())
    number = int(train.labels[largest]) + 1
    remedy = "number the classes from 0 without a gap, or name them in classes.json"
    if number > len(train):
        raise DataError(
            f"{train.file}, line {train.lines[largest]}: label {number - 1} makes {number:,} classes of {len(train):,} "
            f"images; {remedy}."
        )
    unused = np.setdiff1d(np.arange(number), train.labels).tolist()
    if unused:
        text = f"{train.file} has no image of label {unused[0]}, the first of {len(unused):,} such up to {number - 1}"
        warnings.warn(f"{text}: {remedy}.", VPTWarning, stacklevel=2)
    return [str(label) for label in range(number)]
