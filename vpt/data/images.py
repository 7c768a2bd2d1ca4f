"""List files and image files: what is read from disk, and how bad input is reported."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from vpt.data.content_hashes import Hashes, content_hash, kept_hashes
from vpt.errors import DataError


class ImageSource(Protocol):
    """N images that can be decoded one by one: what a cache is built from."""

    @property
    def title(self) -> str:
        """For progress bars and file names, e.g. ``"caltech101-test"``."""

    @property
    def paths(self) -> Sequence[str]:
        """N names."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """int64 (N,)."""

    def __len__(self) -> int: ...

    def decode(self, position: int) -> Image.Image:
        """Decodes one image to RGB, or raises a DataError that names it."""

    def take(self, positions: NDArray[np.int64]) -> ImageSource:
        """Returns a part of the list."""

    def contents(self) -> Hashes:
        """Returns the hash of what each image is made of, uint8 (N, 16); of zeros where its file cannot be read."""


@dataclass(frozen=True)
class ImageList:
    """A list file, or another enumeration of image files.

    Attributes:
        file: The list file, or the folder that was listed.
        folder: What the paths are relative to.
        paths: N paths as written.
        labels: int64 (N,).
        lines: Line number of each image, counted from 1; empty where there are no lines.
    """

    file: Path
    folder: Path
    paths: Sequence[str]
    labels: NDArray[np.int64]
    lines: Sequence[int]

    @property
    def title(self) -> str:
        """Folder and list."""
        return f"{self.folder.resolve().name}-{self.file.stem}"

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, positions: NDArray[np.int64]) -> ImageList:
        """Returns the list of the images at some positions, int64 (M,)."""
        return replace(
            self,
            paths=[self.paths[position] for position in positions],
            labels=self.labels[positions],
            lines=[self.lines[position] for position in positions] if self.lines else (),
        )

    def contents(self) -> Hashes:
        """Returns the hash of each file's bytes and of all else that its pixels are made of, as `ImageSource` does."""
        return kept_hashes(self.title, self._made_of, self._files(), len(self), self._content)

    @property
    def _made_of(self) -> str:
        """What pixels are made of beside the files."""
        return ""

    def _files(self) -> Iterator[Path]:
        folder = self.folder.resolve()
        return (folder / path for path in self.paths)

    def _content(self, position: int) -> bytes:
        return content_hash(self._made_of.encode(), (self.folder / self.paths[position]).read_bytes())

    def check_labels(self, num_classes: int) -> None:
        """Checks that every label is in [0, num_classes); a DataError names the first line with another."""
        bad = np.flatnonzero((self.labels < 0) | (self.labels >= num_classes))
        if len(bad):
            raise DataError(
                f"{self._where(int(bad[0]))}label {self.labels[bad[0]]} is outside 0..{num_classes - 1}, "
                f"the task has {num_classes} classes; correct the line or classes.json."
            )

    def decode(self, position: int) -> Image.Image:
        """Decodes one image to RGB; a DataError where the file is missing, truncated or not an image."""
        try:
            return _decode(self.folder / self.paths[position])
        except Exception as error:  # PIL raises a dozen unrelated types on damaged files.
            raise self.fault(position, error) from error

    def fault(self, position: int, error: Exception) -> DataError:
        """Returns the error for an image that cannot be read; it names list file, line and path."""
        fault = _fault(self.folder / self.paths[position], error)
        return DataError(f"{self._where(position)}{fault}; {self._remedy}.")

    @property
    def _remedy(self) -> str:
        return f"restore the file or remove {'the line' if self.lines else 'it'}"

    def _where(self, position: int) -> str:
        return f"{self.file}, line {self.lines[position]}: " if self.lines else ""


def read_list(file: Path, folder: Path) -> ImageList:
    """Reads a UTF-8 file of ``path<whitespace>label`` lines, label last; paths may contain spaces.

    They are relative to a folder; empty lines are skipped. A DataError where the file cannot be read or is empty, a
    line has no integer label, or an image is listed twice.
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
    if (twice := first_repeated(paths, folder)) is not None:
        first, again = (lines[position] for position in twice)
        raise DataError(f"{file}, line {again}: {paths[twice[1]]} is listed on line {first} already; remove one line.")
    return ImageList(file, folder, paths, np.asarray(labels, dtype=np.int64), lines)


def first_repeated(paths: Sequence[str], folder: Path) -> tuple[int, int] | None:
    """Finds the first file that is listed twice, however its path, relative to a folder, is spelled.

    Returns its position and that of its repetition; None if all differ.
    """
    seen: dict[str, int] = {}
    for position, path in enumerate(paths):
        name = os.path.normpath(folder / path)
        if seen.setdefault(name, position) != position:
            return seen[name], position
    return None


def decode_rgb(path: Path) -> Image.Image:
    """Decodes an image file of any kind to upright 8-bit RGB.

    The EXIF orientation is applied, transparency is alpha-composited onto white, 16-bit samples are scaled to 8;
    32-bit ones count as 16-bit. A DataError where the file is missing, truncated or not an image.
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
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Turns a decoded image of any mode into upright 8-bit RGB, as :func:`decode_rgb` does.

    A ValueError where its samples are floating-point numbers, whose range no file states, or exceed 16 bits.
    """
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "F":
        raise ValueError("its samples are decimal numbers of unknown range: convert it to 8 bits")
    if upright.mode.startswith("I"):  # I;16, I;16B and I hold 16-bit samples, which PIL would clip at 255.
        samples = np.asarray(upright)
        if samples.min() < 0 or samples.max() > 65535:
            raise ValueError("its 32-bit samples do not fit in 16 bits: convert it to 8 bits")
        upright = Image.fromarray(np.rint(samples / 257).astype(np.uint8))  # by the file's type, never by its content
    if upright.mode in {"RGBA", "LA", "PA", "La", "RGBa"} or "transparency" in upright.info:
        colours = upright.convert("RGBA")
        page = Image.new("RGBA", colours.size, "white")
        return Image.alpha_composite(page, colours).convert("RGB")
    return upright.convert("RGB")
