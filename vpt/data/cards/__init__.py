"""Dataset cards: what a dataset officially is, one YAML file each."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from vpt.errors import DataError

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Card:
    """What a dataset officially is.

    Attributes:
        name: Name of the task and of the file.
        title: Name in full.
        num_classes: Number of classes.
        sizes: Official number of images of each list, e.g. ``{"test": 6084}``.
        licence: Licence of the images as stated by their authors.
        source: Where they come from.
        citation: Paper to cite.
        class_names: One name a class; empty if only the data's own classes.json has them.
        published: Numbers from papers: method, backbone, accuracy in percent, source.
        notes: What a reader must know before comparing numbers.
    """

    name: str
    title: str
    num_classes: int
    sizes: dict[str, int]
    licence: str
    source: str
    citation: str
    class_names: list[str] = field(default_factory=list)
    published: list[dict[str, Any]] = field(default_factory=list)
    notes: str = ""


@cache
def load_card(name: str) -> Card | None:
    """Reads a card.

    Args:
        name: Name of a task.

    Returns:
        The card, or None if there is none for that name.

    Raises:
        DataError: The file is not a valid card.
    """
    file = _FOLDER / f"{name}.yaml"
    if file.parent != _FOLDER or not file.is_file():
        return None
    try:
        card = Card(**yaml.safe_load(file.read_text(encoding="utf-8")))
    except (TypeError, yaml.YAMLError) as error:
        raise DataError(f"{file} is not a valid dataset card ({error}).") from error
    if card.class_names and len(card.class_names) != card.num_classes:
        raise DataError(f"{file} names {len(card.class_names)} classes and states {card.num_classes}.")
    return card
