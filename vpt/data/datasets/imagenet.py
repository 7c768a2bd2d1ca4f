"""ImageNet-1k and the test sets that share its classes: V2, R, A, Sketch, ObjectNet, ImageNet-C."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from vpt.data.catalog.cards import Card, find_card
from vpt.data.catalog.classes import Groups, ids_sha256, imagenet_names, imagenet_wnids
from vpt.data.datamodule import ImageDataModule
from vpt.data.datasets.imagenet_variants import class_images, expand, home, parse, read_test_set
from vpt.data.datasets.published_files import check_count, hold_out
from vpt.data.splits import Split, listed_split, no_split
from vpt.data.transforms import Preset, get_preset
from vpt.errors import ConfigError

NATIVE_SIZE = 224  # of ImageNet-C
_HELD_OUT = 50  # one in fifty: 25,624 of 1,281,167


class ImageNetDataModule(ImageDataModule):
    """ImageNet-1k, or a test set that shares its classes, and further such sets as shifts.

    Labels are ImageNet-1k ids 0..999 in ILSVRC order whatever the set, so that one head of 1,000 logits serves all.
    Where only some ids are classes, :meth:`groups` says which: accuracy is taken after the others are masked.

    Only ImageNet-1k has training images, and they are read only with ``train="train"``: one in fifty of them is held
    out to validate on (`published.hold_out`), and ILSVRC's validation set is the test set. All others
    are test sets and cannot be trained on; ObjectNet's licence forbids it.

    Attributes:
        crop_border: ObjectNet's border is cut off.
    """

    def __init__(
        self,
        variant: str = "imagenet_1k",
        root: str | Path | None = None,
        shifts: list[str] | None = None,
        train: str | None = None,
        preset: str = "timm",
        image_size: int = 224,
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
            image_size: Side of the square images in pixels.
            crop_border: Cut the red border off ObjectNet's images (2 pixels on each side) before they are resized.
            allow_partial: Accept sets of another size than the official one.
            **options: See :class:`ImageDataModule`.

        Raises:
            DataError: A folder is missing, laid out otherwise or incomplete.
            UnknownNameError: Variant, preset or augmentation is unknown.
            ConfigError: A number is out of range, ImageNet-C would be enlarged, or a test set would be trained on.
        """
        chosen = get_preset(preset)
        names = [variant, *expand(shifts or [])]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"The test set {twice[0]} is named twice: remove one.")
        if image_size > NATIVE_SIZE and any(parse(name)[0] == "imagenet_c" for name in names):
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
            splits[split] = listed_split(source, found.images, _preset(name, chosen), image_size)
            self._groups[split] = found.groups
        super().__init__(variant, imagenet_names(), splits, preset, image_size, card=card, **options)

    def groups(self, name: str = "test") -> Groups | None:
        """Says which of the 1,000 ids are classes of a split.

        Args:
            name: A split.

        Returns:
            One tuple of ids a class, its label first; of several ids the largest logit counts (ObjectNet). None where
            all 1,000 are classes.
        """
        return self._groups.get(name)

    def describe(self) -> dict[str, Any]:
        """Says which data these are; adds how complete they are, which classes count and what was cut off."""
        described = super().describe()
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


def _preset(variant: str, preset: Preset) -> Preset:
    """The preset of a set; one whose images are crops already is not cropped again."""
    native = parse(variant)[0] == "imagenet_c"
    return replace(preset, resize="square", crop_fraction=1.0) if native else preset


def _training(
    card: Card, root: str | Path | None, train: str | None, preset: Preset, image_size: int, allow_partial: bool
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
