"""ImageNet-1k and the test sets that share its classes: V2, R, A, Sketch, ObjectNet, ImageNet-C."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from vpt.argument_types import checked
from vpt.data.catalog.cards import Card, find_card
from vpt.data.catalog.classes import Groups, ids_sha256, imagenet_names, imagenet_wnids, objectnet_folders, subset_ids
from vpt.data.corruptions import CORRUPTIONS, SEVERITIES
from vpt.data.datamodule import ImageDataModule
from vpt.data.datasets.published_files import check_count, find_folder, hold_out, image_list
from vpt.data.images import ImageList, LeftOut, list_folder
from vpt.data.list_files import read_table, whole_number
from vpt.data.splits import Split, listed_split, no_split
from vpt.data.transforms import Preset, get_preset
from vpt.errors import ConfigError, DataError, UnknownNameError
from vpt.image_size import GivenSize, as_size, sides

NATIVE_SIZE = 224  # of ImageNet-C
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
_HELD_OUT = 50  # one in fifty: 25,624 of 1,281,167


class ImageNetDataModule(ImageDataModule):
    """ImageNet-1k, or a test set that shares its classes, and further such sets as shifts.

    Labels are ImageNet-1k ids 0..999 in ILSVRC order whatever the set, so that one head of 1,000 logits serves all.
    Where only some ids are classes, :meth:`groups` says which: accuracy is taken after the others are masked.

    Only ImageNet-1k has training images, and they are read only with ``train="train"``: one in fifty of them is held
    out to validate on, and ILSVRC's validation set is the test set. All others are test sets and cannot be trained on;
    ObjectNet's licence forbids it.
    """

    @checked
    def __init__(
        self,
        variant: str = "imagenet_1k",
        root: str | Path | None = None,
        shifts: list[str] | None = None,
        train: str | None = None,
        preset: str = "timm",
        image_size: int | list[int] = 224,
        crop_border: bool = True,
        allow_partial: bool = False,
        **options: Any,
    ) -> None:
        """Lists the images; decodes none.

        Args:
            variant: What is tested on: ``"imagenet_1k"``, ``"imagenet_v2"``, ``"imagenet_r"``, ``"imagenet_a"``,
                ``"imagenet_sketch"``, ``"objectnet"``, ``"flickr_in1k_1000"``, or ImageNet-C with kind and severity,
                e.g. ``"imagenet_c-fog-3"``.
            root: Folder of all datasets; None for :func:`vpt.data.default_root`.
            shifts: Further test sets, named likewise; ``"imagenet_c"`` for all its 95.
            train: ``"train"`` to read ImageNet-1k's training images, None for test images only.
            preset: Name of the preprocessing (:data:`vpt.data.transforms.PRESETS`). Images of ImageNet-C are 224×224
                crops already: of the preset they take kernel and normalisation, and are not cropped again.
            image_size: Pixels of the images, or [height, width]; ImageNet-C is not enlarged.
            crop_border: Cut the red border off ObjectNet's images (2 pixels on each side) before they are resized.
            allow_partial: Accept sets of another size than the official one.
            **options: See :class:`ImageDataModule`.
        """
        chosen = get_preset(preset)
        names = [variant, *expand(shifts or [])]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"The test set {twice[0]} is named twice: remove one.")
        if max(sides(as_size(image_size))) > NATIVE_SIZE and any(parse(name)[0] == "imagenet_c" for name in names):
            raise ConfigError(
                f"image_size is {image_size}, ImageNet-C has {NATIVE_SIZE}×{NATIVE_SIZE} pixels: enlarging changes the "
                f"corruption; use a backbone of {NATIVE_SIZE} pixels or fewer."
            )
        sets = {name: read_test_set(name, root, crop_border, allow_partial) for name in names}
        card = find_card(parse(variant)[0])
        splits, complete = _training(card, root, train, chosen, image_size, allow_partial)
        self.crop_border = crop_border
        self.partial = not (complete and all(each.complete for each in sets.values()))
        self._groups: dict[str, Groups | None] = {}
        for name, found in sets.items():
            split, source = ("test", f"{variant}/test") if name == variant else (name, name)
            native = parse(name)[0] == "imagenet_c"  # crops already, which are not cropped again
            how = replace(chosen, resize="square", crop_fraction=1.0) if native else chosen
            splits[split] = listed_split(source, found.images, how, image_size)
            self._groups[split] = found.groups
        super().__init__(variant, imagenet_names(), splits, preset, image_size, card=card, **options)

    def groups(self, name: str = "test") -> Groups | None:
        """Says which of the 1,000 ids are classes of a split; None where all are.

        One tuple of ids a class, its label first; of several ids the largest logit counts (ObjectNet).
        """
        return self._groups.get(name)

    def outline(self) -> dict[str, Any]:
        """Adds how complete the data are, which classes count and what was cut off."""
        described = super().outline()
        tested = {name: groups for name, groups in self._groups.items() if groups is not None}
        cropped = any("objectnet" in split.source for split in self._splits.values())
        return described | {
            "complete": not self.partial,
            "classes": {
                name: {"number": len(groups), "ids_sha256": ids_sha256(each for group in groups for each in group)}
                for name, groups in tested.items()
            },
            "crop_border": self.crop_border if cropped else None,
        }


def _training(
    card: Card, root: str | Path | None, train: str | None, preset: Preset, image_size: GivenSize, allow_partial: bool
) -> tuple[dict[str, Split], bool]:
    """The splits train and val, and whether they are complete: ImageNet-1k's if asked for, else ones that refuse."""
    if "no-training" in card.restrictions:
        why = f"{card.title} must never be trained on, its licence says: use it as a test set or shift."
    elif card.name != "imagenet_1k":
        why = f"{card.title} is a test set: train on variant=imagenet_1k and test on it."
    else:
        why = "ImageNet-1k's training images are read with train=train only: set it to fit or validate."
    if train is None:
        return {name: no_split(f"{card.name}/no-{name}", why) for name in ("train", "val")}, True
    if card.name != "imagenet_1k":
        raise ConfigError(why)
    if train != "train":
        raise ConfigError(f"train is {train!r}: ImageNet-1k has one list to train on, 'train'.")
    labels = {wnid: label for label, wnid in enumerate(imagenet_wnids())}
    images = class_images(home(card, root) / "train", labels, card, allow_partial)
    official = card.sizes["train"] + card.sizes["val"]
    complete = check_count(f"{card.name}/train", len(images), official, allow_partial)
    parts = zip(("train", "val"), hold_out(images, _HELD_OUT), strict=True)
    return {name: listed_split(f"{card.name}/{name}", part, preset, image_size) for name, part in parts}, complete


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
        """Decodes one image to RGB and cuts `BORDER` pixels off each side, before anything is resized."""
        image = cast("Image.Image", super().decode(position))
        if min(image.size) <= 2 * BORDER:
            raise DataError(f"{self.folder / self.paths[position]} has {image.size} pixels, no more than its border.")
        return image.crop((BORDER, BORDER, image.width - BORDER, image.height - BORDER))


@dataclass(frozen=True)
class ImageNetSet:
    """A test set whose labels are ImageNet-1k ids; of a class that matches several, the smallest.

    `groups` are one tuple of ids a class, its label first, or None where all 1,000 are classes; `complete` says whether
    it has the official number of images.
    """

    name: str
    images: ImageList
    groups: Groups | None
    complete: bool


def parse(variant: str) -> tuple[str, str, int]:
    """Splits a name such as ``"imagenet_c-fog-3"`` into card, kind and severity; ``""`` and 0 for other sets.

    An UnknownNameError where one of the three does not exist, and a DataError where kind or severity are missing.
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
    """Replaces ``"imagenet_c"`` by its 95 sets, all kinds at all severities."""
    sets = [f"imagenet_c-{kind}-{severity}" for kind in CORRUPTIONS for severity in SEVERITIES]
    return [name for variant in variants for name in (sets if variant == "imagenet_c" else [variant])]


def present_sets(card: Card, root: str | Path | None) -> list[str]:
    """Says which of ImageNet-C's 95 sets are there, named as for `parse`; a DataError where there is none."""
    folder = home(card, root)
    found = [name for name in expand([card.name]) if any((folder / "/".join(name.split("-")[1:])).glob("*/*"))]
    if not found:
        raise DataError(f"{folder} holds none of the sets; the expected layout is\n{card.layout.rstrip()}")
    return found


def read_test_set(variant: str, root: str | Path | None, crop_border: bool, allow_partial: bool) -> ImageNetSet:
    """Finds a test set, named as for `parse`, and lists its images; the arguments are those of `ImageNetDataModule`."""
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
    """Finds the folder of a variant; the message of the DataError shows the expected tree."""
    folder, needed = _HOMES[card.name]
    return find_folder(card, root, folder, [needed])


def class_images(
    folder: Path, labels: Mapping[str, int], card: Card, allow_partial: bool, kind: type[FolderImages] = FolderImages
) -> ImageList:
    """Lists the images of class folders; the label is that of the folder's name, never its place in an order.

    A DataError where a class folder is unknown; or it is missing or empty, and that is not accepted.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist; the expected layout is\n{card.layout.rstrip()}")
    left = LeftOut()
    found = {path.name for path in list_folder(folder, left)[0]}
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
    names = {
        name: sorted(path.rpartition(os.sep)[2] for path in list_folder(folder / name, left)[1]) for _, name in present
    }
    empty = [name for name in names if not names[name]]
    if empty and not allow_partial:
        raise DataError(f"{folder / empty[0]} is a class folder without images; unpack the archive again.")
    left.warn(folder)
    paths = [f"{name}/{each}" for name in names for each in names[name]]
    images = image_list(folder, folder, paths, [labels[name] for name in names for _ in names[name]])
    return kind(folder, folder, paths, images.labels, ())


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
    file, column = folder / "labels.csv", "in1k_index_0based"
    table, lines = read_table(file, ["file", column])
    labels = [whole_number(text) for text in table[column]]
    if None in labels:
        odd = labels.index(None)
        raise DataError(f"{file}, line {lines[odd]}: {table[column][odd]!r} is no whole number; get the file again.")
    images = image_list(file, folder, table["file"], [label or 0 for label in labels], lines)
    images.check_labels(1000)
    return images
