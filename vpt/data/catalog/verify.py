"""Is what lies on the disk the dataset that it claims to be? Counts, labels, every image, nothing twice."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn

from vpt.data.cache.content_hashes import in_threads
from vpt.data.catalog.cards import bare_name
from vpt.data.catalog.overview import MANY_SETS, card_on_disk, image_lists, in_vtab_layout, own_data, parts
from vpt.data.channels import Raster
from vpt.data.images import ImageList
from vpt.data.targets import num_classes, positives
from vpt.errors import DataError

NEAR = 4
"""In how many of its 64 bits the hash of an image may differ from that of another that it nearly equals."""

_NAMED = 3  # faults of one kind; the others are counted
_WORDS = {"train": "training", "both": "training or validation", "val": "validation", "test": "test"}
_DISJOINT = (
    ("test", {"train", "val", "both"}, "a training or validation image"),
    ("val", {"train"}, "a training image"),
)


@dataclass(frozen=True)
class ListReport:
    """What one list holds: `found` images, and a histogram, int64 (classes,), of how many are of each class.

    `official` is the number that the card states, or None; `classes` how many classes of the histogram count.
    """

    name: str
    official: int | None
    found: int
    histogram: NDArray[np.int64]
    classes: int


@dataclass(frozen=True)
class Report:
    """What was found in a dataset: one report a list, and a sentence for each of the faults.

    `notes` say what repeats within a split or nearly does, what the authors of a complete dataset have left in it, and
    how many of 95 sets are here.
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
        """Raises a DataError unless all is well."""
        if self.faults:
            more = f" (and {len(self.faults) - 1} more, see above)" if len(self.faults) > 1 else ""
            raise DataError(f"{self.name} is not as it should be: {self.faults[0].rstrip('.')}{more}.")


def verify(name: str, root: Path, options: Mapping[str, Any] = MappingProxyType({})) -> Report:
    """Reads every list and decodes every image of a dataset: one with a card, or what `image_lists` takes besides.

    A test image must be no training or validation image, a validation image no training image: neither the same file
    nor one of the same decoded pixels; and an image has one label. The pixels are but noted where a published dataset
    is complete, some of which repeat an image (dSprites has each shape at 0° and at 360°). What is equal within a
    split, or `NEAR`, is noted. Of ``"imagenet_c"`` all sets that are here, one list each. An UnknownNameError where
    there is no such dataset, folder or table, and a DataError where a list is missing or malformed. `options` are those
    of `FolderDataModule` that say how a table is read.
    """
    name = bare_name(name)
    if card_on_disk(name, root) is None:
        own_data(name, root)
    found = parts(name, root)
    if found == [name]:
        return _verify(name, root, options)
    reports = [_verify(part, root, options) for part in found]
    return Report(
        name,
        [replace(each, name=report.name) for report in reports for each in report.lists],
        [f"{report.name}: {fault}" for report in reports for fault in report.faults],
        [f"{len(found)} of {MANY_SETS} sets are here"],
    )


def _verify(name: str, root: Path, options: Mapping[str, Any]) -> Report:
    card = card_on_disk(name, root)
    lists = image_lists(name, root, options)
    sizes = card.sizes if card else {}
    classes = card.num_classes if card else max(num_classes(images.labels) for images in lists.values())
    counting = (card.tested_classes if card else 0) or classes
    reports = [
        ListReport(stem, sizes.get(stem), len(images), positives(images.labels, classes), counting)
        for stem, images in lists.items()
    ]
    # The modules of other suites read only what was asked for, such as test images without training images.
    missing = [f"there is no list {stem}" for stem in sizes if stem not in lists] if in_vtab_layout(name) else []
    counts = [
        f"{report.name} has {report.found:,} images and officially {report.official:,}"
        for report in reports
        if report.official not in (None, report.found)
    ]
    broken, leaks, notes = _image_faults(lists)
    as_published = card is not None and card.suite != "local" and not missing and not counts
    faults = [*missing, *counts, *broken, *([] if as_published else leaks)]
    return Report(name, reports, faults, [*(leaks if as_published else []), *notes])


def _image_faults(lists: Mapping[str, ImageList]) -> tuple[list[str], list[str], list[str]]:
    """Says which files are unreadable or in two parts; which pixels are so under two names; what else is alike."""
    where: dict[Path, tuple[ImageList, int]] = {}
    kinds: dict[Path, set[str]] = defaultdict(set)
    labels: dict[Path, set[bytes]] = defaultdict(set)
    for stem, images in lists.items():
        for position, path in enumerate(images.paths):
            where.setdefault(images.folder / path, (images, position))
            kinds[images.folder / path].add(_kind(stem))
            labels[images.folder / path].add(images.labels[position].tobytes())
    faults, same, hashes = [], defaultdict(list), {}
    for file, answer in zip(where, _looks(list(where.values())), strict=True):
        if isinstance(answer, DataError):
            faults.append(str(answer))
        else:
            same[answer[0]].append(file)
            hashes[answer[0]] = answer[1]
    if len(faults) > _NAMED:
        faults[_NAMED:] = [f"{len(faults) - _NAMED:,} further images cannot be decoded"]
    groups = list(same.values())
    leaks = _leaks([files for files in groups if len(files) > 1], kinds)
    torn = [files for files in groups if len(set[bytes]().union(*(labels[file] for file in files))) > 1]
    if torn:
        leaks.append(_told(len(torn), "an image has several labels", torn[0][0], torn[0][-1]))
    near = _near(groups, np.array([hashes[digest] for digest in same], dtype=np.uint64), kinds)
    return faults + _leaks([[file] for file in where], kinds), leaks, _repeated(groups, kinds) + near


def _told(times: int, text: str, *example: Path) -> str:
    return f"{times:,} times {text}, for instance {' and '.join(str(file) for file in dict.fromkeys(example))}"


def _kind(stem: str) -> str:
    """Names the part that a list plays; ``"both"`` is a list of training and validation images."""
    if stem.startswith("train") and "held out" not in stem:
        return "both" if "val" in stem else "train"
    return "val" if stem.startswith(("val", "train")) else "test"


def _looks(images: Sequence[tuple[ImageList, int]]) -> Iterator[tuple[bytes, int] | DataError]:
    """Yields two hashes of each image, of its pixels and of its looks, or why it cannot be decoded."""

    def look(image: tuple[ImageList, int]) -> tuple[bytes, int] | DataError:
        try:
            decoded = image[0].decode(image[1])
        except DataError as error:
            return error
        pixels = repr(decoded.size).encode() + decoded.tobytes()
        looks = decoded.seen() if isinstance(decoded, Raster) else decoded
        return hashlib.blake2b(pixels, digest_size=16).digest(), perceptual_hash(looks)

    return in_threads(look, images, "Decoding")


def perceptual_hash(image: Image.Image) -> int:
    """The 64-bit hash pHash (Zauner, 2010): which of the 8×8 lowest frequencies of an image lie above their median.

    Of its grey values at 32×32, whatever size and mode; hardly changed by scaling or compressing it again.
    """
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    low = dctn(grey)[:8, :8]
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def near_pairs(hashes: NDArray[np.uint64], distance: int) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Finds which of N different hashes differ in few bits, in [0, 63]; compares those that agree in a band of bits.

    Of ``distance + 1`` bands at least one is free of ``distance`` differences. Yields positions (i, j) of pairs, int64
    (P,) each, no i twice; the same pair may come again, in either order.
    """
    for low, high in pairwise(np.linspace(0, 64, distance + 2).astype(int).tolist()):
        band = hashes >> np.uint64(low) & np.uint64((1 << high - low) - 1)
        order = np.argsort(band)
        band, left, step = band[order], np.arange(len(order)), 0
        while len(left):
            step += 1
            left = left[left + step < len(order)]
            left = left[band[left] == band[left + step]]
            first, second = order[left], order[left + step]
            close = np.bitwise_count(hashes[first] ^ hashes[second]) <= distance
            yield first[close], second[close]


def _near(groups: Sequence[Sequence[Path]], hashes: NDArray[np.uint64], kinds: Mapping[Path, set[str]]) -> list[str]:
    """Finds what looks nearly like another image of a part, or of one that must be disjoint; a group is one image."""
    names = list(_WORDS)
    member = np.array([[any(kind in kinds[file] for file in files) for kind in names] for files in groups], dtype=bool)
    values, place = np.unique(hashes, return_inverse=True)
    count = np.zeros((len(values), len(names)), dtype=np.int64)
    np.add.at(count, place, member)
    beside = np.zeros_like(count, dtype=bool)
    for first, second in near_pairs(values, NEAR):
        beside[first] |= count[second] > 0
        beside[second] |= count[first] > 0
    notes = []
    within = [(kind, {kind}, f"another {_WORDS[kind]} image") for kind in _parts(kinds)]
    for inner, outer, text in [*_DISJOINT, *within]:
        held, used = names.index(inner), [names.index(name) for name in outer]
        alike = count[place][:, used] - (member[:, used] if inner in outer else 0) > 0
        found = np.flatnonzero(member[:, held] & (alike | beside[place][:, used]).any(axis=1))
        if inner not in outer:  # an image that is in both is the same, and not nearly so
            found = found[~member[found][:, used].any(axis=1)]
        if len(found):
            one = found[0]
            close = (np.bitwise_count(hashes ^ hashes[one]) <= NEAR) & member[:, used].any(axis=1)
            close[one] = False
            example = groups[one][0], groups[int(close.argmax())][0]
            notes.append(
                _told(
                    len(found), f"a {_WORDS[inner]} image looks nearly like {text} (pHash, {NEAR} of 64 bits)", *example
                )
            )
    return notes


def _repeated(groups: Sequence[Sequence[Path]], kinds: Mapping[Path, set[str]]) -> list[str]:
    notes = []
    for kind in _parts(kinds):
        copies = ([file for file in files if kind in kinds[file]] for files in groups)
        if repeated := [files for files in copies if len(files) > 1]:
            notes.append(_told(len(repeated), f"a {_WORDS[kind]} image is there twice", *repeated[0][:2]))
    return notes


def _parts(kinds: Mapping[Path, set[str]]) -> list[str]:
    """The parts that there are; a list of training and validation images repeats what their own lists hold."""
    found = set[str]().union(*kinds.values())
    return [kind for kind in _WORDS if kind in found and not (kind == "both" and "train" in found)]


def _leaks(groups: Iterable[Sequence[Path]], kinds: Mapping[Path, set[str]]) -> list[str]:
    """Finds what is in two parts that must be disjoint; the files of a group are the same image."""
    faults = []
    for inner, outer, text in _DISJOINT:
        pairs = []
        for files in groups:
            held = [file for file in files if inner in kinds[file]]
            used = [file for file in files if kinds[file] & outer and (len(files) == 1 or file not in held)]
            if held and used:
                pairs.append((held[0], used[0]))
        if pairs:
            faults.append(_told(len(pairs), f"a {_WORDS[inner]} image is {text} too", *pairs[0]))
    return faults
