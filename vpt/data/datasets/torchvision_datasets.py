"""The classification datasets of torchvision by name, read through torchvision's own class."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vpt.data.cache.content_hashes import Hashes, cache_folder, content_hash, kept_hashes
from vpt.data.images import to_rgb
from vpt.errors import ConfigError, DataError, UnknownNameError

Choice = dict[str, Any]
_FLAG: dict[str, Choice] = {"train": {"train": True}, "test": {"train": False}}
_WHOLE: dict[str, Choice] = {"train": {}}


def _words(train: str = "train", val: str | None = None, test: str | None = None) -> dict[str, Choice]:
    named = {"train": train, "val": val, "test": test}
    return {split: {"split": word} for split, word in named.items() if word is not None}


SUPPORTED: dict[str, dict[str, Choice]] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "EMNIST", "FashionMNIST", "KMNIST", "MNIST", "QMNIST", "USPS"), _FLAG),
    **dict.fromkeys(("Caltech101", "Caltech256", "EuroSAT", "INaturalist", "Omniglot", "SEMEION", "SUN397"), _WHOLE),
    **dict.fromkeys(("CLEVRClassification", "DTD", "FGVCAircraft", "Flowers102"), _words(val="val", test="test")),
    **dict.fromkeys(("PCAM", "RenderedSST2"), _words(val="val", test="test")),
    **dict.fromkeys(("FER2013", "Food101", "GTSRB", "LFWPeople"), _words(test="test")),
    **dict.fromkeys(("StanfordCars", "STL10", "SVHN"), _words(test="test")),
    **dict.fromkeys(("ImageNet", "Imagenette"), _words(val="val")),
    "Country211": _words(val="valid", test="test"),
    "OxfordIIITPet": _words("trainval", test="test"),
    "Places365": _words("train-standard", val="val"),
}
"""The classification datasets of ``torchvision.datasets``, and what chooses each of their splits.

Of these only CIFAR's files are unpickled, by torchvision and after it has compared their md5 with its own.
"""
_TRANSPOSED = "EMNIST upright"  # the published arrays have rows and columns exchanged, and torchvision leaves them so
_FOLDERS = ("raw_folder", "_base_folder", "base_folder")  # where torchvision's classes name their own part of the root


@dataclass(frozen=True)
class TorchvisionList:
    """Images of one torchvision dataset at `positions`, int64 (N,), with `labels`, int64 (N,).

    ``dataset[i]`` is (PIL image, label), `title` e.g. ``"cifar10-train"``; `made_of` is dataset and arguments, which
    with the files decide what the images are.
    """

    dataset: Any
    title: str
    made_of: str
    positions: NDArray[np.int64]
    labels: NDArray[np.int64]

    @property
    def paths(self) -> Sequence[str]:
        """A name for each image, which has none of its own."""
        return [f"{self.title}/{position:06d}" for position in self.positions]

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, positions: NDArray[np.int64]) -> TorchvisionList:
        """Returns the images at some positions, int64 (M,)."""
        return replace(self, positions=self.positions[positions], labels=self.labels[positions])

    def decode(self, position: int) -> Image.Image:
        """Decodes one image to RGB; a DataError where it is damaged, or the dataset gives something else."""
        number = int(self.positions[position])
        try:
            image = to_rgb(self.dataset[number][0])
            return image.transpose(Image.Transpose.TRANSPOSE) if self.made_of.startswith(_TRANSPOSED) else image
        except Exception as error:  # PIL raises a dozen unrelated types on damaged files.
            raise DataError(f"Image {number} of {self.title} cannot be decoded ({error}).") from error

    def contents(self) -> Hashes:
        """Returns the hash of each image's decoded pixels, uint8 (N, 16); of zeros for one that cannot be decoded."""
        about = hashlib.sha256(self.positions.tobytes()).hexdigest()
        return kept_hashes(self.title, f"{self.made_of} {about}", self._files(), len(self), self._content)

    def _content(self, position: int) -> bytes:
        try:
            image = self.decode(position)
        except DataError as error:
            raise OSError from error
        return content_hash(repr(image.size).encode(), image.tobytes())

    def _files(self) -> Iterator[Path]:
        """All in the dataset's folder, or in the root if it names none."""
        root = Path(self.dataset.root)
        homes = (root / str(getattr(self.dataset, name, ".")) for name in _FOLDERS)
        home = next((home for home in homes if home != root and home.is_dir()), root)
        for folder, folders, names in os.walk(home):
            folders.sort()
            if Path(folder) == cache_folder().resolve():
                folders.clear()
                continue
            yield from (Path(folder, name) for name in sorted(names))


def torchvision_lists(name: str, root: Path, arguments: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Opens a dataset of ``torchvision.datasets`` on the disk: class names, and train, val and test if it has them.

    `arguments` are its own but ``root``, such as ``{"split": "letters"}`` of EMNIST. An UnknownNameError where there is
    none, a ConfigError where an argument is not the user's to choose, and a DataError where it is none of
    :data:`SUPPORTED`, not there, damaged, or has no single label an image.
    """
    from torchvision import datasets  # type: ignore[import-untyped]

    if name not in datasets.__all__:
        raise UnknownNameError("torchvision dataset", name, SUPPORTED)
    if name not in SUPPORTED:
        raise DataError(
            f"torchvision's {name} is no classification dataset that can be read by name: write a table of its images "
            f"(path,label,split) instead. Supported are {', '.join(sorted(SUPPORTED))}."
        )
    ours = {"root", "download", "transform", "target_transform", "loader", *SUPPORTED[name]["train"]}
    if clash := sorted(ours & arguments.keys()):
        raise ConfigError(f"torchvision_args may not set {clash[0]!r} of {name}: it is set here.")
    if name == "EMNIST" and "split" not in arguments:
        raise ConfigError("EMNIST needs a split, e.g. torchvision_args: {split: letters}.")
    opened = {
        split: _read(getattr(datasets, name), root, f"{name.lower()}-{split}", {**choice, **arguments})
        for split, choice in SUPPORTED[name].items()
    }
    number = 1 + max(int(images.labels.max()) for images in opened.values())
    train = opened["train"].dataset
    known = getattr(train, "classes", None) or getattr(train, "categories", None) or []
    named = len(known) == number and all(isinstance(each, str) for each in known)
    return list(known) if named else [str(label) for label in range(number)], opened


def _read(kind: Any, root: Path, title: str, arguments: Choice) -> TorchvisionList:
    """Opens a split; whatever torchvision raises becomes one sentence."""
    downloads = any("download" in inspect.signature(base).parameters for base in kind.__mro__[:-1])
    fixed = {"root": str(root.resolve())} | ({"download": False} if downloads else {})
    try:
        dataset = kind(**fixed, **arguments)
        labels = _labels(dataset, title)
        return TorchvisionList(
            dataset,
            title,
            f"{_TRANSPOSED if kind.__name__ == 'EMNIST' else kind.__name__} {sorted(arguments.items())}",
            np.arange(len(labels), dtype=np.int64),
            labels,
        )
    except DataError:
        raise
    except Exception as error:  # torchvision raises a dozen unrelated types on absent and damaged files.
        reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":.")
        message = f"torchvision's {kind.__name__} cannot be read below {root} ({reason})"
        if isinstance(error, ImportError):
            raise DataError(f"{message}; install the package that it asks for.") from error
        if downloads:
            given = "".join(f", {key}={value!r}" for key, value in arguments.items())
            call = f"torchvision.datasets.{kind.__name__}({str(root)!r}{given}, download=True)"
            raise DataError(f"{message}; if it is not there or damaged, get it with {call}.") from error
        raise DataError(f"{message}; if it is not there, get it from its authors.") from error


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
