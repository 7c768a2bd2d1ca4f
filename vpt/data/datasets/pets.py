"""Oxford-IIIT Pet as segmentation: the trimaps that come with the photographs, as their authors publish them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

from vpt.argument_types import checked
from vpt.data.catalog.cards import find_card
from vpt.data.datasets.published_files import check_count, find_folder, image_list
from vpt.data.images import ImageList
from vpt.data.list_files import read_text, whole_number
from vpt.data.masks import IGNORED, MaskDataModule, MaskList, MaskSplit, decoded_masks
from vpt.data.splits import hold_out, listed_split
from vpt.data.transforms import get_preset
from vpt.errors import DataError, UnknownNameError

_NAME = "oxford_pet_trimaps"
_CLASSES = ("background", "pet", "border")
_BREEDS = 37
_TRIMAP = {2: 0, 1: 1, 3: 2}
_MEANING = "1 (pet), 2 (background) and 3 (border)"
_TRAIN, _BORDER = ("train", "trainval"), ("class", "ignore")


class PetTrimapsDataModule(MaskDataModule):
    """Photographs of 37 breeds of cats and dogs with the class of every pixel.

    A trimap says 1 for the pet, 2 for the background and 3 for the border between them, which is also everything that
    its authors could not tell. Here they are the classes 1 (``pet``), 0 (``background``) and 2 (``border``).
    """

    @checked
    def __init__(
        self,
        root: str | Path | None = None,
        train: Literal["train", "trainval"] = "train",
        border: Literal["class", "ignore"] = "class",
        val_fraction: float = 0.2,
        split_seed: int = 0,
        preset: str = "square",
        image_size: int | list[int] = 224,
        allow_partial: bool = False,
        **options: Any,
    ) -> None:
        """Reads the two official lists; decodes nothing.

        Args:
            root: Folder of all datasets; None for :func:`vpt.data.default_root`.
            train: ``"train"`` leaves the validation images out of the official ``trainval``, ``"trainval"`` does not.
            border: ``"class"``, a third class, as most papers count it; or ``"ignore"``, neither trained nor measured.
            val_fraction: Share of each breed of ``trainval`` to validate on, in (0, 1); the authors give no such part.
            split_seed: Chooses which; not the seed of the run.
            preset: Name of the preprocessing; masks are resized as the images, by nearest neighbour.
            image_size: Pixels of the images, or [height, width].
            allow_partial: Accept another number of images than the official one.
            **options: See :class:`MaskDataModule`.
        """
        for kind, value, known in (("list of the pets", train, _TRAIN), ("treatment of borders", border, _BORDER)):
            if value not in known:
                raise UnknownNameError(kind, value, known)
        card = find_card(_NAME)
        needed = ["images", "annotations/trimaps", "annotations/trainval.txt", "annotations/test.txt"]
        folder = find_folder(card, root, "oxford-iiit-pet", needed)
        official = {stem: read_list(folder / "annotations" / f"{stem}.txt", folder) for stem in ("trainval", "test")}
        counts = [check_count(f"{_NAME}/{k}", len(v), card.sizes[k], allow_partial) for k, v in official.items()]
        self.partial = not all(counts)
        both, classes = official["trainval"], dict(_TRIMAP) | ({3: IGNORED} if border == "ignore" else {})
        rest, held = hold_out(both.paths, both.labels, val_fraction, split_seed)
        chosen = get_preset(preset)

        def split(stem: str, images: ImageList) -> MaskSplit:
            base, trimaps = listed_split(f"{_NAME}/{stem}", images, chosen, image_size), _trimaps(images, classes)
            masks = partial(decoded_masks, trimaps, chosen, image_size)
            return MaskSplit(**vars(base), masks=masks, mask_contents=trimaps.contents)

        splits = {
            "train": split(train, both.take(rest) if train == "train" else both),
            "val": split("val", both.take(held)),
            "test": split("test", official["test"]),
        }
        names = _CLASSES[: 2 if border == "ignore" else 3]
        super().__init__(_NAME, names, splits, preset, image_size, card=card, **options)


def read_list(file: Path, folder: Path) -> ImageList:
    """Reads a list of ``name class species breed``, as its authors publish it; images are ``images/<name>.jpg``.

    The 37 labels begin at 0. A DataError where it is unreadable, empty or malformed, or an image is listed twice.
    """
    paths, labels, lines = [], [], []
    for line, content in enumerate(read_text(file).splitlines(), start=1):
        if not content.strip() or content.startswith("#"):
            continue
        name, *numbers = content.split()
        breed = whole_number(numbers[0]) if len(numbers) == 3 else None
        if breed is None or not 1 <= breed <= _BREEDS:
            raise DataError(
                f"{file}, line {line}: expected 'name class species breed' with a class in 1..{_BREEDS}, "
                f"found {content!r}."
            )
        paths.append(f"images/{name}.jpg")
        labels.append(breed - 1)
        lines.append(line)
    return image_list(file, folder, paths, labels, lines)


def _trimaps(images: ImageList, classes: dict[int, int]) -> MaskList:
    paths = [f"annotations/trimaps/{Path(path).stem}.png" for path in images.paths]
    listed = vars(images) | {"paths": paths}
    return MaskList(**listed, images=images.paths, classes=classes, meaning=_MEANING)
