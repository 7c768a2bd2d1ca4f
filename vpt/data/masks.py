"""Images with masks: a class for every pixel, resized together with its image and read beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from vpt.argument_types import checked
from vpt.data.cache.content_hashes import Hashes, content_hash
from vpt.data.cache.image_cache import Images, decoded
from vpt.data.catalog.cards import Card
from vpt.data.datamodule import ImageDataModule
from vpt.data.image_dataset import Batch, ImageDataset
from vpt.data.images import ImageList
from vpt.data.splits import Split, rows_of
from vpt.data.transforms import Preset
from vpt.errors import ConfigError, DataError
from vpt.image_size import GivenSize, as_size

IGNORED = 255
"""The class of pixels that count for nothing."""

_UNKNOWN = 254
_ONE_CHANNEL = ("1", "L", "P")


@dataclass(frozen=True)
class MaskSplit(Split):
    """Images and their masks.

    Attributes:
        masks: Returns the masks, uint8 (height, width) each: classes, and `IGNORED`; or those at `positions`.
        mask_contents: Returns the hash of each mask, uint8 (N, 16).
    """

    masks: Callable[..., Images] = field(kw_only=True)
    mask_contents: Callable[[], Hashes] = field(kw_only=True)

    def take(self, positions: NDArray[np.int64]) -> MaskSplit:
        """See `Split`."""
        part = cast("MaskSplit", super().take(positions))
        masks, contents = partial(self.masks, positions=positions), partial(rows_of, self.mask_contents, positions)
        return replace(part, masks=masks, mask_contents=contents)

    def _hashed(self) -> list[bytes]:
        return [*super()._hashed(), self.mask_contents().tobytes()]


class MaskDataset(ImageDataset):
    """The images and masks, uint8 (H, W) each, of one split, decoded.

    ``dataset[i]`` is ``{"image": uint8 tensor (3, H, W), "mask": uint8 tensor (H, W), "index": i}``.
    """

    masks: Images

    def _open(self) -> None:
        super()._open()
        self.masks = cast("MaskSplit", self._split).masks()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != "masks"}

    def batch(self, items: Sequence[int | tuple[int, int]]) -> Batch:
        """Returns B items at once: ``image`` uint8 (B, 3, H, W), ``mask`` uint8 (B, H, W), ``index`` int64 (B,)."""
        found = super().batch(items)
        masks = np.stack([self.masks[index] for index in found["index"].tolist()])
        return {"image": found["image"], "mask": torch.from_numpy(masks), "index": found["index"]}


class MaskDataModule(ImageDataModule):
    """Images with masks in named splits; a subclass says which.

    Batches are ``{"image": uint8 (B, 3, H, W), "mask": uint8 (B, H, W), "index": int64 (B,)}``. There is no
    augmentation, which would have to move masks along.
    """

    _dataset_class = MaskDataset
    _labelled = False

    @checked
    def __init__(
        self,
        name: str,
        class_names: Sequence[str],
        splits: Mapping[str, MaskSplit],
        preset: str,
        image_size: GivenSize,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int | None = None,
        card: Card | None = None,
    ) -> None:
        """Keeps the description; reads no image. Arguments are those of :class:`ImageDataModule`.

        There are fewer than 254 classes, background included; masks are resized by nearest neighbour.
        """
        if len(class_names) >= _UNKNOWN:
            raise ConfigError(f"Masks of 8 bits hold fewer than {_UNKNOWN} classes, got {len(class_names)}.")
        super().__init__(name, class_names, splits, preset, image_size, batch_size, num_workers, seed, card=card)


@dataclass(frozen=True)
class MaskList(ImageList):
    """Masks in files of one channel, decoded to classes in three equal ones, as the image cache keeps them.

    A mask lies over the pixels that its image's file stores, and is turned upright with them.

    Attributes:
        images: N paths of the images that they belong to.
        classes: Class of each value that a pixel may have.
        meaning: What the values are, for messages.
    """

    images: Sequence[str]
    classes: Mapping[int, int]
    meaning: str

    @property
    def title(self) -> str:
        """As of the images, marked."""
        return f"{super().title}-masks"

    def take(self, positions: NDArray[np.int64]) -> MaskList:
        """Returns the masks at some positions, int64 (M,)."""
        part = cast("MaskList", super().take(positions))
        return replace(part, images=[self.images[position] for position in positions])

    @property
    def _made_of(self) -> str:
        return f"masks {sorted(self.classes.items())}"

    def _files(self) -> Iterator[str]:
        folder = str(self.folder.resolve())
        return chain(super()._files(), (f"{folder}/{path}" for path in self.images))

    def files_of(self, position: int) -> tuple[Path, ...]:
        """Mask and image."""
        return (*super().files_of(position), self.folder / self.images[position])

    def _content(self, position: int) -> bytes:
        return content_hash(super()._content(position), (self.folder / self.images[position]).read_bytes())

    def decode(self, position: int) -> Image.Image:
        """Decodes one mask to RGB of three equal channels, each the class of a pixel, upright as its image.

        A DataError where it is missing, damaged, no mask, of another size than its image, or of a value that means
        nothing.
        """
        path = self.folder / self.paths[position]
        try:
            with Image.open(path) as file:
                mode, values = file.mode, np.asarray(file)
            with Image.open(self.folder / self.images[position]) as image:
                size, orientation = image.size, image.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception as error:  # PIL raises a dozen unrelated types on damaged files
            raise self.fault(position, error) from error
        where = self._where(position)
        if mode not in _ONE_CHANNEL:
            raise DataError(f"{where}{path} is a {mode} image; a mask has one channel of 8 bits: convert it.")
        if values.shape != size[::-1]:
            raise DataError(
                f"{where}{path} has {values.shape[1]}×{values.shape[0]} pixels, its image {self.images[position]} "
                f"{size[0]}×{size[1]}: both must have the same size."
            )
        table = np.full(256, _UNKNOWN, dtype=np.uint8)
        table[list(self.classes)] = list(self.classes.values())
        classes = table[values.astype(np.uint8)]
        if (classes == _UNKNOWN).any():
            row, column = np.argwhere(classes == _UNKNOWN)[0]
            raise DataError(
                f"{where}{path} has the value {int(values[row, column])} in row {row}, column {column}; known are "
                f"{self.meaning}: restore the file."
            )
        mask = Image.fromarray(classes).convert("RGB")
        mask.getexif()[ExifTags.Base.Orientation] = orientation
        return ImageOps.exif_transpose(mask)


@dataclass(frozen=True)
class _OneChannel:
    """Masks out of images of three equal channels."""

    images: Images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> NDArray[np.uint8]:
        return cast("NDArray[np.uint8]", self.images[position][0])


def decoded_masks(
    masks: MaskList, preset: Preset, image_size: GivenSize, positions: NDArray[np.int64] | None = None
) -> Images:
    """Returns a list's masks, or those at positions, resized by nearest neighbour to where the preset puts the images.

    They are uint8 (height, width) each; errors as of `MaskList.decode` and `vpt.data.cache.image_cache.decoded`.
    """
    nearest = replace(preset, name=f"{preset.name}-nearest", interpolation="nearest", fill=(IGNORED,) * 3)
    return _OneChannel(decoded(masks, nearest, as_size(image_size), positions))
