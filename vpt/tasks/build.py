"""Task and data from a plain config: the one place where what a config leaves open is settled, for every command."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.cli import instantiate_class

from vpt.backbones import input_size
from vpt.backbones.normalization import check_normalization
from vpt.data import ImageDataModule
from vpt.errors import ConfigError
from vpt.image_size import ImageSize, as_size, plain_size
from vpt.tasks.classification import ClassificationTask

FROM_DATA = ("num_classes", "image_size", "normalization", "targets")
"""What the data say about a model."""


def image_size(config: Mapping[str, Any]) -> ImageSize:
    """Pixels of the images of a config: what its data say, else its model, else the backbone's own."""
    model = config["model"]["init_args"]
    sizes = ((config["data"].get("init_args") or {}).get("image_size"), model.get("image_size"))
    given = next((size for size in sizes if size is not None), None)
    return input_size(model["backbone"]) if given is None else as_size(given)


def build_data(config: Mapping[str, Any]) -> ImageDataModule:
    """Builds the data module of a config, with images of `image_size`; a DataError where the data cannot be found."""
    section = dict(config["data"])
    section["init_args"] = (section.get("init_args") or {}) | {"image_size": plain_size(image_size(config))}
    data: ImageDataModule = instantiate_class((), section)
    return data


def settle(config: Mapping[str, Any], trained: bool = False) -> tuple[dict[str, Any], ImageDataModule]:
    """Fills in what the data say about the model; returns a new config, and its data module.

    Args:
        config: With ``model`` and ``data``, sections of ``class_path`` (with its module) and ``init_args``.
        trained: The model is that of a checkpoint, whose classes are found in the data by name when it is loaded.

    Raises:
        ConfigError: The two contradict each other.
        DataError: The data cannot be found.
    """
    data, settled = build_data(config), copy.deepcopy(dict(config))
    settled["data"].setdefault("init_args", {})["image_size"] = plain_size(data.image_size)
    args = settled["model"]["init_args"]
    for key in FROM_DATA:
        if key == "normalization" and data.preset.channels is not None and args.get(key) is not None:
            _check_channels(args[key], data)  # given, or those that a model was trained with: none are computed
            continue
        truth = plain_size(data.image_size) if key == "image_size" else getattr(data, key)
        if key == "image_size" and args.get(key) is not None:
            args[key] = plain_size(as_size(args[key]))
        if trained and key == "num_classes" and args.get(key) is not None:
            continue
        if args.get(key) not in (None, truth):
            raise ConfigError(
                f"model.{key} is {args[key]!r}, but the data {data.name!r} has {truth!r}: leave model.{key} out, "
                "it comes from the data."
            )
        if truth != "multiclass":  # which a model is of by itself
            args[key] = truth
        elif key in args:
            args[key] = None
    return settled, data


def _check_channels(normalization: Any, data: ImageDataModule) -> None:
    check_normalization(normalization)
    found = None if isinstance(normalization, str) else len(normalization["mean"])
    if found != data.preset.num_channels:
        raise ConfigError(
            f"model.normalization is {normalization!r:.100}, but the data {data.name!r} have {data.preset.image_kind}: "
            "give mean and std of each, or leave it out for those of the training images."
        )


def build(config: Mapping[str, Any]) -> tuple[ClassificationTask, ImageDataModule]:
    """Builds task and data of a config as `settle` settles it; a VPTError for what either refuses."""
    settled, data = settle(config)
    task = instantiate_class((), settled["model"])
    if not isinstance(task, ClassificationTask):
        raise ConfigError(
            f"Experiments and profiles are of classifiers only: run {type(task).__name__} with `vpt fit`."
        )
    return task, data
