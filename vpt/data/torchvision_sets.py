"""The classification datasets of torchvision by name, read through torchvision's own class."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vpt.data.images import to_rgb
from vpt.data.subsets import part_fingerprint
from vpt.errors import DataError, UnknownNameError

_SPLITS = {"train": ("train", "trainval"), "val": ("val", "valid"), "test": ("test",)}  # words for the argument `split`
_SAMPLED = 32  # images whose pixels go into the fingerprint


@dataclass(frozen=True)
class TorchvisionList:
    """Some images of one torchvision dataset.

    Attributes:
        dataset: The dataset; ``dataset[i]`` is (PIL image, label).
        title: Dataset and split, e.g. ``"cifar10-train"``.
        positions: int64 (N,) in the dataset.
        labels: int64 (N,).
        fingerprint: sha256 of the labels and of some images, hexadecimal.
    """

    dataset: Any
    title: str
    positions: NDArray[np.int64]
    labels: NDArray[np.int64]
    fingerprint: str

    @property
    def paths(self) -> Sequence[str]:
        """A name for each image, which has none of its own."""
        return [f"{self.title}/{position:06d}" for position in self.positions]

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, positions: NDArray[np.int64]) -> TorchvisionList:
        """Returns a part of the list.

        Args:
            positions: int64 (M,), which images.
        """
        return replace(
            self,
            positions=self.positions[positions],
            labels=self.labels[positions],
            fingerprint=part_fingerprint(self.fingerprint, positions),
        )

    def decode(self, position: int) -> Image.Image:
        """Decodes one image to RGB.

        Args:
            position: 0..N-1.

        Raises:
            DataError: The image is damaged, or the dataset gives something else.
        """
        number = int(self.positions[position])
        try:
            return to_rgb(self.dataset[number][0])
        except Exception as error:  # PIL raises a dozen unrelated types on damaged files.
            raise DataError(f"Image {number} of {self.title} cannot be decoded ({error}).") from error

    def state(self) -> Iterator[str]:
        """Yields nothing: the fingerprint stands for the contents, which these datasets do not change."""
        yield from ()


def torchvision_lists(name: str, root: Path) -> tuple[list[str], dict[str, Any]]:
    """Opens the splits of a dataset that lies on the disk already.

    Args:
        name: Class in ``torchvision.datasets``.
        root: Its ``root``.

    Returns:
        Class names and a :class:`TorchvisionList` for each of train, val and test that the dataset has.

    Raises:
        UnknownNameError: There is no such dataset.
        DataError: It is not there, has no training images, or no single label an image.
    """
    from torchvision import datasets  # type: ignore[import-untyped]

    if name not in datasets.__all__:
        raise UnknownNameError("torchvision dataset", name, datasets.__all__)
    opened = {split: _open(getattr(datasets, name), root, split) for split in _SPLITS}
    if opened["train"] is None:
        raise DataError(f"torchvision's {name} has no split called train: write a table of its images instead.")
    lists = {split: _list(dataset, f"{name.lower()}-{split}") for split, dataset in opened.items() if dataset}
    number = 1 + max(int(images.labels.max()) for images in lists.values())
    known = getattr(opened["train"], "classes", None) or getattr(opened["train"], "categories", None) or []
    named = len(known) == number and all(isinstance(each, str) for each in known)
    return list(known) if named else [str(label) for label in range(number)], lists


def _open(dataset: Any, root: Path, split: str) -> Any:
    """Opens a split; None if the dataset does not know it."""
    accepted = inspect.signature(dataset).parameters
    fixed = {"root": str(root)} | ({"download": False} if "download" in accepted else {})
    if "split" in accepted:
        choices: list[dict[str, Any]] = [{"split": word} for word in _SPLITS[split]]
    elif "train" in accepted:
        choices = [] if split == "val" else [{"train": split == "train"}]
    else:
        choices = [{}] if split == "train" else []
    for choice in choices:
        try:
            return dataset(**fixed, **choice)
        except ValueError:  # no such split
            continue
        except (RuntimeError, OSError, TypeError) as error:
            name = dataset.__name__
            raise DataError(
                f"torchvision's {name} cannot be read below {root} ({' '.join(str(error).split())}); "
                f"if it is not there, get it once with torchvision.datasets.{name}({str(root)!r}, download=True)."
            ) from error
    return None


def _list(dataset: Any, title: str) -> TorchvisionList:
    labels = _labels(dataset, title)
    digest = hashlib.sha256(labels.tobytes())
    for position in np.unique(np.linspace(0, len(labels) - 1, _SAMPLED, dtype=np.int64)):
        digest.update(np.asarray(dataset[int(position)][0]).tobytes())
    return TorchvisionList(dataset, title, np.arange(len(labels), dtype=np.int64), labels, digest.hexdigest())


def _labels(dataset: Any, title: str) -> NDArray[np.int64]:
    """Labels from the attribute that most datasets have under some name, else from the items, which decodes them."""
    found = (getattr(dataset, name, None) for name in ("targets", "labels", "_labels", "y"))
    values = next((each for each in found if each is not None and len(each) == len(dataset)), None)
    if values is None:
        values = [dataset[position][1] for position in range(len(dataset))]
    labels = np.asarray(values)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels) or labels.min() < 0:
        raise DataError(f"{title} of torchvision has no single class label an image.")
    return labels.astype(np.int64)
