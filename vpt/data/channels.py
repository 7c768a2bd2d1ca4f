"""Images of any number of channels: TIFF, NumPy and other files as the numbers that they hold, never scaled."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from vpt.errors import ConfigError, DataError, check_number

Channels = int | tuple[int, ...]
"""How many channels all images have; or which of theirs are read, by number from 0, in this order."""

Pixels = NDArray[np.float32]
_MOST = 4096
_TIFF = (".tif", ".tiff")


def as_channels(given: Any) -> Channels:
    """Checks a number of channels, or a list of those to be read; a ConfigError for what is neither."""
    if isinstance(given, list | tuple):
        numbers = tuple(given)
        for number in numbers:
            check_number("channels", number, 0, _MOST - 1, whole=True)
        if not numbers or len(set(numbers)) < len(numbers):
            raise ConfigError(f"channels are numbers from 0, each once, got {list(numbers)}.")
        return numbers
    check_number("channels", given, 1, _MOST, whole=True)
    return int(given)


def count(channels: Channels) -> int:
    """How many channels an image then has."""
    return channels if isinstance(channels, int) else len(channels)


class Images(Protocol):
    """Images (C, H, W), by position."""

    def __getitem__(self, position: int, /) -> Any: ...


@dataclass(frozen=True)
class Raster:
    """An image of float32 numbers (H, W, C), as a preset takes it: with Pillow's names for what it does to one."""

    pixels: Pixels

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.width, self.height

    @property
    def width(self) -> int:
        """Number of columns."""
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        """Number of rows."""
        return int(self.pixels.shape[0])

    def tobytes(self) -> bytes:
        """All numbers."""
        return self.pixels.tobytes()

    def seen(self) -> Image.Image:
        """In false colours (`false_colours`)."""
        return Image.fromarray(false_colours(self.pixels.transpose(2, 0, 1)))

    def crop(self, box: tuple[int, int, int, int]) -> Raster:
        """Cuts (left, upper, right, lower)."""
        left, upper, right, lower = box
        return Raster(self.pixels[upper:lower, left:right])

    def resize(self, size: tuple[int, int], resample: Image.Resampling) -> Raster:
        """Resizes each channel to (width, height) as Pillow does images of 32-bit floats."""
        layers = (Image.fromarray(np.ascontiguousarray(layer)) for layer in np.moveaxis(self.pixels, 2, 0))
        return Raster(np.stack([np.asarray(layer.resize(size, resample)) for layer in layers], axis=2))


def read_channels(path: Path, channels: Channels) -> Raster:
    """Reads an image file as the numbers that it holds, of 8, 16 or 32 bits, which float32 keeps up to 2²⁴ exactly.

    TIFF by tifffile, ``.npy`` by NumPy, JPEG, WebP and PNG by Pillow, whose EXIF orientation is applied. A ValueError
    where it has other channels, numbers that are not finite, or no image; an OSError where it cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix in _TIFF:
        return as_raster(*_tiff(path), channels)
    if suffix == ".npy":
        return as_raster(np.load(path, allow_pickle=False), None, channels)
    with Image.open(path) as image:
        if image.format not in ("JPEG", "PNG", "WEBP") or (image.format == "PNG" and not _png_as_it_is(path)):
            raise ValueError("Pillow would scale its numbers: write it as TIFF or .npy")
        image.load()
        return of_picture(image, channels)


def of_picture(image: Image.Image, channels: Channels) -> Raster:
    """Takes the channels of an image of Pillow, upright; a ValueError where these are none."""
    if image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK", "F", "I") and not image.mode.startswith("I;16"):
        raise ValueError(f"it holds colours of mode {image.mode}, not channels: convert it")
    return as_raster(np.asarray(ImageOps.exif_transpose(image)), 2, channels)


def _png_as_it_is(path: Path) -> bool:
    """Whether Pillow gives the numbers of a PNG: of 8 bits, or grey ones of 16."""
    with path.open("rb") as file:
        header = file.read(26)
    depth, kind = header[24], header[25]
    return depth == 8 or (depth == 16 and kind == 0)


def as_raster(values: NDArray[Any], axis: int | None, channels: Channels) -> Raster:
    """Takes numbers (H, W), (H, W, C) or (C, H, W), of which `axis` are the channels if that is known.

    Else it is the outer one that has so many, or where some are listed the one that is less than half of the other. A
    ValueError for what are no such numbers.
    """
    kind, bits = values.dtype.kind, 8 * values.dtype.itemsize
    if kind not in "uif" or bits > 32:
        raise ValueError(f"its numbers are {values.dtype}: convert them to 8, 16 or 32 bits")
    if values.ndim == 2:
        values, axis = values[:, :, None], 2
    if values.ndim != 3 or 0 in values.shape:
        raise ValueError(f"it has shape {values.shape}, and an image has rows, columns and channels")
    pixels = np.moveaxis(values, _axis(values.shape, channels) if axis is None else axis, 2)
    found = pixels.shape[2]
    if isinstance(channels, int) and channels != found:
        raise ValueError(f"it has {found} channels, not {channels}")
    if not isinstance(channels, int):
        if max(channels) >= found:
            raise ValueError(f"it has {found} channels, of which none is number {max(channels)}")
        pixels = pixels[:, :, list(channels)]
    plain = np.ascontiguousarray(pixels, dtype=np.float32)
    if not np.isfinite(plain).all():
        raise ValueError("it holds numbers that are not finite: replace them")
    return Raster(plain)


def _axis(shape: tuple[int, ...], channels: Channels) -> int:
    first, last = shape[0], shape[2]
    if isinstance(channels, int) and channels in (first, last) and first != last:
        return 0 if channels == first else 2
    if not isinstance(channels, int) and 2 * min(first, last) < max(first, last):
        return 0 if first < last else 2
    if isinstance(channels, int) and channels not in (first, last):
        raise ValueError(f"it has shape {shape}, and no {channels} channels")
    raise ValueError(f"its shape {shape} does not say which dimension is that of the channels: write TIFF files")


def _tiff(path: Path) -> tuple[NDArray[Any], int | None]:
    """The numbers of a TIFF file, and which of their dimensions are channels, if it says so."""
    try:
        import tifffile
    except ImportError as error:
        raise ValueError("TIFF files of any channels are read by tifffile: pip install 'vpt[tiff]'") from error
    with tifffile.TiffFile(path) as file:
        series = file.series
        if len(series) > 1 and len({(each.shape, each.dtype, each.axes) for each in series}) > 1:
            raise ValueError(f"it holds {len(series)} images of several kinds: write one")
        if len(series) > 1 and series[0].ndim == 2:  # a page for each channel
            return np.stack([each.asarray() for each in series]), 0
        if len(series) > 1:
            raise ValueError(f"it holds {len(series)} images: write one")
        values, axes = series[0].asarray(), series[0].axes
    kept = [place for place, length in enumerate(values.shape) if length > 1 or axes[place] in "YX"]
    values, axes = values.reshape([values.shape[place] for place in kept]), "".join(axes[place] for place in kept)
    others = [place for place, axis in enumerate(axes) if axis not in "YX"]
    known = values.ndim == 3 and len(others) == 1 and axes[others[0]] != "Q"  # which tifffile has not been told
    return values, others[0] if known else None


def channel_statistics(images: Images, each: Iterable[int]) -> dict[str, list[float]]:
    """Mean and standard deviation of each channel of images (C, H, W), in their own unit, in float64.

    `each` goes through their positions. A DataError where a channel is the same everywhere, which cannot be scaled.
    """
    pixels = 0
    mean = spread = np.zeros(0)
    for position in each:  # Chan et al. 1983: exact where a mean of squares would cancel
        image = np.asarray(images[position], np.float64).reshape(len(images[position]), -1)
        here, own = image.shape[1], image.mean(axis=1)
        squares = np.square(image - own[:, None]).sum(axis=1)
        if not pixels:
            mean, spread = own, squares
        else:
            gap = own - mean
            mean = mean + gap * here / (pixels + here)
            spread = spread + squares + np.square(gap) * pixels * here / (pixels + here)
        pixels += here
    deviation = np.sqrt(spread / max(pixels, 1))
    if len(constant := np.flatnonzero(deviation == 0)):
        raise DataError(
            f"Channel {constant[0]} is {mean[constant[0]]:.6g} in all training images, and cannot be brought to scale: "
            "leave it out by a list of channels, or give model.normalization."
        )
    return {"mean": _rounded(mean), "std": _rounded(deviation)}


def _rounded(values: NDArray[np.float64]) -> list[float]:
    """To nine digits, which float32 tells apart, so that a sum in another order says the same."""
    return [float(f"{value:.9g}") if math.isfinite(value) else math.nan for value in values]


def false_colours(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Makes an image (C, H, W) one to be looked at, uint8 (H, W, 3): its first three channels as red, green and blue.

    Fewer are grey. Each is stretched from its 2nd to its 98th percentile. What is uint8 (3, H, W) stays as it is.
    """
    shown = pixels[:3] if len(pixels) >= 3 else np.repeat(pixels[:1], 3, axis=0)
    if pixels.dtype == np.uint8 and len(pixels) == 3:
        return np.ascontiguousarray(shown.transpose(1, 2, 0))
    low, high = np.percentile(shown, (2, 98), axis=(1, 2))[:, :, None, None]
    stretched = (shown - low) / np.maximum(high - low, np.finfo(np.float32).tiny)
    colours: NDArray[np.uint8] = np.rint(255 * stretched.clip(0, 1)).astype(np.uint8).transpose(1, 2, 0)
    return colours
