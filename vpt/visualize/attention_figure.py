"""Attention figures of delta files: for image files, for a task's test images, for images at hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vpt.data import ImageDataModule, ImageDataset, Preset
from vpt.data.images import decode_rgb
from vpt.errors import ConfigError, DataError
from vpt.models import TunedModel, load_classifier
from vpt.reports.style import save_figure
from vpt.robustness.evaluation.evaluate import check_data
from vpt.visualize.figure_kinds import Scene
from vpt.visualize.prompt_attention import draw_attention, has_prompts

_IN_FOLDER = 6  # images that a folder stands for
_MOST = 32
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"}


def attention_figure(delta: Path, images: Sequence[Path], out: Path, weights: str | None = None) -> Path:
    """Draws what a delta file's model attends to on some images, without and with its prompts.

    Args:
        delta: A delta file with prompts.
        images: Image files; a folder stands for the first six images in and below it, by name.
        out: ``.png``, ``.svg`` or ``.pdf``.
        weights: Where the backbone's weights are; None for where they were at training time.

    Returns:
        The figure's path.

    Raises:
        ConfigError: The delta holds no prompts, there are more than 32 images, or `out` has another suffix.
        DataError: There is no image, or one cannot be read.
        DeltaFileError: The file is not a delta file, or belongs to other weights.
        WeightsError: The backbone's weights cannot be found.
    """
    model = _load_prompts(delta, weights)
    return attention_figure_from_batch(model, _batch(model, images), None, out)


def attention_figure_from_data(
    delta: Path, data: ImageDataModule, out: Path, weights: str | None = None, number: int = 4
) -> Path:
    """Draws the same figure for test images of the task, whose classes are known.

    Args:
        delta: A delta file with prompts.
        data: The task it was trained on.
        out: ``.png``, ``.svg`` or ``.pdf``.
        weights: Where the backbone's weights are; None for where they were at training time.
        number: Of images, at least 1.

    Returns:
        The figure's path.

    Raises:
        ConfigError: The delta holds no prompts, the data do not belong to it, or `out` has another suffix.
        DataError: An image cannot be read.
        DeltaFileError: The file is not a delta file, or belongs to other weights.
        WeightsError: The backbone's weights cannot be found.
    """
    model = _load_prompts(delta, weights)
    check_data(delta, model, data)
    images, labels = sample_images(data.split("test"), number)
    return attention_figure_from_batch(model, images, labels, out)


def attention_figure_from_batch(model: TunedModel, images: Tensor, labels: Tensor | None, out: Path) -> Path:
    """Draws the same figure for images that are loaded already.

    Args:
        model: With prompts.
        images: uint8 (B, 3, H, W).
        labels: int64 (B,), or None where they are not known.
        out: ``.png``, ``.svg`` or ``.pdf``.

    Returns:
        The figure's path.

    Raises:
        ConfigError: The model has no prompts, or `out` has another suffix.
    """
    return save_figure(draw_attention(model, images, labels), out)


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
    model = load_classifier(delta, weights)
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
    model = load_classifier(delta, weights)
    check_data(delta, model, data)
    split = data.split("test")
    return Scene(model, *sample_images(split, number), *sample_crowd(split, per_class=per_class))


def _batch(model: TunedModel, images: Sequence[Path]) -> Tensor:
    preset = Preset.from_dict(model.preset)
    batch = np.stack([_read(path, preset, model.backbone.image_size) for path in _expand(images)])
    return torch.from_numpy(batch).permute(0, 3, 1, 2)


def _load_prompts(delta: Path, weights: str | None) -> TunedModel:
    model = load_classifier(delta, weights)
    if not has_prompts(model):
        raise ConfigError(
            f"{delta} holds no prompts, so there is nothing to compare: give a prompt run's delta file, "
            "or ask for other kinds of figures (`vpt attention --kind all`)."
        )
    return model


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
