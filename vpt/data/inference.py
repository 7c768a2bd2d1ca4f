"""Images in whatever form somebody has them, one after the other as a model takes them: pixels, or why not."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vpt.data.channels import Channels, Raster, as_raster, of_picture
from vpt.data.images import LeftOut, decode, find_images, to_rgb
from vpt.data.transforms import Preset
from vpt.errors import ConfigError, DataError
from vpt.image_size import ImageSize

_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Photo:
    """An image by its path, or by its position where it has none: `pixels` (H, W, C), or the `fault` it has."""

    name: str
    pixels: NDArray[Any] | None
    fault: str = ""


def is_single(images: Any) -> bool:
    """Says whether this is one image and not several: a path of a file, an image of Pillow, or pixels of one."""
    if isinstance(images, str | Path):
        return not os.path.isdir(images)  # noqa: PTH112 - Path.is_dir raises on a name that is too long
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim < 4
    return isinstance(images, Image.Image)


def each_image(images: Any, arrays: bool = False) -> Iterator[Any]:
    """Yields paths, images of Pillow and pixels of single images, of one of these, a folder, a batch or several.

    With `arrays` the files of a folder may also be NumPy's. A ConfigError for what is none of these; a DataError for a
    folder without images.
    """
    if isinstance(images, str | Path) and not is_single(images):
        left = LeftOut()
        found = find_images(Path(images), left, arrays)
        if not found:
            instead = f" (not read: {text})" if (text := left.text(Path(images))) else ""
            raise DataError(f"{images} holds no image{instead}.")
        yield from map(Path, found)
    elif is_single(images):
        yield images
    elif isinstance(images, Iterable) and not isinstance(images, bytes | dict):
        for each in images:
            yield from each_image(each, arrays)
    else:
        raise ConfigError(
            f"Images are paths, folders, images of Pillow, arrays or tensors of uint8, got {type(images).__name__}."
        )


def read_photos(images: Any, preset: Preset, image_size: ImageSize, ahead: int = 64) -> Iterator[Photo]:
    """Yields all images in order, decoded and resized as the preset says; so many are decoded ahead by threads.

    Arrays are uint8 (H, W), (H, W, 3) or (H, W, 4), tensors uint8 (3, H, W); of a preset of channels both are any
    numbers, (H, W, C) or (C, H, W). A damaged file is a `Photo` with a fault. A ConfigError for what is no image.
    """

    def read(position: int, image: Any) -> Photo:
        name = str(image) if isinstance(image, str | Path) else str(position)
        try:
            return Photo(name, preset(_decoded(image, preset.channels), image_size))
        except DataError as error:
            return Photo(name, None, str(error).rstrip("."))

    waiting: deque[Future[Photo]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for position, image in enumerate(each_image(images, preset.channels is not None)):
                waiting.append(pool.submit(read, position, image))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _decoded(image: Any, channels: Channels | None) -> Image.Image | Raster:
    if isinstance(image, str | Path):
        return decode(Path(image), channels)
    if channels is not None:
        try:
            if isinstance(image, Image.Image):
                return of_picture(image, channels)
            plain = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
            return as_raster(plain, None, channels)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"An image of channels is an array (H, W, C) or (C, H, W): {error}.") from error
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ConfigError(f"A tensor of an image is uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}.")
        return Image.fromarray(image.cpu().permute(1, 2, 0).contiguous().numpy())
    if isinstance(image, np.ndarray):
        grey, coloured = image.ndim == 2, image.ndim == 3 and image.shape[2] in (3, 4)
        if image.dtype != np.uint8 or not (grey or coloured) or 0 in image.shape:
            raise ConfigError(
                f"An array of an image is uint8 (H, W), (H, W, 3) or (H, W, 4), got {image.dtype} {image.shape}."
            )
        image = Image.fromarray(np.ascontiguousarray(image))
    try:
        return to_rgb(image)
    except (OSError, ValueError, SyntaxError) as error:  # an image of Pillow may not yet be decoded
        raise DataError(f"the image cannot be decoded ({error})") from error


def in_batches(photos: Iterable[Photo], size: int) -> Iterator[tuple[list[Photo], Tensor]]:
    """Groups photos, with the pixels of those that have no fault: (B, C, H, W), B possibly 0."""
    photos = iter(photos)
    while group := list(islice(photos, size)):
        pixels = [photo.pixels for photo in group if photo.pixels is not None]
        stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) if pixels else torch.empty(0, 3, 0, 0)
        yield group, stacked.contiguous()
