"""From nothing, or from an original on the disk, to a dataset that a config can name."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

from rich.console import Console

from vpt.data.archives import unpack
from vpt.data.cards import Card, card_names, load_card
from vpt.data.catalog import check_images, find_card, image_lists, parts
from vpt.data.download import fetch
from vpt.errors import DataError

DOWNLOADS = "downloads"
"""Folder below the root for what is fetched and unpacked."""


def obtain(name: str, root: Path, source: Path | None = None, allow_partial: bool = False) -> Path:
    """Makes a dataset ready.

    VTAB tasks are written to ``<root>/<name>/`` by :func:`vpt.data.prepare.prepare` from an original, which is fetched
    and unpacked below ``<root>/downloads/`` if none is given. All others are read as their authors publish them: they
    are only fetched and unpacked, and their lists are read to see that it is they.

    Args:
        name: A dataset with a card.
        root: The folder of all datasets.
        source: Folder of the unpacked original of a VTAB task; None to fetch it.
        allow_partial: Accept an original with too few images.

    Returns:
        The folder of the dataset.

    Raises:
        UnknownNameError: There is no such dataset.
        DataError: It can only be got by hand, and the message says how; or it cannot be fetched, unpacked or read.
    """
    card = find_card(name)
    if card.suite != "vtab":
        if source is not None and card.suite != "demo":
            raise DataError(_as_published(card, root / card.name))
        if not card.downloads:
            raise DataError(_by_hand(card, f"put the folder at {root / card.name}"))
        fetched = _fetch(card, root, root / card.name)
        for part in parts(card.name, root):
            check_images(image_lists(part, root))
        return fetched
    if source is None:
        if not card.downloads:
            raise DataError(_by_hand(card, f"run `vpt data prepare {card.name} --source FOLDER`"))
        source = _fetch(card, root, root / DOWNLOADS / _shared(card))
    folder: Path = import_module("vpt.data.prepare").prepare(card.name, source, root, allow_partial)
    return folder


def _fetch(card: Card, root: Path, folder: Path) -> Path:
    """Fetches all files of a card and unpacks them into a folder; each only once, unless what it held is gone."""
    archives = root / DOWNLOADS / _shared(card)
    for download in card.downloads:
        done = archives / f"{download.file}.unpacked"
        if download.extract and _whole(folder, done):
            continue
        file = fetch(download, archives if download.extract else folder)
        if download.extract:
            done.unlink(missing_ok=True)
            with Console(stderr=True).status(f"Unpacking {download.file}"):
                sizes = unpack(file, folder)
            done.write_text(json.dumps(sizes), encoding="utf-8")
    return folder


def _whole(folder: Path, done: Path) -> bool:
    """Says whether a folder holds every file that an archive was noted to have put there, at its size."""
    try:
        sizes = json.loads(done.read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _shared(card: Card) -> str:
    """Names the folder of an original: tasks that are made of the same files have the same."""
    cards = (other for name in card_names() if (other := load_card(name)) is not None)
    return min([card.name, *(other.name for other in cards if other.downloads == card.downloads)])


def _as_published(card: Card, folder: Path) -> str:
    fetched = ", or leave --source out to fetch it" if card.downloads else ""
    layout = f", laid out as\n{card.layout.rstrip()}" if card.layout else "."
    return (
        f"--source is for VTAB tasks only: {card.name} is read as its authors publish it; put the folder at "
        f"{folder}{fetched}{layout}"
    )


def _by_hand(card: Card, then: str) -> str:
    if card.suite == "demo":
        return f"{card.name} is made by this package: there is nothing to prepare."
    steps = card.obtain.strip() or f"Get it from {card.source}."
    layout = f"\nIt is laid out as\n{card.layout.rstrip()}" if card.layout else ""
    return f"{card.title} is not fetched by this package. By hand: {steps}\nThen {then}.{layout}"
