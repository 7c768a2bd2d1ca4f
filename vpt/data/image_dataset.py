"""The images of a split as a dataset, and the loader of its batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from vpt.data.augmentation import Augmentation
from vpt.data.cache.growing_cache import GrowingCache
from vpt.data.splits import Split
from vpt.data.transforms import centre_crop
from vpt.errors import DataError

Batch = dict[str, Any]


class ImageDataset(Dataset[Batch]):
    """The images of one split, decoded: uint8 (3, H, W) each, or float32 (C, H, W) where they have channels.

    ``dataset[i]`` is ``{"image": tensor of that, "label": int, "index": i}``. An item may also be asked for as
    ``(epoch, i)``, which is how :class:`EpochSampler` tells the epoch to the augmentation in any worker. `images` are
    an array wherever all have one size and fit the disk.
    """

    images: Any

    def __init__(self, split: Split, augmentation: Augmentation | None = None) -> None:
        self.paths = split.paths
        self.labels = split.labels
        self.augmentation = augmentation
        self._split = split
        self._open()

    def _open(self) -> None:
        whole = self.augmentation is not None and self.augmentation.before_crop
        self.images = self._split.pixels(cropped=False) if whole else self._split.pixels()

    def __getstate__(self) -> dict[str, Any]:
        kept = isinstance(self.images, GrowingCache)
        return {key: value for key, value in self.__dict__.items() if kept or key != "images"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "images" not in state:
            self._open()  # a worker process maps the cache file and is not sent its contents

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: int | tuple[int, int]) -> Batch:
        row = {key: values[0] for key, values in self.batch([item]).items()}
        return {key: value if value.ndim else int(value) for key, value in row.items()}

    def batch(self, items: Sequence[int | tuple[int, int]]) -> Batch:
        """Returns B items, by indices or pairs (epoch, index), at once, which is much faster without augmentation.

        ``image`` is uint8 (B, 3, H, W) or float32 (B, C, H, W), ``label`` and ``index`` int64 (B,).
        """
        pairs = [item if isinstance(item, tuple) else (None, item) for item in items]
        index = np.array([index for _, index in pairs], dtype=np.int64)
        if isinstance(self.images, np.ndarray) and self.augmentation is None:
            images = np.asarray(self.images[index])
        else:
            rows = self.images.rows(index) if isinstance(self.images, GrowingCache) else map(self._row, index.tolist())
            images = np.stack([self._image(image, *pair) for image, pair in zip(rows, pairs, strict=True)])
        return {
            "image": torch.from_numpy(images),
            "label": torch.from_numpy(self.labels[index]),
            "index": torch.from_numpy(index),
        }

    def _row(self, index: int) -> NDArray[Any]:
        image: NDArray[Any] = self.images[index]
        return image

    def _image(self, image: NDArray[Any], epoch: int | None, index: int) -> NDArray[Any]:
        if self.augmentation is not None:
            rows = np.ascontiguousarray(image.transpose(1, 2, 0))
            if epoch is not None:
                rows = self.augmentation(rows, epoch, index)
            else:
                rows = centre_crop(rows, self.augmentation.image_size)
            image = rows.transpose(2, 0, 1)
        return np.array(image, order="C")  # a copy: the map is read-only, tensors are not


class Batches(Dataset[Any]):
    """What a loader reads: its ``__getitems__`` gives a whole batch, where a list of items is the convention."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, items: Sequence[int | tuple[int, int]]) -> Batch | DataError:
        """A batch, or the error in its place: a worker process would hand an error over as a whole traceback."""
        try:
            return self.dataset.batch(items)
        except DataError as error:
            return error


class BatchLoader(DataLoader[Any]):
    """Loads what :class:`Batches` gives, and raises the error of an image that cannot be read."""

    def __iter__(self) -> Any:
        """Yields batches; a DataError where an image is missing or damaged."""
        for batch in super().__iter__():
            if isinstance(batch, DataError):
                raise batch
            yield batch


def as_it_is(batch: Any) -> Any:
    """What a loader makes of a whole batch."""
    return batch
