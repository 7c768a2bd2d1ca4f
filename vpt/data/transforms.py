"""Named preprocessing: from an image of any size to one of a fixed size.

The field uses incompatible pipelines under one name, and accuracy moves by up to 15 points between them: a preset is
therefore part of every number and travels in the delta file. What comes out is uint8, or of images of channels float32;
mean and standard deviation are applied by the backbone, which reads :attr:`Preset.normalization`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vpt.data.channels import Channels, Raster, as_channels, count
from vpt.errors import ConfigError, UnknownNameError
from vpt.image_size import ImageSize, sides

RESIZE_RULES = ("square", "shorter_crop", "pad")
INTERPOLATIONS = ("bilinear_legacy", "bilinear", "bicubic", "nearest")
NORMALIZATIONS = ("imagenet", "inception", "weights", "none")
_TFDS, _DUMP, _OWN_FILES = "TFDS's uint8, lossless", "a dump of JPEG files", "the authors' JPEG files"
_LONGEST = 16
"""Aspect ratio above which the ends are cut off before an image is scaled: 5000×1 would become 1,280,000×256."""


@dataclass(frozen=True)
class Preset:
    """One way from an image of any size to ``image_size`` pixels; docs/data.md has a table of them.

    A preset fixes resize and normalisation. Source format and splits belong to the data at hand; what the papers did is
    written into ``run.json`` beside what was done here, and a number is comparable with a paper's only if they agree.
    This package reports the last epoch, never one that the test set chose.

    Attributes:
        name: Name in :data:`PRESETS`.
        resize: ``"square"`` ignores the aspect ratio; ``"shorter_crop"`` scales the shorter side to ``image_size /
            crop_fraction`` and cuts the centre (of a size that is not square, until it covers that size);
            ``"pad"`` scales the longer side to ``image_size`` and fills the rest.
        interpolation: ``"bilinear"`` and ``"bicubic"`` are PIL's, with antialiasing; ``"bilinear_legacy"`` is
            TensorFlow 1's (:func:`resize_bilinear_legacy`); ``"nearest"`` is for masks.
        normalization: What the backbone has to apply: ``"imagenet"`` or ``"inception"`` statistics, those of the
            ``"weights"`` in use, or ``"none"`` for plain [0, 1].
        crop_fraction: Share of the scaled shorter side that the crop keeps, in (0, 1]; unused by ``"square"``.
        fill: What ``"pad"`` fills with, 0 to 255: ImageNet's mean colour; `channels` are continued from their edge.
        channels: What is read of each image file, as numbers that are never scaled (:mod:`vpt.data.channels`); None for
            8-bit RGB. The backbone then applies statistics of these channels.
        source: In which form its papers read the images; `splits` says on what they train, choose and test.
    """

    name: str
    resize: str
    interpolation: str
    normalization: str
    crop_fraction: float = 1.0
    fill: tuple[int, int, int] = (124, 116, 104)
    channels: Channels | None = None
    source: str = field(default="any", compare=False)
    splits: str = field(default="as the data say", compare=False)

    def __post_init__(self) -> None:
        for kind, value, known in (
            ("resize rule", self.resize, RESIZE_RULES),
            ("interpolation", self.interpolation, INTERPOLATIONS),
            ("normalization", self.normalization, NORMALIZATIONS),
        ):
            if value not in known:
                raise UnknownNameError(kind, value, known)
        if not 0 < self.crop_fraction <= 1:
            raise ConfigError(f"Preset {self.name!r} has crop_fraction {self.crop_fraction}; it must lie in (0, 1].")

    def __call__(self, image: Image.Image | Raster, image_size: ImageSize) -> NDArray[Any]:
        """Resizes one image of any size and cuts its centre: RGB to uint8 (height, width, 3), else float32."""
        return centre_crop(self.scale(image, image_size), image_size)

    def scale(self, image: Image.Image | Raster, image_size: ImageSize) -> NDArray[Any]:
        """Resizes one image without cutting it, but for one that is more than 16 times as long as it is wide.

        Of that the central part of ratio 16 is taken. Returns uint8 (H, W, 3), or float32 (H, W, C), with both sides at
        least those of image_size, of the crop to come, and equal to them for ``"square"`` and ``"pad"``.
        """
        high, wide = sides(image_size)
        if self.resize == "square":
            return _resize(image, wide, high, self.interpolation)
        image = _without_ends(image)
        if self.resize == "pad":
            return self._padded(image, wide, high)
        # timm rounds the scaled side down, torchvision truncates the longer side.
        least = math.floor(wide / self.crop_fraction), math.floor(high / self.crop_fraction)
        # The side that limits is scaled to what the crop needs; of a square crop that is the shorter one.
        limit = 0 if least[0] * image.height >= least[1] * image.width else 1
        width, height = (int(least[limit] * side / image.size[limit]) for side in image.size)
        return _resize(image, width, height, self.interpolation)

    def _padded(self, image: Image.Image | Raster, width: int, height: int) -> NDArray[Any]:
        """Scales an image until it fits, in the middle of `fill`; channels are continued from their edge."""
        share = min(width / image.width, height / image.height)
        wide, high = max(1, min(round(share * image.width), width)), max(1, min(round(share * image.height), height))
        left, top = (width - wide) // 2, (height - high) // 2
        if self.channels is not None:  # whose unit knows no colour that says nothing
            margins = ((top, height - high - top), (left, width - wide - left), (0, 0))
            return np.pad(_resize(image, wide, high, self.interpolation), margins, mode="edge")
        page = np.empty((height, width, 3), np.uint8)
        page[:] = self.fill
        page[top : top + high, left : left + wide] = _resize(image, wide, high, self.interpolation)
        return page

    @property
    def dtype(self) -> type[np.uint8] | type[np.float32]:
        """Of what comes out."""
        return np.uint8 if self.channels is None else np.float32

    @property
    def num_channels(self) -> int:
        """Of what comes out."""
        return 3 if self.channels is None else count(self.channels)

    @property
    def image_kind(self) -> str:
        """What comes out, as of a `Backbone`."""
        return "8-bit RGB" if self.channels is None else f"{self.num_channels} channels"

    def to_dict(self) -> dict[str, Any]:
        """Returns what happens to an image as plain strings and numbers, for delta files."""
        pads = self.resize == "pad" and self.channels is None
        own = {"fill": pads, "channels": self.channels is not None, "source": False, "splits": False}
        told = {key: value for key, value in asdict(self).items() if own.get(key, True)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in told.items()}

    def of(self, channels: Any) -> Preset:
        """This one for images of so many channels, or of those listed; itself for None. A ConfigError for others."""
        if channels is None:
            return self
        return replace(self, channels=as_channels(channels))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preset:
        """Inverse of :meth:`to_dict`; a ConfigError where a field is missing or unknown."""
        try:
            plain: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
            }
            return cls(**plain).of(plain.get("channels"))
        except TypeError as error:
            raise ConfigError(f"Not the description of a preset: {dict(values)!r} ({error}).") from error


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "vpt", "square", "bilinear_legacy", "imagenet", source=_TFDS, splits="train800 to val200, then both to test"
        ),
        Preset(
            "adapter_plus", "square", "bilinear_legacy", "inception", source=_TFDS, splits="both to test, no validation"
        ),
        Preset("noah", "square", "bicubic", "imagenet", source=_DUMP, splits="both to test, which chose the epoch"),
        Preset(
            "fgvc", "shorter_crop", "bilinear", "imagenet", 0.875, source=_OWN_FILES, splits="train to val, then test"
        ),
        Preset("timm", "shorter_crop", "bicubic", "weights", crop_fraction=0.9),
        Preset("square", "square", "bicubic", "weights"),
        Preset("pad", "pad", "bicubic", "weights"),
    )
}


def get_preset(name: str, channels: Any = None) -> Preset:
    """Looks a preset up, for images of channels (`Preset.of`); an UnknownNameError where there is none of that name.

    ``"square"`` is the default of the configs: like every VTAB pipeline it keeps the whole image (a centre crop can cut
    the object off, which counts on tasks about position and size), it resizes with antialiasing, as the weights saw
    their training images, and it normalises with the statistics that the weights were trained with. It is no paper's
    pipeline: to compare with a published number take that paper's preset.
    """
    if name not in PRESETS:
        raise UnknownNameError("preset", name, PRESETS)
    return PRESETS[name].of(channels)


def _without_ends(image: Image.Image | Raster) -> Image.Image | Raster:
    longest = _LONGEST * min(image.size)
    if max(image.size) <= longest:
        return image
    left, top = ((side - min(side, longest)) // 2 for side in image.size)
    return image.crop((left, top, left + min(image.width, longest), top + min(image.height, longest)))


def centre_crop(image: NDArray[Any], image_size: ImageSize) -> NDArray[Any]:
    """Cuts the centre, (height, width, C), contiguous; the corner is rounded as torchvision does.

    An image (H, W, C) of that size is returned itself.
    """
    height, width = sides(image_size)
    top, left = round((image.shape[0] - height) / 2), round((image.shape[1] - width) / 2)
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def resize_bilinear_legacy(image: NDArray[Any], height: int, width: int) -> NDArray[np.float32]:
    """Resizes (H, W, C) of any range as ``tf.image.resize_bilinear`` of TensorFlow 1 does by default.

    In float32 as its kernel. Source position = target position × scale: no half-pixel centres, no antialiasing. The
    order of operations is the kernel's too (columns first, then rows).
    """

    def taps(size: int, target: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
        position = np.arange(target, dtype=np.float32) * (np.float32(size) / np.float32(target))
        lower = np.floor(position)
        first = lower.astype(np.intp)
        return first, np.minimum(first + 1, size - 1), position - lower

    y0, y1, dy = taps(image.shape[0], height)
    x0, x1, dx = taps(image.shape[1], width)
    source = image.astype(np.float32)
    left, right = source[:, x0], source[:, x1]
    columns = left + (right - left) * dx[None, :, None]
    top, bottom = columns[y0], columns[y1]
    result: NDArray[np.float32] = top + (bottom - top) * dy[:, None, None]
    return result


def _resize(image: Image.Image | Raster, width: int, height: int, interpolation: str) -> NDArray[Any]:
    if interpolation == "bilinear_legacy" and isinstance(image, Raster):
        return resize_bilinear_legacy(image.pixels, height, width)
    if interpolation == "bilinear_legacy":
        # The reference keeps the fractions; uint8 costs at most half a grey level and a quarter of the memory.
        return np.rint(resize_bilinear_legacy(np.asarray(image), height, width)).astype(np.uint8)
    resized = image.resize((width, height), Image.Resampling[interpolation.upper()])
    return resized.pixels if isinstance(resized, Raster) else np.asarray(resized)
