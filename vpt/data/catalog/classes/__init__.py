"""The classes of ImageNet-1k and of its shifted test sets, as the lists that ``datasets/classes/make.py`` wrote.

Ids are positions 0..999 in ILSVRC order, which is the alphabetical order of the WordNet ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

Groups = tuple[tuple[int, ...], ...]
"""One tuple of ImageNet-1k ids a class: its logit is the largest of theirs."""


@cache
def _rows(name: str) -> list[list[str]]:
    text = (Path(__file__).parent / f"{name}.txt").read_text(encoding="utf-8")
    return [line.split("\t") for line in text.splitlines() if not line.startswith("#")]


def imagenet_wnids() -> list[str]:
    """Returns the 1,000 WordNet ids by class id."""
    return [wnid for wnid, _ in _rows("imagenet_1k")]


def imagenet_names() -> list[str]:
    """Returns the 1,000 class names by class id; all differ."""
    return [name for _, name in _rows("imagenet_1k")]


def subset_ids(name: str) -> list[int]:
    """Returns the ascending class ids of ``"imagenet_a"`` or ``"imagenet_r"``, 200 each."""
    return [int(row[0]) for row in _rows(name)]


def objectnet_folders() -> dict[str, tuple[int, ...]]:
    """Returns the folders of the 113 classes that ObjectNet shares with ImageNet, with the ids that each matches."""
    return {folder: tuple(int(each) for each in ids.split(",")) for folder, _, ids in _rows("objectnet")}


def ids_sha256(ids: Iterable[int]) -> str:
    """Hashes class ids: sha256 of the ascending ids, joined by commas."""
    return hashlib.sha256(",".join(str(each) for each in sorted(ids)).encode()).hexdigest()
