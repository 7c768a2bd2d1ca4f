"""From nothing, or from an original on the disk, to a dataset that a config can name."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from rich.console import Console

from vpt.data.archives import unpack
from vpt.data.cards import Card, card_names, load_card
from vpt.data.catalog import find_card
from vpt.data.download import fetch
from vpt.errors import DataError

DOWNLOADS = "downloads"
"""Folder below the root for what is fetched and unpacked."""


def obtain(name: str, root: Path, source: Path | None = None, allow_partial: bool = False) -> Path:
    """Makes a dataset ready.

    VTAB tasks are written to ``<root>/<name>/`` by :func:`vpt.data.prepare.prepare` from an original, which is fetched
    and unpacked below ``<root>/downloads/`` if none is given. All others are read as their authors publish them: they
    are only fetched and unpacked.

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
        if source is not None or not card.downloads:
            raise DataError(_by_hand(card, f"put the folder at {root / card.name}"))
        return _fetch(card, root, root / card.name)
    if source is None:
        if not card.downloads:
            raise DataError(_by_hand(card, f"run `vpt data prepare {card.name} --source FOLDER`"))
        source = _fetch(card, root, root / DOWNLOADS / _shared(card))
    folder: Path = import_module("vpt.data.prepare").prepare(card.name, source, root, allow_partial)
    return folder


def _fetch(card: Card, root: Path, folder: Path) -> Path:
    """Fetches all files of a card and unpacks them into a folder; each only once."""
    archives = root / DOWNLOADS / _shared(card)
    for download in card.downloads:
        file = fetch(download, archives if download.extract else folder)
        done = archives / f"{download.file}.unpacked"
        if download.extract and not done.exists():
            with Console(stderr=True).status(f"Unpacking {download.file}"):
                unpack(file, folder)
            done.touch()
    return folder


def _shared(card: Card) -> str:
    """Names the folder of an original: tasks that are made of the same files have the same."""
    cards = (other for name in card_names() if (other := load_card(name)) is not None)
    return min([card.name, *(other.name for other in cards if other.downloads == card.downloads)])


def _by_hand(card: Card, then: str) -> str:
    if card.suite == "demo":
        return f"{card.name} is made by this package: there is nothing to prepare."
    steps = card.obtain.strip() or f"Get it from {card.source}."
    layout = f"\nIt is laid out as\n{card.layout.rstrip()}" if card.layout else ""
    return f"{card.title} is not fetched by this package. By hand: {steps}\nThen {then}.{layout}"
