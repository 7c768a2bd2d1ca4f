"""Is what lies on the disk the dataset that it claims to be? Counts, labels, every image, nothing in two splits."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vpt.data.catalog.cards import bare_name, card_names
from vpt.data.catalog.overview import MANY_SETS, card_of, image_lists, in_vtab_layout, parts
from vpt.data.content_hashes import in_threads
from vpt.data.images import ImageList
from vpt.errors import DataError, UnknownNameError

_NAMED = 3  # faults of one kind; the others are counted


@dataclass(frozen=True)
class ListReport:
    """What one list holds.

    Attributes:
        name: Of the list.
        official: Number of images that the card states; None if it states none.
        histogram: int64 (classes,), images of each class.
        classes: Number of classes that count, at most those of the histogram.
    """

    name: str
    official: int | None
    histogram: NDArray[np.int64]
    classes: int

    @property
    def found(self) -> int:
        """Number of images."""
        return int(self.histogram.sum())


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        name: Of the dataset.
        lists: One report a list.
        faults: One sentence each; empty if all is well.
        notes: Likewise, of what the authors of a complete dataset have left in it, and how many of 95 sets are here.
    """

    name: str
    lists: Sequence[ListReport]
    faults: Sequence[str]
    notes: Sequence[str] = ()

    @property
    def compared(self) -> bool:
        """Says whether there are two splits, so that a file could be in both."""
        return len({_kind(each.name) for each in self.lists}) > 1

    def check(self) -> None:
        """Raises unless all is well.

        Raises:
            DataError: There are faults.
        """
        if self.faults:
            more = f" (and {len(self.faults) - 1} more, see above)" if len(self.faults) > 1 else ""
            raise DataError(f"{self.name} is not as it should be: {self.faults[0].rstrip('.')}{more}.")


def verify(name: str, root: Path) -> Report:
    """Reads every list and decodes every image of a dataset.

    Args:
        name: A dataset with a card, or a folder below the root in VTAB's layout.
        root: The folder of all datasets.

    Returns:
        The report. A test image must be no training or validation image, a validation image no training image: neither
        the same file nor one of the same decoded pixels. The latter is but noted where a published dataset is complete,
        some of which repeat an image (dSprites has each shape at 0° and at 360°). Of ``"imagenet_c"`` all sets that
        are here, one list each.

    Raises:
        UnknownNameError: There is neither such a dataset nor such a folder.
        DataError: A list is missing or malformed, so that there is nothing to count.
    """
    name = bare_name(name)
    if card_of(name) is None and not (root / name).is_dir():
        raise UnknownNameError(f"dataset or folder of {root}", name, card_names())
    found = parts(name, root)
    if found == [name]:
        return _verify(name, root)
    reports = [_verify(part, root) for part in found]
    return Report(
        name,
        [replace(each, name=report.name) for report in reports for each in report.lists],
        [f"{report.name}: {fault}" for report in reports for fault in report.faults],
        [f"{len(found)} of {MANY_SETS} sets are here"],
    )


def _verify(name: str, root: Path) -> Report:
    card = card_of(name)
    lists = image_lists(name, root)
    sizes = card.sizes if card else {}
    classes = card.num_classes if card else 1 + max(int(images.labels.max()) for images in lists.values())
    counting = (card.tested_classes if card else 0) or classes
    reports = [
        ListReport(stem, sizes.get(stem), np.bincount(images.labels, minlength=classes).astype(np.int64), counting)
        for stem, images in lists.items()
    ]
    # The modules of other suites read only what was asked for, such as test images without training images.
    missing = [f"there is no list {stem}" for stem in sizes if stem not in lists] if in_vtab_layout(name) else []
    counts = [
        f"{report.name} has {report.found:,} images and officially {report.official:,}"
        for report in reports
        if report.official not in (None, report.found)
    ]
    broken, leaks = _image_faults(lists)
    as_published = card is not None and card.suite != "local" and not missing and not counts
    faults = [*missing, *counts, *broken, *([] if as_published else leaks)]
    return Report(name, reports, faults, leaks if as_published else ())


def _image_faults(lists: Mapping[str, ImageList]) -> tuple[list[str], list[str]]:
    """Says which files are unreadable or in two parts, and which pixels are in two parts under two names."""
    where: dict[Path, tuple[ImageList, int]] = {}
    kinds: dict[Path, set[str]] = defaultdict(set)
    for stem, images in lists.items():
        for position, path in enumerate(images.paths):
            where.setdefault(images.folder / path, (images, position))
            kinds[images.folder / path].add(_kind(stem))
    faults, same = [], defaultdict(list)
    for file, answer in zip(where, _digests(list(where.values())), strict=True):
        if isinstance(answer, DataError):
            faults.append(str(answer))
        else:
            same[answer].append(file)
    if len(faults) > _NAMED:
        faults[_NAMED:] = [f"{len(faults) - _NAMED:,} further images cannot be decoded"]
    alone = [[file] for file in where]
    return faults + _leaks(alone, kinds), _leaks([files for files in same.values() if len(files) > 1], kinds)


def _kind(stem: str) -> str:
    """Names the part that a list plays; ``"both"`` is a list of training and validation images."""
    if stem.startswith("train"):
        return "both" if "val" in stem else "train"
    return "val" if stem.startswith("val") else "test"


def _digests(images: Sequence[tuple[ImageList, int]]) -> Iterator[bytes | DataError]:
    """Yields a hash of the pixels of each image, or why it cannot be decoded."""

    def digest(image: tuple[ImageList, int]) -> bytes | DataError:
        try:
            decoded = image[0].decode(image[1])
        except DataError as error:
            return error
        return hashlib.blake2b(repr(decoded.size).encode() + decoded.tobytes(), digest_size=16).digest()

    return in_threads(digest, images, "Decoding")


def _leaks(groups: Iterable[Sequence[Path]], kinds: Mapping[Path, set[str]]) -> list[str]:
    """Finds what is in two parts that must be disjoint; the files of a group are the same image."""
    rules = (
        ("test", {"train", "val", "both"}, "a test image is a training or validation image too"),
        ("val", {"train"}, "a validation image is a training image too"),
    )
    faults = []
    for inner, outer, text in rules:
        pairs = []
        for files in groups:
            held = [file for file in files if inner in kinds[file]]
            used = [file for file in files if kinds[file] & outer and (len(files) == 1 or file not in held)]
            if held and used:
                pairs.append((held[0], used[0]))
        if pairs:
            example = " and ".join(str(file) for file in dict.fromkeys(pairs[0]))
            faults.append(f"{len(pairs):,} times {text}, for instance {example}")
    return faults
