"""Dataset cards: what a dataset officially is, one YAML file each."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from vpt.errors import DataError, UnknownNameError

_FOLDER = Path(__file__).parent
Suite = Literal["vtab", "fgvc", "imagenet", "local", "demo"]


@dataclass(frozen=True)
class Download:
    """A file that may be fetched: the licence allows it and the address is stable.

    `file` is its name below the dataset's download folder, the first of `urls` that answers is taken. The checksum is
    `sha256`, or `md5` where only this is stated, hexadecimal, None if there is none; `size` is in bytes, None if
    unknown; `extract` says that it is an archive to be unpacked.
    """

    file: str
    urls: list[str]
    sha256: str | None = None
    md5: str | None = None
    size: int | None = None
    extract: bool = True


@dataclass(frozen=True)
class Card:
    """What a dataset officially is.

    Attributes:
        name: Of the task and of the file; the `title` is the name in full.
        sizes: Official number of images of each list, e.g. ``{"test": 6084}``.
        licence: Licence of the images as stated by their authors.
        tested_classes: Those of `num_classes` that count, where the images have only some; 0 for all.
        group: Within the suite, e.g. ``"natural"``; empty for none.
        class_names: One name a class; empty if only the data's own files have them.
        layout: The folder as its authors publish it, a tree in plain text.
        obtain: The steps to get it by hand, in plain text; ``{source}`` in the file stands for the source's address.
        downloads: What `vpt data prepare` may fetch; empty if it must be got by hand.
        restrictions: ``"no-training"`` for images that may only be tested on.
        published: Numbers from papers: method, backbone, accuracy in percent, source, and preset where it is known.
        notes: What a reader must know before comparing numbers.
    """

    name: str
    title: str
    suite: Suite
    num_classes: int
    sizes: dict[str, int]
    licence: str
    source: str
    citation: str
    tested_classes: int = 0
    group: str = ""
    class_names: list[str] = field(default_factory=list)
    layout: str = ""
    obtain: str = ""
    downloads: list[Download] = field(default_factory=list)
    restrictions: list[str] = field(default_factory=list)
    published: list[dict[str, Any]] = field(default_factory=list)
    notes: str = ""


def card_names() -> list[str]:
    """Names of all datasets that have a card, sorted."""
    return sorted(file.stem for file in _FOLDER.glob("*.yaml"))


@cache
def load_card(name: str) -> Card | None:
    """Reads the card of a task; None if there is none of that name, a DataError where the file is no valid card."""
    if name not in card_names():
        return None
    file = _FOLDER / f"{name}.yaml"
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        values["obtain"] = values.get("obtain", "").replace("{source}", values["source"].partition(" ")[0])
        card = Card(**values | {"downloads": [Download(**entry) for entry in values.get("downloads", [])]})
    except (KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise DataError(f"{file} is not a valid dataset card ({error}).") from error
    if card.suite not in get_args(Suite):
        raise DataError(f"{file} has suite {card.suite!r}; known are {', '.join(get_args(Suite))}.")
    if card.class_names and len(card.class_names) != card.num_classes:
        raise DataError(f"{file} names {len(card.class_names)} classes and states {card.num_classes}.")
    return card


def find_card(name: str) -> Card:
    """Looks a card up by its name or ``"<suite>/<name>"``; an UnknownNameError where there is none."""
    card = load_card(bare_name(name))
    if card is None:
        raise UnknownNameError("dataset", name, card_names())
    return card


def bare_name(name: str) -> str:
    """Takes the suite off ``"<suite>/<name>"``; any other name, as of a folder, stays as it is."""
    suite, _, last = name.rpartition("/")
    card = load_card(last)
    return last if card is not None and card.suite == suite else name
