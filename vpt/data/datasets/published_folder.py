"""Datasets as their authors publish them: where the folder is, which images it lists, and whether all are there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vpt.data.catalog.cards import Card
from vpt.data.images import ImageList, decode_rgb
from vpt.data.module import Split
from vpt.errors import ConfigError, DataError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})


class FolderImages(ImageList):
    """Images that were found in folders and not in a list file."""

    def decode(self, position: int) -> Image.Image:
        """Decodes one image to RGB.

        Args:
            position: 0..N-1.

        Raises:
            DataError: The file is missing, truncated or not an image.
        """
        try:
            return decode_rgb(self.folder / self.paths[position])
        except DataError as error:
            raise DataError(f"{str(error).rstrip('.')}; restore the file from the archive.") from error


def find_folder(card: Card, root: Path, official: str, needed: Sequence[str]) -> Path:
    """Finds the folder of a dataset below the data root.

    It is ``<root>/<card's name>``, or the folder that the authors' archive unpacks to, within that or beside it.

    Args:
        card: The dataset.
        root: Folder of all datasets.
        official: The folder that the archive unpacks to, relative to where it is unpacked.
        needed: Files and folders that must be in it.

    Returns:
        The first of the three that holds all that is needed.

    Raises:
        DataError: None does; the message names the first missing path, the expected tree and how to get the data.
    """
    candidates = [root / card.name / official, root / card.name, root / official]
    for folder in candidates:
        if all((folder / name).exists() for name in needed):
            return folder
    nearest = next((folder for folder in candidates if folder.is_dir()), root / card.name)
    missing = root if not root.is_dir() else nearest
    if missing.is_dir():
        missing = next(nearest / name for name in needed if not (nearest / name).exists())
    raise DataError(
        f"{missing} does not exist; set VPT_DATA or the root to the folder that holds {card.name}/ ({card.title}), "
        f"laid out as\n{card.layout.rstrip()}\n{card.obtain.rstrip()}"
    )


def image_list(
    file: Path, folder: Path, paths: Sequence[str], labels: Iterable[int], lines: Sequence[int] | None = None
) -> ImageList:
    """Makes a list of images out of what a file of the authors says.

    Args:
        file: What says it, for messages.
        folder: What the paths are relative to.
        paths: N paths.
        labels: N labels.
        lines: Where each is in that file, counted from 1; None for 1..N.

    Raises:
        DataError: There is none, or one is listed twice.
    """
    numbers, positions, fingerprint = checked(file, paths, labels)
    return ImageList(file, folder, paths, numbers, lines or positions, fingerprint)


def folder_images(folder: Path, paths: Sequence[str], labels: Sequence[int], kind: type[FolderImages]) -> FolderImages:
    """Makes a list of images out of what was found in a folder.

    Args:
        folder: What the paths are relative to.
        paths: N paths.
        labels: N labels.
        kind: What decodes the images.

    Raises:
        DataError: There is no image at all.
    """
    numbers, lines, fingerprint = checked(folder, paths, labels)
    if kind is not FolderImages:  # other pixels of the same files must not share a cache
        fingerprint = hashlib.sha256(f"{kind.__name__} {fingerprint}".encode()).hexdigest()
    return kind(folder, folder, paths, numbers, lines, fingerprint)


def image_names(folder: Path) -> list[str]:
    """Returns the sorted names of the image files in a folder, without hidden ones."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )


def checked(file: Path, paths: Sequence[str], labels: Iterable[int]) -> tuple[NDArray[np.int64], Sequence[int], str]:
    """Checks a list and fingerprints it.

    Args:
        file: What it comes from, for messages.
        paths: N paths.
        labels: N labels.

    Returns:
        int64 (N,) labels, numbers 1..N and the sha256 of paths and labels.

    Raises:
        DataError: The list is empty, or an image is in it twice.
    """
    numbers = np.fromiter(labels, dtype=np.int64)
    if not paths:
        raise DataError(f"{file} lists no image: unpack the archive again.")
    seen: dict[str, int] = {}
    for line, path in enumerate(paths, start=1):
        if (first := seen.setdefault(path, line)) != line:
            raise DataError(f"{file}: image {path} is listed twice, as number {first} and {line}; remove one of them.")
    text = "\n".join(f"{path}\t{label}" for path, label in zip(paths, numbers, strict=True))
    return numbers, range(1, len(paths) + 1), hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def check_count(what: str, found: int, expected: int, allow_partial: bool) -> bool:
    """Checks the number of images.

    Args:
        what: Which list, for the message.
        found: How many there are.
        expected: How many there are officially.
        allow_partial: Accept another number.

    Returns:
        True if the numbers agree.

    Raises:
        DataError: They differ and that is not accepted.
    """
    if found == expected:
        return True
    if not allow_partial:
        raise DataError(
            f"{what}: found {found:,} images, expected {expected:,}; complete the copy, or set allow_partial=true, "
            "which the record of every result then states."
        )
    return False


class NoImages:
    """Stands for the pixels of a split that does not exist, and says why when they are asked for."""

    def __init__(self, reason: str) -> None:
        """Keeps the reason.

        Args:
            reason: A sentence with a remedy.
        """
        self.reason = reason

    def __call__(self, **_: object) -> NDArray[np.uint8]:
        """Raises a ConfigError with the reason."""
        raise ConfigError(self.reason)


def no_split(source: str, reason: str) -> Split:
    """Returns an empty split that refuses to be used.

    Args:
        source: Name, for the record.
        reason: A sentence with a remedy.
    """
    return Split(source, [], np.zeros(0, dtype=np.int64), "", NoImages(reason))


def take(images: ImageList, positions: NDArray[np.intp]) -> ImageList:
    """Returns a part of a list.

    Args:
        images: The list.
        positions: Which images, in which order.
    """
    paths = [images.paths[position] for position in positions]
    numbers, _, fingerprint = checked(images.file, paths, images.labels[positions])
    lines = [images.lines[position] for position in positions]
    return type(images)(images.file, images.folder, paths, numbers, lines, fingerprint)


def hold_out(images: ImageList, every: int, seed: int = 0) -> tuple[ImageList, ImageList]:
    """Splits validation images off a training list by systematic sampling, without a random generator.

    The images are sorted by class and then by the sha256 of ``"<seed> <path>"``; the first of every ``every`` is held
    out. N images therefore give ``ceil(N / every)``, and each class its share to within one image. For 10 these are
    the sizes of the published FGVC splits, of which no rule is known.

    Args:
        images: The official training list.
        every: One in how many is held out, at least 2.
        seed: Another seed gives another split.

    Returns:
        What is left and what is held out, each in the order of the list.
    """
    digests = [hashlib.sha256(f"{seed} {path}".encode("utf-8", "surrogateescape")).hexdigest() for path in images.paths]
    order = np.lexsort((np.array(digests), images.labels))
    held = np.zeros(len(order), dtype=bool)
    held[order[::every]] = True
    return take(images, np.flatnonzero(~held)), take(images, np.flatnonzero(held))
