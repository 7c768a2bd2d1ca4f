"""Originals of VTAB-1k, as their authors or torchvision give them, turned once into the layout of `VTABDataModule`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from vpt.data.catalog.cards import Card, load_card
from vpt.data.prepare.originals import MissingOriginalError, Part
from vpt.data.prepare.vtab_rules import Chosen, choose
from vpt.data.prepare.vtab_tasks import TASKS
from vpt.data.prepare.writer import LAST, write_task
from vpt.errors import DataError, UnknownNameError

__all__ = ["TASKS", "prepare"]


def prepare(task: str, source: str | Path, root: str | Path, allow_partial: bool = False) -> Path:
    """Turns an original into ``<root>/<task>/``: images without loss, lists, and classes.json.

    Image files are copied as they are, arrays become PNG; only retinopathy is preprocessed, as VTAB demands. What is
    killed half-way is no finished task: ``test.txt`` is written last, and the next call with the same original goes on
    where it stopped.

    Args:
        task: One of the 19, e.g. ``"clevr_dist"``.
        source: The folder of the unpacked original; the card's ``layout`` shows it.
        root: The folder of all tasks.
        allow_partial: Accept an original with too few images; its split is another.

    Returns:
        The folder of the task.

    Raises:
        UnknownNameError: There is no such task.
        DataError: The original is missing, damaged or incomplete; the task is there already; the disk is full.
    """
    if task not in TASKS:
        raise UnknownNameError("VTAB task", task, TASKS)
    folder = Path(root).expanduser() / task
    if (folder / LAST).exists():
        raise DataError(f"{folder} is there already, it has {LAST}; remove the folder to prepare it anew.")
    card = _card(task)
    try:
        parts = TASKS[task].read(Path(source).expanduser(), card)
    except MissingOriginalError as error:
        raise DataError(f"{error}; the original of {task} is laid out as\n{card.layout}\n{card.obtain}") from error
    sizes = {name: len(part.names) for name, part in parts.items()}
    official = TASKS[task].split.sizes
    if sizes != official and not allow_partial:
        raise DataError(
            f"{source} has {_counts(sizes)} images, and {task} has {_counts(official)}; complete it, or allow a "
            "partial original, whose numbers compare with no other."
        )
    lists = choose(TASKS[task].split, sizes)
    _check(source, parts, lists, card.num_classes)
    write_task(folder, parts, lists, card.class_names or [str(label) for label in range(card.num_classes)])
    return folder


def _card(task: str) -> Card:
    card = load_card(task)
    if card is None:
        raise DataError(f"{task} has no card in vpt/data/catalog/cards; reinstall the package.")
    return card


def _counts(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {part}" for part, count in sizes.items())


def _check(source: str | Path, parts: Mapping[str, Part], lists: Mapping[str, Chosen], classes: int) -> None:
    """Refuses an empty list, a label outside the classes, a name twice or a name that leads out of the folder."""
    seen: set[str] = set()
    for part in parts.values():
        for name, label in zip(part.names, part.labels.tolist(), strict=True):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not name.isprintable():
                raise DataError(f"{source} lists the image {name!r}, which is no path below its folder.")
            if name in seen:
                raise DataError(f"{source} lists the image {name!r} twice.")
            if not 0 <= label < classes:
                raise DataError(f"{source} gives {name!r} the label {label}, which is outside 0..{classes - 1}.")
            seen.add(name)
    for name, chosen in lists.items():
        if not len(chosen.positions):
            raise DataError(f"{source} has too few images: none is left for {name}.")
