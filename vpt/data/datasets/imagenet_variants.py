"""ImageNet-1k and its test sets as their authors publish them: which folder is which class."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from vpt.data.catalog.cards import Card, find_card
from vpt.data.catalog.classes import Groups, imagenet_wnids, objectnet_folders, subset_ids
from vpt.data.corruptions import CORRUPTIONS, SEVERITIES
from vpt.data.datasets.published_files import check_count, find_folder, image_list
from vpt.data.images import ImageList
from vpt.errors import DataError, UnknownNameError

BORDER = 2  # pixels; the red border is one pixel wide, JPEG smears it
_WNID = re.compile(r"n\d{8}")

# Variant -> the folder that the authors' archive unpacks to, and what must be in it.
_HOMES = {
    "imagenet_1k": ("imagenet", "val"),
    "imagenet_v2": ("imagenetv2-matched-frequency-format-val", ""),
    "imagenet_r": ("imagenet-r", ""),
    "imagenet_a": ("imagenet-a", ""),
    "imagenet_sketch": ("sketch", ""),
    "objectnet": ("objectnet-1.0", "images"),
    "imagenet_c": ("imagenet-c", ""),
    "flickr_in1k_1000": ("flickr_in1k_1000", "labels.csv"),
}
VARIANTS = tuple(_HOMES)
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})


class FolderImages(ImageList):
    """Images that were found in folders and not in a list file."""

    @property
    def _remedy(self) -> str:
        return "restore the file from the archive"


class BorderCropped(FolderImages):
    """ObjectNet without the red border that its licence puts around each image."""

    @property
    def _made_of(self) -> str:
        return f"without a border of {BORDER}"

    def decode(self, position: int) -> Image.Image:
        """Decodes one image to RGB and cuts `BORDER` pixels off each side, before anything is resized.

        Args:
            position: 0..N-1.

        Raises:
            DataError: The file is missing, truncated or not an image, or nothing is left of it.
        """
        image = super().decode(position)
        if min(image.size) <= 2 * BORDER:
            raise DataError(f"{self.folder / self.paths[position]} has {image.size} pixels, no more than its border.")
        return image.crop((BORDER, BORDER, image.width - BORDER, image.height - BORDER))


@dataclass(frozen=True)
class ImageNetSet:
    """A test set with ImageNet-1k labels.

    Attributes:
        name: The variant, for ImageNet-C with kind and severity: ``"imagenet_c-fog-3"``.
        images: Labels are ImageNet-1k ids; of a class that matches several, the smallest.
        groups: One tuple of ImageNet-1k ids a class, beginning with its label; None where all 1,000 are classes.
        complete: It has the official number of images.
    """

    name: str
    images: ImageList
    groups: Groups | None
    complete: bool


def parse(variant: str) -> tuple[str, str, int]:
    """Splits a name such as ``"imagenet_c-fog-3"``.

    Args:
        variant: A variant; of ImageNet-C with kind and severity.

    Returns:
        Name of the card, kind of corruption and severity; ``""`` and 0 where there is none.

    Raises:
        UnknownNameError: One of the three does not exist.
        DataError: Kind or severity are missing.
    """
    name, *rest = variant.split("-")
    if name not in VARIANTS:
        raise UnknownNameError("ImageNet test set", variant, VARIANTS)
    if name != "imagenet_c":
        if rest:
            raise UnknownNameError("ImageNet test set", variant, VARIANTS)
        return name, "", 0
    if len(rest) != 2:
        raise DataError(f"{variant!r} is 95 test sets: name one by kind and severity, as in 'imagenet_c-fog-3'.")
    if rest[0] not in CORRUPTIONS:
        raise UnknownNameError("kind of ImageNet-C", rest[0], CORRUPTIONS)
    if rest[1] not in map(str, SEVERITIES):
        raise UnknownNameError("severity of ImageNet-C", rest[1], [str(each) for each in SEVERITIES])
    return name, rest[0], int(rest[1])


def expand(variants: Sequence[str]) -> list[str]:
    """Replaces ``"imagenet_c"`` by its 95 sets.

    Args:
        variants: Names as for `parse`, or ``"imagenet_c"`` for all kinds at all severities.
    """
    sets = [f"imagenet_c-{kind}-{severity}" for kind in CORRUPTIONS for severity in SEVERITIES]
    return [name for variant in variants for name in (sets if variant == "imagenet_c" else [variant])]


def present_sets(card: Card, root: str | Path | None) -> list[str]:
    """Says which of ImageNet-C's 95 sets are there.

    Args:
        card: ImageNet-C's.
        root: Folder of all datasets; None for :func:`vpt.data.default_root`.

    Returns:
        Names as for `parse`, at least one.

    Raises:
        DataError: There is none.
    """
    folder = home(card, root)
    found = [name for name in expand([card.name]) if any((folder / "/".join(name.split("-")[1:])).glob("*/*"))]
    if not found:
        raise DataError(f"{folder} holds none of the sets; the expected layout is\n{card.layout.rstrip()}")
    return found


def read_test_set(variant: str, root: str | Path | None, crop_border: bool, allow_partial: bool) -> ImageNetSet:
    """Finds a test set and lists its images.

    Args:
        variant: As for `parse`.
        root: Folder of all datasets; None for :func:`vpt.data.default_root`.
        crop_border: Cut ObjectNet's border off.
        allow_partial: Accept missing class folders and another number of images.

    Raises:
        DataError: The folder is missing, laid out otherwise, or incomplete.
        UnknownNameError: There is no such variant.
    """
    name, kind, severity = parse(variant)
    card = find_card(name)
    folder = home(card, root)
    groups: Groups | None = None
    if name == "flickr_in1k_1000":
        images = _from_csv(folder)
    else:
        if name == "imagenet_v2":
            _refuse_repacked_v2(folder)
        labels, groups = _classes(name)
        inside = {"imagenet_1k": "val", "objectnet": "images", "imagenet_c": f"{kind}/{severity}"}.get(name, "")
        decoder = BorderCropped if name == "objectnet" and crop_border else FolderImages
        images = class_images(folder / inside, labels, card, allow_partial, decoder)
        if name == "imagenet_v2":
            _refuse_doubled_v2(folder, images)
    complete = check_count(variant, len(images), card.sizes["test"], allow_partial)
    return ImageNetSet(variant, images, groups, complete)


def _classes(name: str) -> tuple[dict[str, int], Groups | None]:
    """Label by folder name, and which ids count where not all do."""
    if name == "objectnet":
        matched = objectnet_folders()
        return {folder: ids[0] for folder, ids in matched.items()}, tuple(sorted(matched.values()))
    if name == "imagenet_v2":
        return {str(label): label for label in range(1000)}, None
    wnids = imagenet_wnids()
    if name in ("imagenet_a", "imagenet_r"):
        ids = subset_ids(name)
        return {wnids[label]: label for label in ids}, tuple((label,) for label in ids)
    return {wnid: label for label, wnid in enumerate(wnids)}, None


def home(card: Card, root: str | Path | None) -> Path:
    """Finds the folder of a variant.

    Args:
        card: Its card.
        root: Folder of all datasets; None for :func:`vpt.data.default_root`.

    Raises:
        DataError: It does not exist; the message shows the expected tree.
    """
    folder, needed = _HOMES[card.name]
    return find_folder(card, root, folder, [needed])


def class_images(
    folder: Path, labels: Mapping[str, int], card: Card, allow_partial: bool, kind: type[FolderImages] = FolderImages
) -> ImageList:
    """Lists the images of class folders; the label is that of the folder's name, never its place in an order.

    Args:
        folder: What holds the class folders.
        labels: Label by folder name.
        card: The dataset, for messages.
        allow_partial: Accept missing and empty folders.
        kind: What decodes the images.

    Raises:
        DataError: A class folder is missing, empty or unknown.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist; the expected layout is\n{card.layout.rstrip()}")
    found = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    unknown = sorted(found - labels.keys())
    if unknown and card.name != "objectnet":  # of whose 313 folders 200 match no class
        raise DataError(
            f"{folder / unknown[0]} is no class of {card.name}; the expected layout is\n{card.layout.rstrip()}"
        )
    missing = [name for name in labels if name not in found]
    if missing and (not allow_partial or len(missing) == len(labels)):
        raise DataError(
            f"{folder} holds {len(labels) - len(missing)} of {len(labels)} class folders, {missing[0]} is missing; "
            f"the expected layout is\n{card.layout.rstrip()}"
        )
    present = sorted((label, name) for name, label in labels.items() if name in found)
    names = {name: _image_names(folder / name) for _, name in present}
    empty = [name for name in names if not names[name]]
    if empty and not allow_partial:
        raise DataError(f"{folder / empty[0]} is a class folder without images; unpack the archive again.")
    paths = [f"{name}/{each}" for name in names for each in names[name]]
    images = image_list(folder, folder, paths, [labels[name] for name in names for _ in names[name]])
    return kind(folder, folder, paths, images.labels, ())


def _image_names(folder: Path) -> list[str]:
    """Returns the sorted names of the image files in a folder, without hidden ones."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )


def _refuse_repacked_v2(folder: Path) -> None:
    named = next((path for path in folder.iterdir() if path.is_dir() and _WNID.fullmatch(path.name)), None)
    if named is not None:
        raise DataError(
            f"{named}: ImageNet-V2's folders are the numbers 0..999, which are the labels. A copy with WordNet "
            "ids is a faulty upload with up to 20 images a class (ImageNetV2#6); get the matched-frequency archive."
        )


def _refuse_doubled_v2(folder: Path, images: ImageList) -> None:
    counts = np.bincount(images.labels)
    if counts.max() > 10:
        raise DataError(
            f"{folder / str(counts.argmax())} has {counts.max()} images, no class of ImageNet-V2 has more than 10: a "
            "copy with 20 is a faulty upload (ImageNetV2#6); get the matched-frequency archive."
        )


def _from_csv(folder: Path) -> ImageList:
    """Reads labels.csv with the columns file and in1k_index_0based."""
    file = folder / "labels.csv"
    try:
        table = pd.read_csv(file)
        images = image_list(file, folder, [str(each) for each in table["file"]], table["in1k_index_0based"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{file} is not a table with file and in1k_index_0based ({error}).") from error
    images.check_labels(1000)
    return images
