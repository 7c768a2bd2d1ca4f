"""ImageNet-1k and the test sets that share its classes: V2, R, A, Sketch, ObjectNet, ImageNet-C."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from vpt.data.cache import decoded
from vpt.data.catalog.cards import Card, load_card
from vpt.data.catalog.classes import Groups, ids_sha256, imagenet_names, imagenet_wnids
from vpt.data.datasets.imagenet_readers import ImageNetSet, class_images, expand, home, parse, read_test_set
from vpt.data.datasets.published_folder import check_count, hold_out, no_split
from vpt.data.datasets.vtab import default_root
from vpt.data.images import ImageList
from vpt.data.module import ImageDataModule, Split
from vpt.data.transforms import Preset, get_preset
from vpt.errors import ConfigError, DataError

NATIVE_SIZE = 224  # of ImageNet-C
_HELD_OUT = 50  # one in fifty: 25,624 of 1,281,167


class ImageNetDataModule(ImageDataModule):
    """ImageNet-1k, or a test set that shares its classes, and further such sets as shifts.

    Labels are ImageNet-1k ids 0..999 in ILSVRC order whatever the set, so that one head of 1,000 logits serves all.
    Where only some ids are classes, :meth:`groups` says which: accuracy is taken after the others are masked.

    Only ImageNet-1k has training images, and they are read only with ``train="train"``: one in fifty of them is held
    out to validate on (`published_folder.hold_out`), and ILSVRC's validation set is the test set. All others
    are test sets and cannot be trained on; ObjectNet's licence forbids it.

    Attributes:
        partial: True if some set has not the official number of images.
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
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        augment: str = "none",
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
            batch_size: Images in a batch.
            num_workers: Loader processes; 0 loads in the main process.
            seed: Seed of order and augmentation of the training images.
            augment: Name of the training augmentation (:data:`vpt.data.transforms.AUGMENTATIONS`).
            crop_border: Cut the red border off ObjectNet's images (2 pixels on each side) before they are resized.
            allow_partial: Accept sets of another size than the official one.
            **options: Few-shot subsets, see :class:`ImageDataModule`.

        Raises:
            DataError: A folder is missing, laid out otherwise or incomplete.
            UnknownNameError: Variant, preset or augmentation is unknown.
            ConfigError: A number is out of range, ImageNet-C would be enlarged, or a test set would be trained on.
        """
        base = (Path(root) if root is not None else default_root()).expanduser()
        chosen = get_preset(preset)
        names = [variant, *expand(shifts or [])]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"The test set {twice[0]} is named twice: remove one.")
        sets = [self._read(name, base, image_size, crop_border, allow_partial) for name in names]
        card = _card(variant)
        splits, complete = _training(card, base, train, chosen, image_size, allow_partial)
        splits["test"] = _split(f"{variant}/test", sets[0].images, _preset(variant, chosen), image_size)
        for item in sets[1:]:
            splits[item.name] = _split(item.name, item.images, _preset(item.name, chosen), image_size)
        self.crop_border = crop_border
        self.partial = not (complete and all(item.complete for item in sets))
        self._groups = dict(zip(["test", *names[1:]], [item.groups for item in sets], strict=True))
        super().__init__(
            variant,
            imagenet_names(),
            splits,
            preset,
            image_size,
            batch_size,
            num_workers,
            seed,
            augment,
            card,
            **options,
        )

    @staticmethod
    def _read(variant: str, root: Path, image_size: int, crop_border: bool, allow_partial: bool) -> ImageNetSet:
        card = _card(variant)
        if card.name == "imagenet_c" and image_size > NATIVE_SIZE:
            raise ConfigError(
                f"image_size is {image_size}, ImageNet-C has {NATIVE_SIZE}×{NATIVE_SIZE} pixels: enlarging changes the "
                f"corruption; use a backbone of {NATIVE_SIZE} pixels or fewer."
            )
        return read_test_set(variant, card, root, crop_border, allow_partial)

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
            "partial": self.partial,
            "classes": {
                name: {"number": len(groups), "ids_sha256": ids_sha256(each for group in groups for each in group)}
                for name, groups in tested.items()
            },
            "crop_border": self.crop_border if cropped else None,
        }


def _card(variant: str) -> Card:
    card = load_card(parse(variant)[0])
    if card is None:
        raise DataError(f"{variant} has no card in vpt/data/catalog/cards.")
    return card


def _preset(variant: str, preset: Preset) -> Preset:
    """The preset of a set; one whose images are crops already is not cropped again."""
    native = parse(variant)[0] == "imagenet_c"
    return replace(preset, resize="square", crop_fraction=1.0) if native else preset


def _split(source: str, images: ImageList, preset: Preset, image_size: int) -> Split:
    pixels = partial(decoded, images, preset, image_size)
    return Split(source, images.paths, images.labels, images.fingerprint, pixels)


def _training(
    card: Card, root: Path, train: str | None, preset: Preset, image_size: int, allow_partial: bool
) -> tuple[dict[str, Split], bool]:
    """The splits train and val, and whether they are complete: ImageNet-1k's if asked for, else ones that refuse."""
    if card.name != "imagenet_1k":
        why = (
            f"{card.title} must never be trained on, its licence says: use it as a test set or shift."
            if "no-training" in card.restrictions
            else f"{card.title} is a test set: train on variant=imagenet_1k and test on it."
        )
        if train is not None:
            raise ConfigError(why)
        return {name: no_split(f"{card.name}/no-{name}", why) for name in ("train", "val")}, True
    if train is None:
        why = "ImageNet-1k's training images are read with train=train only: set it to fit or validate."
        return {name: no_split(f"{card.name}/no-{name}", why) for name in ("train", "val")}, True
    if train != "train":
        raise ConfigError(f"train is {train!r}: ImageNet-1k has one list to train on, 'train'.")
    labels = {wnid: label for label, wnid in enumerate(imagenet_wnids())}
    images = class_images(home(card, root) / "train", labels, card, allow_partial)
    official = card.sizes["train"] + card.sizes["val"]
    complete = check_count(f"{card.name}/train", len(images.paths), official, allow_partial)
    kept, held = hold_out(images, _HELD_OUT)
    parts = {"train": kept, "val": held}
    return {name: _split(f"{card.name}/{name}", part, preset, image_size) for name, part in parts.items()}, complete
