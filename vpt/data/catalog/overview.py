"""Which datasets there are, which of them lie on this machine, and what their cards say."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vpt.data.cache.content_hashes import home_path
from vpt.data.catalog.cards import Card, card_names, find_card, load_card
from vpt.data.datamodule import ImageDataModule
from vpt.data.datasets.fgvc import FGVCDataModule
from vpt.data.datasets.folder import FolderDataModule
from vpt.data.datasets.imagenet import ImageNetDataModule, expand, present_sets
from vpt.data.datasets.imagenet import home as imagenet_home
from vpt.data.datasets.pets import PetTrimapsDataModule
from vpt.data.datasets.shape_texture import ShapeTextureDataModule
from vpt.data.datasets.vtab import VTABDataModule
from vpt.data.images import ImageList
from vpt.errors import ConfigError, DataError, UnknownNameError, VPTError

_VTAB_LISTS = ("train800val200", "train800")
# Name or suite -> data module, and the argument that takes the name; all others lie in VTAB's layout.
_MODULES: dict[str, tuple[Callable[..., ImageDataModule], str | None]] = {
    "fgvc": (FGVCDataModule, "dataset"),
    "imagenet": (ImageNetDataModule, "variant"),
    "flickr_in1k_1000": (ImageNetDataModule, "variant"),
    "oxford_pet_trimaps": (PetTrimapsDataModule, None),
    "shape_texture16": (ShapeTextureDataModule, None),
}
_MANY = "imagenet_c"
MANY_SETS = len(expand([_MANY]))
"""Test sets that ImageNet-C is made of."""
_WIDTH = 88


@dataclass(frozen=True)
class Entry:
    """One dataset in the list: its card, and why what is here cannot be read, else an empty `fault`.

    `found` is the number of images of each list on this machine, None if it is not here; `sets` how many of
    ImageNet-C's sets are here, whose images are not counted, 1 for all others.
    """

    card: Card
    found: dict[str, int] | None
    fault: str = ""
    sets: int = 1

    @property
    def official_sets(self) -> int:
        """Number of test sets of the counted size: 95 for ImageNet-C, else 1."""
        return MANY_SETS if self.card.name == _MANY else 1

    @property
    def classes(self) -> int:
        """Number of classes that count."""
        return self.card.tested_classes or self.card.num_classes


def card_of(name: str) -> Card | None:
    """Looks up the card of a dataset or of one of its variants; None if there is none.

    One of ImageNet's may be followed by ``-`` and a variant, e.g. ``"imagenet_c-fog-3"``.
    """
    whole = load_card(name.partition("-")[0])
    return load_card(name) or (whole if whole is not None and whole.suite == "imagenet" else None)


def card_on_disk(name: str, root: Path) -> Card | None:
    """Looks up a card as `card_of`, but none of a generated task where the user's own data bear its name."""
    card = card_of(name)
    if card is None or card.suite != "demo" or not any(place.exists() for place in _places(name, root)):
        return card
    return None


def overview(root: Path) -> list[Entry]:
    """Says what of each dataset, by suite, group and name, lies below the root, by lists and their first images."""
    suites = ["vtab", "fgvc", "imagenet", "local", "demo"]
    groups = ["natural", "specialized", "structured"]

    def key(card: Card) -> tuple[int, int, str]:
        return suites.index(card.suite), groups.index(card.group) if card.group in groups else 0, card.name

    return [_entry(card, root) for card in sorted(map(find_card, card_names()), key=key)]


def _entry(card: Card, root: Path) -> Entry:
    if card.suite == "demo":
        return Entry(card, card.sizes)
    try:
        if card.name == _MANY:
            return Entry(card, {}, sets=len(parts(card.name, root)))
        lists = image_lists(card.name, root)
        check_images(lists)
        return Entry(card, {name: len(images.paths) for name, images in lists.items()})
    except VPTError as error:
        return Entry(card, None, str(error) if (root / card.name).exists() else "")


def parts(name: str, root: Path) -> list[str]:
    """Says which datasets a name is: itself, or the sets of ImageNet-C's 95 that are here (a DataError if none)."""
    card = card_of(name)
    return present_sets(card, root) if card is not None and name == _MANY else [name]


def check_images(lists: Mapping[str, ImageList]) -> None:
    """Looks for the first image of each list, as of :func:`image_lists`; a DataError where it is not there."""
    for images in lists.values():
        first = images.folder / images.paths[0]
        if not first.is_file():
            raise DataError(f"{first} does not exist, though {images.file} lists it: copy the images as well.")


def image_lists(name: str, root: Path, options: Mapping[str, Any] = MappingProxyType({})) -> dict[str, ImageList]:
    """Reads the lists of a dataset as its data module does, and refuses what that refuses, save a wrong count.

    The name is that of a card, or a folder in VTAB's layout or what `FolderDataModule` takes, below the root or
    anywhere. Lists are named as in the card's sizes, e.g. ``"test"``; ImageNet-1k's training images are listed where
    they are here. `options` are those of `FolderDataModule`, a ConfigError where it does not read the data. A DataError
    where a file is missing or malformed, or this package makes the images.
    """
    lists: dict[str, ImageList] = {}
    for module in _modules(name, root, options):
        for split in module._splits.values():
            if len(split.labels) == 0:  # a test set has no training images
                continue
            images = split.pixels.args[0] if isinstance(split.pixels, partial) and split.pixels.args else None
            if not isinstance(images, ImageList):
                raise DataError(f"{name} is made by this package: it has no files.")
            lists[split.source.rsplit("/", 1)[-1].removesuffix(".txt")] = images
    return lists


def own_data(name: str, root: Path) -> Path:
    """Finds a folder or table that is no published dataset, below the root or anywhere; else an UnknownNameError."""
    for place in _places(name, root):
        if name and place.exists():
            return place
    raise UnknownNameError(f"dataset, folder or table (also in {root})", name, card_names())


def _places(name: str, root: Path) -> tuple[Path, Path]:
    return root / name, home_path(name)


def in_vtab_layout(name: str) -> bool:
    """Says whether a dataset is a folder of lists, which is so unless its suite has a module of its own."""
    card = card_of(name)
    return name not in _MODULES and (card is None or card.suite not in _MODULES)


def _modules(name: str, root: Path, options: Mapping[str, Any]) -> Iterator[ImageDataModule]:
    card = card_on_disk(name, root)
    if card is not None and card.suite == "demo":
        raise DataError(f"{name} is made by this package: it has no files.")
    home = own_data(name, root) if card is None else root / name
    if card is None and not any((home / f"{stem}.txt").exists() for stem in (*_VTAB_LISTS, "val200", "test")):
        yield FolderDataModule(home, **options)
        return
    if options:
        raise ConfigError(f"{next(iter(options))} is of folders of classes and tables of your own: leave it out.")
    if card is None or in_vtab_layout(name):
        for train in _VTAB_LISTS:
            if train == _VTAB_LISTS[0] or (home / f"{train}.txt").exists():
                yield VTABDataModule(home.name, home.parent, train=train)
        return
    module, argument = _MODULES.get(name) or _MODULES[card.suite]
    given: dict[str, Any] = {argument: name} if argument else {}
    if name == "imagenet_1k" and (imagenet_home(card, root) / "train").is_dir():
        given["train"] = "train"
    yield module(root=root, allow_partial=True, **given)


def describe(card: Card) -> str:
    """Writes a card in lines of at most 88 characters, save for addresses and what it itself breaks into lines."""
    sizes = ", ".join(f"{name} {size:,}" for name, size in card.sizes.items())
    facts = {
        "name": card.name,
        "suite": f"{card.suite}, {card.group}" if card.group else card.suite,
        "classes": (f"{card.tested_classes:,} of " if card.tested_classes else "") + f"{card.num_classes:,}",
        "images": sizes,
        "licence": card.licence,
        "use": "test only: it may not be trained on" if "no-training" in card.restrictions else "",
        "source": card.source,
        "citation": card.citation,
        "notes": card.notes,
    }
    lines = [card.title, "", *(_fact(name, text) for name, text in facts.items() if text)]
    for title, text in (("layout", card.layout), ("how to get it", card.obtain)):
        if text:
            lines += ["", title, textwrap.indent(text.rstrip(), "  ")]
    if card.downloads:
        lines += ["", f"`vpt data prepare {card.name}` fetches"]
        lines += [f"  {download.file} from {url}" for download in card.downloads for url in download.urls]
    if card.published:
        lines += ["", "published, top-1 in percent", *map(_published, card.published)]
    if card.class_names:
        names = ", ".join(card.class_names)
        lines += ["", "class names", textwrap.fill(names, _WIDTH, initial_indent="  ", subsequent_indent="  ")]
    return "\n".join(lines)


def _fact(name: str, text: str) -> str:
    indent = " " * 12
    plain = " ".join(text.split())
    return textwrap.fill(plain, _WIDTH, initial_indent=f"{name:<12}", subsequent_indent=indent, break_long_words=False)


def _published(row: dict[str, Any]) -> str:
    preset = f", preset {row['preset']}" if row.get("preset") else ""
    text = f"{row['accuracy']:>5}  {row['method']}, {row['backbone']}{preset} ({row['source']})"
    return textwrap.fill(text, _WIDTH, initial_indent="  ", subsequent_indent=" " * 9)
