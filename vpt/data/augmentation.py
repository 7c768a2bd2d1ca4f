"""Training augmentation that depends on nothing but (seed, epoch, index): by name, or a list of transforms."""

from __future__ import annotations

import inspect
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vpt.errors import ConfigError, UnknownNameError
from vpt.image_size import ImageSize, sides

Transforms = Sequence[Mapping[str, Any]]
"""One mapping a transform, in order: ``name`` and its arguments, e.g. ``{"name": "HorizontalFlip", "p": 0.5}``."""

RECIPES: dict[str, Transforms] = {
    "photos": (
        {"name": "RandomResizedCrop", "scale": [0.5, 1.0], "ratio": [0.75, 1.33]},
        {"name": "HorizontalFlip", "p": 0.5},
        {"name": "ColorJitter", "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.02, "p": 0.8},
    ),
    "documents": (  # a mirrored letter is another sign; a page is white beyond its edge
        {"name": "Rotate", "limit": 5, "fill": 255, "p": 0.5},
        {"name": "Perspective", "scale": [0.01, 0.04], "fill": 255, "p": 0.5},
        {"name": "RandomBrightnessContrast", "brightness_limit": 0.2, "contrast_limit": 0.2, "p": 0.5},
        {"name": "GaussianBlur", "sigma_limit": [0.3, 1.0], "p": 0.3},
        {"name": "ImageCompression", "quality_range": [40, 95], "p": 0.3},
    ),
    "satellite": (  # from above nothing is upright
        {"name": "RandomResizedCrop", "scale": [0.7, 1.0], "ratio": [0.9, 1.11]},
        {"name": "D4", "p": 1.0},
        {"name": "RandomBrightnessContrast", "brightness_limit": 0.1, "contrast_limit": 0.1, "p": 0.5},
    ),
    "trivial": ({"name": "HorizontalFlip", "p": 0.5}, {"name": "TrivialAugment"}),
}
"""Lists of transforms with a name; docs/data.md says what each is for."""

_MOVES = frozenset(
    {"HorizontalFlip", "VerticalFlip", "Transpose", "D4", "SquareSymmetry", "RandomRotate90", "Resize", "RandomCrop"}
    | {"CenterCrop", "Crop", "RandomResizedCrop", "RandomSizedCrop", "SmallestMaxSize", "LongestMaxSize", "RandomScale"}
)
"""Transforms that leave values as they are, or between their neighbours, in any unit."""
_FLIPS: Transforms = ({"name": "HorizontalFlip", "p": 0.5}, {"name": "VerticalFlip", "p": 0.5})
AUGMENTATIONS = ("none", "flip", "crop_flip", "fgvc", *RECIPES)
_TRIES = 8  # of a list of transforms on an image of noise, before it is used


class Augmentation:
    """A random change of a training image that is a pure function of the image and (seed, epoch, index).

    Any number of workers and any order of loading therefore give equal pixels. It acts on the resized image, so that
    this can be cached: a crop is cut from ``image_size`` pixels and enlarged, which costs detail. Where `before_crop`
    is True it takes what :meth:`Preset.scale` gives, and not what the preset has cut out of that.

    Attributes:
        name: One of :data:`AUGMENTATIONS`, or ``"custom"`` for a list of one's own.
        transforms: The list of transforms with all that is given to them, plain values; empty where there is none.
    """

    def __init__(
        self, augment: str | Transforms, seed: int, image_size: ImageSize, channels: int | None = None
    ) -> None:
        """Names or lists the change, for a seed ≥ 0 of the run and the size of the result in pixels.

        Images of so many `channels` are float32 in their own unit and take changes of place alone; None for uint8 RGB.

        ``"none"``, ``"flip"`` (mirrored with probability ½), ``"crop_flip"`` (a crop of 8-100 % of the area at aspect
        ratios ¾ to 4/3, then ``"flip"``), ``"fgvc"`` (a crop of the final size anywhere in the scaled image, then
        ``"flip"``: what VPT does on FGVC), one of :data:`RECIPES`, or a list of transforms: those of albumentations by
        the names of their classes, and ``TrivialAugment`` (Müller & Hutter, ICCV 2021, the wide space). A size, height
        or width that a transform needs and is not given is `image_size`.

        Raises:
            UnknownNameError: There is no such name, transform, or argument of a transform.
            ConfigError: The list is empty, an argument does not fit, a transform cannot be applied to an image alone,
                or of colours of images of channels, or the result is not uint8 (height, width, 3), or float32 of its
                channels.
        """
        if isinstance(augment, str) and augment not in AUGMENTATIONS:
            raise UnknownNameError("augmentation", augment, AUGMENTATIONS)
        self.name = augment if isinstance(augment, str) else "custom"
        self.seed = seed
        self.image_size = image_size
        self._kind: tuple[Any, int] = (np.uint8, 3) if channels is None else (np.float32, channels)
        self.before_crop = self.name == "fgvc"
        listed = RECIPES.get(augment, ()) if isinstance(augment, str) else _plain(augment)
        if isinstance(augment, str) and not isinstance(image_size, int):  # a quarter turn would change the size
            listed = [part for each in listed for part in (_FLIPS if each["name"] == "D4" else (each,))]
        self.transforms = [_complete(each, image_size) for each in listed]
        coloured = [] if channels is None else [each for each in self.transforms if not _moves(each["name"])]
        if coloured:
            raise ConfigError(
                f"Transform {coloured[0]['name']!r} changes or fills in colours of 8 bits, and these images have "
                f"channels of their own unit: augment them by 'flip', 'crop_flip', 'fgvc', {', '.join(sorted(_MOVES))}."
            )
        self._steps = [_build(each) for each in self.transforms]
        if self._steps:
            self._try()

    def __call__(self, image: NDArray[Any], epoch: int, index: int) -> NDArray[Any]:
        """Changes image number `index` of its list in an epoch, counted from 0: (height, width, channels).

        It has both sides image_size, or at least that with ``before_crop``. A ConfigError where a transform of a list
        makes another size of it.
        """
        if self.name == "none":
            return image
        # albumentations gives every transform of a Compose the same random numbers: whether an image is mirrored would
        # follow from where it was cut. Each step here has numbers of its own.
        random = np.random.default_rng([self.seed, epoch, index])
        if self._steps:
            return self._apply(image, random)
        if self.name == "crop_flip":
            image = self._resized_crop(image, int(random.integers(2**32)))
        elif self.name == "fgvc":
            height, width = sides(self.image_size)
            top, left = random.integers(image.shape[0] - height + 1), random.integers(image.shape[1] - width + 1)
            image = image[top : top + height, left : left + width]
        return image[:, ::-1] if random.random() < 0.5 else image

    def _resized_crop(self, image: NDArray[Any], seed: int) -> NDArray[Any]:
        library = _albumentations()
        size = sides(self.image_size)
        crop = library.RandomResizedCrop(size=size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
        # A Compose gives other pixels on its second call, so each image gets its own.
        changed: NDArray[Any] = library.Compose([crop], seed=seed)(image=image)["image"]
        return changed

    def _apply(self, image: NDArray[Any], random: np.random.Generator, **how: bool) -> NDArray[Any]:
        for step, seed in zip(self._steps, random.integers(2**32, size=len(self._steps)), strict=True):
            step.set_random_seed(int(seed))
            image = step(image=image, **how)["image"]
        dtype, channels = self._kind
        wanted = (*sides(self.image_size), channels)
        if not isinstance(image, np.ndarray) or image.dtype != dtype or image.shape != wanted:
            names = ", ".join(each["name"] for each in self.transforms)
            raise ConfigError(
                f"The transforms of augment ({names}) make {image.dtype} {tuple(image.shape)} of an image, where "
                f"{dtype.__name__} {wanted} is wanted: end with {{name: Resize}} where the size changes, and leave "
                "normalisation to the backbone."
            )
        return image

    def _try(self) -> None:
        """Applies the list to noise, so that what cannot work is said before training."""
        random = np.random.default_rng(0)
        dtype, channels = self._kind
        noise = random.integers(0, 256, (*sides(self.image_size), channels), np.uint8).astype(dtype)
        try:
            self._apply(noise, random, force_apply=True)
            for _ in range(_TRIES):
                self._apply(noise, random)
        except ConfigError:
            raise
        except Exception as error:  # albumentations and OpenCV raise a dozen unrelated types.
            names = ", ".join(each["name"] for each in self.transforms)
            raise ConfigError(f"The transforms of augment ({names}) cannot be applied ({_line(error)}).") from error


class _TrivialAugment:
    """One operation of random strength, drawn from 14: torchvision's own, on random numbers of its own."""

    def set_random_seed(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, image: NDArray[np.uint8], force_apply: bool = False) -> dict[str, Any]:
        from torchvision.transforms.v2 import TrivialAugmentWide  # type: ignore[import-untyped]

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)  # torch.manual_seed would reach the GPU's generators
            # of PIL: torch's own rotations may differ in a bit with the number of threads
            return {"image": np.asarray(TrivialAugmentWide()(Image.fromarray(image)))}


def _albumentations() -> Any:
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would look for newer versions
    import albumentations  # late: it takes a second or more

    return albumentations


@cache
def _known() -> dict[str, Any]:
    """The transforms of single images by name."""
    library = _albumentations()
    kinds = (library.ImageOnlyTransform, library.DualTransform)
    found = {name: kind for name, kind in vars(library).items() if isinstance(kind, type) and issubclass(kind, kinds)}
    none = {*kinds, library.Transform3D, library.Lambda}
    flat = {n: kind for n, kind in found.items() if kind not in none and not issubclass(kind, library.Transform3D)}
    return flat | {"TrivialAugment": _TrivialAugment}


def _moves(name: str) -> bool:
    """Whether a transform only moves pixels, and fills none; one that is not known is refused later."""
    return name in _MOVES or name not in _known()


def _plain(transforms: Transforms) -> list[dict[str, Any]]:
    """A list of transforms in values of JSON."""
    try:
        listed = json.loads(json.dumps(list(transforms)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"augment must be a list of plain values ({_line(error)}).") from error
    bad = [each for each in listed if not isinstance(each, dict) or not isinstance(each.get("name"), str)]
    if bad or not listed:
        what = json.dumps(bad[0]) if bad else "an empty list"
        raise ConfigError(f"augment is a name, or a list of transforms, e.g. [{{name: D4}}], got {what:.200}.")
    return cast("list[dict[str, Any]]", listed)


def _complete(given: Mapping[str, Any], image_size: ImageSize) -> dict[str, Any]:
    """A transform with the sizes that it needs; refuses arguments that it has not."""
    name = given["name"]
    if name not in _known():
        raise UnknownNameError("transform", name, _known())
    parameters = dict(inspect.signature(_known()[name]).parameters)
    for key in given.keys() - {"name"}:
        if key not in parameters:
            raise UnknownNameError(f"argument of transform {name!r}", key, parameters)
    needed = [key for key, each in parameters.items() if each.default is each.empty and key not in given]
    height, width = sides(image_size)
    sizes = {"size": [height, width], "height": height, "width": width}
    if lacking := [key for key in needed if key not in sizes]:
        raise ConfigError(f"Transform {name!r} needs {', '.join(lacking)}.")
    return {**given, **{key: sizes[key] for key in needed}}


def _build(transform: Mapping[str, Any]) -> Any:
    arguments = {key: value for key, value in transform.items() if key != "name"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # albumentations takes its defaults, and only warns
            return _known()[transform["name"]](**arguments)
    except (TypeError, ValueError, UserWarning) as error:
        faults: list[Any] = getattr(error.__cause__, "errors", list)()  # pydantic's
        texts = [": ".join([*map(str, fault["loc"][:1]), fault["msg"]]) for fault in faults] or [_line(error)]
        raise ConfigError(f"Transform {transform['name']!r} is refused: {'; '.join(texts)}.") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
