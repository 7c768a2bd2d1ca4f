"""Image files: which there are, how they are decoded, and how bad ones are reported."""

from __future__ import annotations

import errno
import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from vpt.data.cache.content_hashes import WIDTH, Hashes, content_hash, file_state, is_settled, kept_hashes
from vpt.data.channels import Channels, Raster, read_channels
from vpt.errors import DataError, VPTWarning

SYSTEM_FOLDERS = frozenset(
    {"@eaDir", "__MACOSX", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
)
"""Folders that a system puts beside images; they and all that begin with a dot are hidden and hold none."""
_NAMED = 5  # folders of a warning; the others are counted


class ImageSource(Protocol):
    """N images that can be decoded one by one: what a cache is built from."""

    @property
    def title(self) -> str:
        """For progress bars and file names, e.g. ``"caltech101-test"``."""

    @property
    def paths(self) -> Sequence[str]:
        """N names."""

    @property
    def labels(self) -> NDArray[Any]:
        """int64 (N,), or those of several classes or numbers, (N, C)."""

    def __len__(self) -> int: ...

    def decode(self, position: int) -> Image.Image | Raster:
        """Decodes one image to RGB, or to its channels, or raises a DataError that names it."""

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
        labels: int64 (N,), or those of several classes or numbers, (N, C).
        lines: Line number of each image, counted from 1; empty where there are no lines.
        channels: What is read of each file; None for 8-bit RGB.
    """

    file: Path
    folder: Path
    paths: Sequence[str]
    labels: NDArray[Any]
    lines: Sequence[int]
    channels: Channels | None = field(default=None, kw_only=True)

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

    def joined(self, other: ImageList) -> ImageList:
        """Returns this list and another one of the same folder behind it."""
        labels = np.concatenate([self.labels, other.labels])
        return replace(self, paths=[*self.paths, *other.paths], labels=labels, lines=[*self.lines, *other.lines])

    def contents(self) -> Hashes:
        """Returns the hash of each file's bytes and of all else that its pixels are made of, as `ImageSource` does."""
        return kept_hashes(self.title, self._made_of, self._files(), len(self), self._content)

    @property
    def _made_of(self) -> str:
        """What pixels are made of beside the files."""
        return ""

    def _files(self) -> Iterator[str]:
        folder = str(self.folder.resolve())
        return (f"{folder}/{path}" for path in self.paths)

    def files_of(self, position: int) -> tuple[Path, ...]:
        """All files that an image is made of."""
        return (self.folder / self.paths[position],)

    def state(self, position: int) -> bytes | None:
        """16 bytes that change with an image's files; None where one is missing, or may change without another state.

        The latter is as long as it is younger than what its time distinguishes.
        """
        try:
            states = [file_state(file) for file in self.files_of(position)]
        except OSError:
            return None
        if not all(is_settled(changed) for _, changed in states):
            return None
        return content_hash(self._made_of.encode(), *(state for state, _ in states))[:WIDTH]

    def _content(self, position: int) -> bytes:
        return content_hash(self._made_of.encode(), regular_file(self.folder / self.paths[position]).read_bytes())

    def check_labels(self, num_classes: int) -> None:
        """Checks that every label is in [0, num_classes); a DataError names the first line with another."""
        bad = np.flatnonzero((self.labels < 0) | (self.labels >= num_classes))
        if len(bad):
            raise DataError(
                f"{self._where(int(bad[0]))}label {self.labels[bad[0]]} is outside 0..{num_classes - 1}, "
                f"the task has {num_classes} classes; correct the line or classes.json."
            )

    def decode(self, position: int) -> Image.Image | Raster:
        """Decodes one image; a DataError where the file is missing, truncated, not an image or of other channels."""
        try:
            return _decode(self.folder / self.paths[position], self.channels)
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


@dataclass
class LeftOut:
    """What a walk over folders reads, and what it does not: files by reason, folders each with its reason."""

    read: int = 0
    files: Counter[str] = field(default_factory=Counter)
    folders: list[tuple[Path, str]] = field(default_factory=list)

    def text(self, root: Path) -> str:
        """Says what is not read below a folder; nothing where all is."""
        left, more = self.files.total(), self.folders[_NAMED:]
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.files.items()))
        files = [f"{left:,} of {left + self.read:,} files ({kinds})"] if left else []
        named = [f"{shown(path.relative_to(root))} ({why})" for path, why in self.folders[:_NAMED]]
        listed = ", ".join([*named, f"{len(more):,} more"] if more else named)
        return " and ".join([*files, *([f"the folders {listed}"] if listed else [])])

    def add(self, other: LeftOut) -> None:
        """Adds what another walk reads and does not."""
        self.read += other.read
        self.files += other.files
        self.folders += other.folders

    def warn(self, root: Path) -> None:
        """Says by a VPTWarning what is not read of a folder, if anything."""
        if text := self.text(root):
            warnings.warn(f"Not read of {shown(root)}: {text}.", VPTWarning, stacklevel=2)


def list_folder(folder: Path, left: LeftOut, arrays: bool = False) -> tuple[list[Path], list[str]]:
    """Lists the folders and the paths of image files that lie directly in a folder, by name; adds all else to `left`.

    An image file has a suffix of a kind that Pillow reads, or with `arrays` NumPy's. Links are followed, but not back
    to a folder above.
    """
    try:
        found = sorted(os.scandir(folder), key=lambda entry: (entry.is_symlink(), entry.name))
    except OSError as error:
        left.folders.append((folder, reason(error)))
        return [], []
    folders, images = [], []
    for entry in found:
        if Path(entry.path).is_dir() if entry.is_symlink() else entry.is_dir():
            path = Path(entry.path)
            if entry.name.startswith(".") or entry.name in SYSTEM_FOLDERS:
                left.folders.append((path, "hidden"))
            elif entry.is_symlink() and folder.resolve().is_relative_to(path.resolve()):
                left.folders.append((path, "a link back"))
            else:
                folders.append(path)
        elif why := _unread(entry, arrays):
            left.files[why] += 1
        else:
            images.append(entry.path)
    left.read += len(images)
    return folders, images


def _unread(entry: os.DirEntry[str], arrays: bool) -> str:
    """Says why a file is not read; nothing if it is."""
    if entry.name.startswith("."):
        return "hidden"
    if not is_image_name(entry.name, arrays):
        return Path(entry.name).suffix.lower() or "without a suffix"
    if entry.is_symlink():
        return "" if Path(entry.path).is_file() else "dangling"
    return "" if entry.is_file() else "of a device"


def find_images(folder: Path, left: LeftOut, arrays: bool = False) -> list[str]:
    """Lists the paths of image files in and below a folder, sorted by folder and name; each folder once."""
    images, waiting, seen = list[str](), [folder], set[Path]()
    while waiting:
        here = waiting.pop()
        if here.resolve() in seen:
            left.folders.append((here, "read already"))
            continue
        seen.add(here.resolve())
        folders, found = list_folder(here, left, arrays)
        images += found
        waiting += reversed(folders)
    return sorted(images, key=lambda path: path.replace(os.sep, "\0"))  # by folder before name


def is_image_name(name: str, arrays: bool = False) -> bool:
    """Says whether a file's name ends in a suffix of a kind that Pillow reads, or with `arrays` in NumPy's."""
    _, dot, suffix = name.rpartition(".")
    return f"{dot}{suffix}".lower() in _suffixes() or (arrays and suffix.lower() == "npy")


@cache
def _suffixes() -> frozenset[str]:
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in known.items() if kind in Image.OPEN)


def shown(path: Path | str) -> str:
    """Returns a path as it is printed in a sentence: in quotes, with escapes, where a character of it is no text."""
    return str(path) if is_text(str(path)) else repr(str(path))


def is_text(text: str) -> bool:
    """Says whether a text has no control character, half of a character or end of a line, by their Unicode kind."""
    return not any(unicodedata.category(sign) in {"Cc", "Cs", "Zl", "Zp"} for sign in text)


def reason(error: Exception) -> str:
    """Says why something failed, in the words of the system or the library and without the path."""
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels: scale it down"
    return getattr(error, "strerror", None) or str(error).rstrip(".") or type(error).__name__


def regular_file(path: Path) -> Path:
    """Returns a path to be opened; an OSError where it is a folder or a device, some of which never end."""
    if path.is_file() or not path.exists():
        return path
    raise OSError(errno.EINVAL, "it is no file", str(path))


def decode_rgb(path: Path) -> Image.Image:
    """Decodes an image file of any kind to upright 8-bit RGB.

    The EXIF orientation is applied, transparency is alpha-composited onto white, 16-bit samples are scaled to 8;
    32-bit ones count as 16-bit. A DataError where the file is missing, truncated or not an image.
    """
    return cast("Image.Image", decode(path, None))


def decode(path: Path, channels: Channels | None) -> Image.Image | Raster:
    """Decodes an image file to its channels (`read_channels`), or as `decode_rgb` does; errors are DataErrors."""
    try:
        return _decode(path, channels)
    except Exception as error:  # PIL raises a dozen unrelated types on damaged files.
        raise DataError(f"{_fault(path, error)}.") from error


def to_be_seen(path: Path, channels: Channels | None) -> Image.Image:
    """Decodes an image file to RGB, in false colours where it has channels (`false_colours`); errors are DataErrors."""
    image = decode(path, channels)
    return image.seen() if isinstance(image, Raster) else image


def _fault(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{shown(path)} does not exist"
    if isinstance(error, UnidentifiedImageError):
        return f"{shown(path)} is not an image"
    return f"{shown(path)} cannot be decoded ({reason(error)})"


def _decode(path: Path, channels: Channels | None) -> Image.Image | Raster:
    if channels is not None:
        return read_channels(regular_file(path), channels)
    return decode_content(regular_file(path).read_bytes())


def decode_content(content: bytes) -> Image.Image:
    """Decodes the bytes of an image file of any kind, as `decode_rgb` does; errors are Pillow's."""
    if content[:2] == b"\xff\xd8" and (pixels := _decoded_jpeg(content)) is not None:
        return Image.fromarray(pixels)
    with Image.open(BytesIO(content)) as image:
        image.load()
        return to_rgb(image)


def _decoded_jpeg(content: bytes) -> NDArray[np.uint8] | None:
    """Decodes a plain JPEG by simplejpeg, in less time; None where Pillow might give other pixels, or an error.

    That is where simplejpeg is missing, for other colours than grey and YCbCr, for files that may say how they are
    turned, for those that Pillow finds too large, and for damaged ones.
    """
    if (jpeg := _simplejpeg()) is None:
        return None
    if any(mark in content for mark in (b"Exif\0", b"http://ns.adobe.com/xap/")):
        return None
    try:
        height, width, colours, _ = jpeg.decode_jpeg_header(content)
        if colours not in ("YCbCr", "Gray") or height * width > (Image.MAX_IMAGE_PIXELS or height * width):
            return None
        return cast("NDArray[np.uint8]", jpeg.decode_jpeg(content, colorspace="RGB"))
    except Exception:  # KeyError of a sampling that it does not know, among others: Pillow decides
        return None


@cache
def _simplejpeg() -> Any:
    """The module, None where it is not installed, or is built on another decoder than Pillow."""
    try:
        module: Any = import_module("simplejpeg")
    except ImportError:  # or it does not fit this NumPy
        return None
    pattern = np.arange(33 * 29 * 3, dtype=np.uint32).reshape(33, 29, 3) * 2654435761 >> 9
    file = BytesIO()
    Image.fromarray((pattern % 256).astype(np.uint8)).save(file, "JPEG", quality=80)  # 4:2:0, odd sides
    with Image.open(file) as image:
        expected = np.asarray(image.convert("RGB"))
    return module if np.array_equal(module.decode_jpeg(file.getvalue(), colorspace="RGB"), expected) else None


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
