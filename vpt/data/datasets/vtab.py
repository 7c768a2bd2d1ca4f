"""Any folder in the layout in which VTAB-1k circulates (Zhai et al. 2019, arXiv:1910.04867) is a task.

``<root>/<task>/`` has images, one list a split, perhaps ``classes.json``, and ``shift_<name>.txt`` as shifts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vpt.argument_types import checked
from vpt.data.catalog.cards import Card, load_card
from vpt.data.datamodule import ImageDataModule
from vpt.data.datasets.published_files import data_root
from vpt.data.images import ImageList, read_list
from vpt.data.splits import listed_split
from vpt.data.transforms import get_preset
from vpt.errors import DataError

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
        image_size: int = 224,
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
            image_size: Side of the square images in pixels.
            **options: See :class:`ImageDataModule`. VTAB-1k has no augmentation.
        """
        folder = data_root(root) / task
        files = {"train": folder / f"{train}.txt", "val": folder / f"{val}.txt", "test": folder / f"{test}.txt"}
        _check_tree(folder, files)
        for file in sorted(folder.glob("shift_*.txt")):
            shift = file.stem.removeprefix("shift_")
            if shift in files:
                raise DataError(f"{file}: a shift cannot be called {shift!r}, that is a split; rename the list.")
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
    if not file.is_file():
        if card is not None:
            return card.class_names or [str(label) for label in range(card.num_classes)]
        return [str(label) for label in range(int(train.labels.max()) + 1)]
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        names = [content[str(label)] for label in range(len(content))] if isinstance(content, dict) else content
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{file} is not a list of class names or a map from labels 0..C-1 to names ({error})."
        ) from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise DataError(f"{file} is not a list of class names or a map from labels 0..C-1 to names.")
    return names
