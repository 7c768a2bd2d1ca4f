"""List files and image files: what is read from disk, and how bad input is reported."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from vpt.errors import DataError


@dataclass(frozen=True)
class ImageList:
    """A list file, read.

    Attributes:
        file: The list file.
        folder: What the paths are relative to.
        paths: N paths as written.
        labels: int64 (N,).
        lines: Line number of each image, counted from 1.
        fingerprint: sha256 of the file's text, hexadecimal.
    """

    file: Path
    folder: Path
    paths: Sequence[str]
    labels: NDArray[np.int64]
    lines: Sequence[int]
    fingerprint: str

    def check_labels(self, num_classes: int) -> None:
        """Checks that every label is in [0, num_classes).

        Raises:
            DataError: Names the first line with another label.
        """
        bad = np.flatnonzero((self.labels < 0) | (self.labels >= num_classes))
        if len(bad):
            raise DataError(
                f"{self.file}, line {self.lines[bad[0]]}: label {self.labels[bad[0]]} is outside 0..{num_classes - 1}, "
                f"the task has {num_classes} classes; correct the line or classes.json."
            )

    def decode(self, position: int) -> Image.Image:
        """Decodes one image to RGB.

        Args:
            position: 0..N-1.

        Raises:
            DataError: The file is missing, truncated or not an image.
        """
        try:
            return _decode(self.folder / self.paths[position])
        except Exception as error:  # PIL raises a dozen unrelated types on damaged files.
            raise self.fault(position, error) from error

    def fault(self, position: int, error: Exception) -> DataError:
        """Returns the error for an image that cannot be read; it names list file, line and path."""
        fault = _fault(self.folder / self.paths[position], error)
        return DataError(f"{self.file}, line {self.lines[position]}: {fault}; restore the file or remove the line.")


def read_list(file: Path, folder: Path) -> ImageList:
    """Reads a list with one ``path<whitespace>label`` a line, label last; paths may contain spaces.

    Args:
        file: The list file, UTF-8; empty lines are skipped.
        folder: What the paths are relative to.

    Raises:
        DataError: The file cannot be read or is empty, or a line has no integer label.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not a readable list of images ({error}).") from error
    paths, labels, lines = [], [], []
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.rsplit(maxsplit=1)
        if not fields:
            continue
        try:
            path, label = fields[0].strip(), int(fields[1])
        except (IndexError, ValueError):
            raise DataError(
                f"{file}, line {number}: expected 'path<whitespace>label' with an integer label, found {line!r}."
            ) from None
        paths.append(path)
        labels.append(label)
        lines.append(number)
    if not paths:
        raise DataError(f"{file}: the list is empty; it needs one 'path<whitespace>label' a line.")
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    return ImageList(file, folder, paths, np.asarray(labels, dtype=np.int64), lines, fingerprint)


def decode_rgb(path: Path) -> Image.Image:
    """Decodes an image file of any kind to upright 8-bit RGB.

    The EXIF orientation is applied, transparency is laid over white, 16-bit samples are scaled to 8.

    Args:
        path: An image file.

    Raises:
        DataError: The file is missing, truncated or not an image.
    """
    try:
        return _decode(path)
    except Exception as error:  # PIL raises a dozen unrelated types on damaged files.
        raise DataError(f"{_fault(path, error)}.") from error


def _fault(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path} does not exist"
    if isinstance(error, UnidentifiedImageError):
        return f"{path} is not an image"
    return f"{path} cannot be decoded ({str(error).rstrip('.')})"


def _decode(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # I;16, I;16B and I hold 16-bit samples, which PIL would clip at 255.
        samples = np.asarray(upright).astype(np.float64)
        scale = 257.0 if samples.max() > 255 else 1.0
        upright = Image.fromarray(np.rint(samples / scale).clip(0, 255).astype(np.uint8))
    if upright.mode in {"RGBA", "LA", "PA", "La", "RGBa"} or "transparency" in upright.info:
        colours = upright.convert("RGBA")
        page = Image.new("RGBA", colours.size, "white")
        return Image.alpha_composite(page, colours).convert("RGB")
    return upright.convert("RGB")
