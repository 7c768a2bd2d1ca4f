"""What figures are drawn of: a model with some images, from files or from a task's test split."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vpt.data import ImageDataModule, ImageDataset, Preset
from vpt.data.images import decode_rgb
from vpt.errors import ConfigError, DataError
from vpt.models import TunedModel, load_classifier
from vpt.robustness.evaluation.evaluate import check_data
from vpt.visualize.attention_maps import AttentionMaps, attention_maps, strength

_CROWD = 64  # images that are searched for patches
_IN_FOLDER = 6  # images that a folder stands for
_MOST = 32
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"}


class Scene:
    """A model and the images that it is looked at with; everything is measured once, when it is first needed.

    Attributes:
        model: With or without prompts.
        images: A few, uint8 (B, 3, H, W).
        labels: Theirs, int64 (B,), or None where they are not known.
        crowd: Many, uint8 (N, 3, H, W).
        crowd_labels: Theirs, or None.
    """

    def __init__(
        self, model: TunedModel, images: Tensor, labels: Tensor | None, crowd: Tensor, crowd_labels: Tensor | None
    ) -> None:
        """Keeps what is given; see the attributes."""
        self.model, self.images, self.labels = model, images, labels
        self.crowd, self.crowd_labels = crowd, crowd_labels

    @property
    def names(self) -> list[str]:
        """Class names of the few images; empty where they are not known."""
        return [] if self.labels is None else [self.model.class_names[label] for label in self.labels.tolist()]

    @cached_property
    def tuned(self) -> AttentionMaps:
        """Maps of the few images."""
        return attention_maps(self.model, self.images)

    @cached_property
    def untuned(self) -> AttentionMaps | None:
        """The same at strength 0; None without a delta that could be taken away."""
        if self.model.delta is None:
            return None
        with strength(self.model, 0.0):
            return attention_maps(self.model, self.images)

    @cached_property
    def searched(self) -> tuple[Tensor, AttentionMaps]:
        """Images evenly from the crowd, and their maps."""
        images = self.crowd[:: -(-len(self.crowd) // _CROWD)]
        return images, attention_maps(self.model, images)


def sample_images(dataset: ImageDataset, number: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draws one image each of a few classes.

    Args:
        dataset: A split of a data module.
        number: How many, at least 1; fewer come back if there are fewer classes.
        seed: Of the draw.

    Returns:
        Images uint8 (B, 3, H, W) and labels int64 (B,).

    Raises:
        ConfigError: The number is less than 1.
    """
    if number < 1:
        raise ConfigError(f"The number of images must be at least 1, got {number}.")
    generator = np.random.default_rng(seed)
    classes = generator.permutation(np.unique(dataset.labels))[:number]
    index = [int(generator.choice(np.flatnonzero(dataset.labels == label))) for label in classes]
    return torch.stack([dataset[i]["image"] for i in index]), torch.from_numpy(classes)


def sample_crowd(dataset: ImageDataset, classes: int = 10, per_class: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draws several images each of a few classes.

    Args:
        dataset: A split of a data module.
        classes: How many, at least 1; fewer if there are fewer.
        per_class: Images of each, at least 1; fewer where there are fewer.
        seed: Of the draw.

    Returns:
        Images uint8 (B, 3, H, W) and labels int64 (B,), ascending.
    """
    generator = np.random.default_rng(seed)
    drawn = np.sort(generator.permutation(np.unique(dataset.labels))[:classes])
    index = [generator.permutation(np.flatnonzero(dataset.labels == label))[:per_class] for label in drawn]
    chosen = np.concatenate(index)
    return torch.stack([dataset[int(i)]["image"] for i in chosen]), torch.from_numpy(dataset.labels[chosen])


def scene_from_files(delta: Path, images: Sequence[Path], weights: str | None = None) -> Scene:
    """Prepares all kinds of figures for image files.

    Args:
        delta: A delta file.
        images: Image files; a folder stands for the first six images in and below it, by name.
        weights: Where the backbone's weights are; None for where they were at training time.

    Returns:
        The scene; classes are not known in it.

    Raises:
        ConfigError: There are more than 32 images.
        DataError: There is no image, or one cannot be read.
        DeltaFileError: The file is not a delta file, or belongs to other weights.
        WeightsError: The backbone's weights cannot be found.
    """
    model = load_classifier(delta, weights).float()  # figures are drawn in single precision
    batch = _batch(model, images)
    return Scene(model, batch, None, batch, None)


def scene_from_data(
    delta: Path, data: ImageDataModule, weights: str | None = None, number: int = 4, per_class: int = 20
) -> Scene:
    """Prepares all kinds of figures for test images of the task.

    Args:
        delta: A delta file.
        data: The task it was trained on.
        weights: Where the backbone's weights are; None for where they were at training time.
        number: Of images that maps are drawn of, at least 1.
        per_class: Images of each of ten classes for figures of many images.

    Returns:
        The scene.

    Raises:
        ConfigError: The data do not belong to the delta.
        DataError: An image cannot be read.
        DeltaFileError: The file is not a delta file, or belongs to other weights.
        WeightsError: The backbone's weights cannot be found.
    """
    model = load_classifier(delta, weights).float()  # figures are drawn in single precision
    check_data(delta, model, data)
    split = data.split("test")
    return Scene(model, *sample_images(split, number), *sample_crowd(split, per_class=per_class))


def _batch(model: TunedModel, images: Sequence[Path]) -> Tensor:
    preset = Preset.from_dict(model.preset)
    batch = np.stack([_read(path, preset, model.backbone.image_size) for path in _expand(images)])
    return torch.from_numpy(batch).permute(0, 3, 1, 2)


def _expand(paths: Sequence[Path]) -> list[Path]:
    """Files as they are, folders as their first images."""
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES)
            if not inside:
                raise DataError(f"There is no image in the folder {path}.")
            files += inside[:_IN_FOLDER]
        else:
            files.append(path)
    if not files:
        raise DataError("There is no image to draw: give image files or a folder of images.")
    if len(files) > _MOST:
        raise ConfigError(f"A figure has a row for each image and takes {_MOST} at most, got {len(files)}.")
    return files


def _read(path: Path, preset: Preset, image_size: int) -> NDArray[np.uint8]:
    if not path.is_file():
        raise DataError(f"No image {path}.")
    try:
        return preset(decode_rgb(path), image_size)
    except Exception as error:  # PIL raises a dozen unrelated types on damaged files.
        raise DataError(f"{path} cannot be decoded as an image ({error}).") from error
