"""Task and data from a plain config, as `vpt fit` builds them, for what runs many of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.cli import instantiate_class

from vpt.backbones import input_size
from vpt.data import ImageDataModule
from vpt.errors import ConfigError
from vpt.tasks.classification import ClassificationTask

FROM_DATA = ("num_classes", "image_size", "normalization")
"""What the data say about a model."""


def build_data(config: Mapping[str, Any]) -> ImageDataModule:
    """Builds the data module of a config.

    Args:
        config: With ``model.init_args.backbone`` and ``data``, sections of ``class_path`` and ``init_args``.

    Returns:
        The data module, whose images have the size that it says, or else the backbone's own.

    Raises:
        DataError: The data cannot be found.
    """
    section = copy.deepcopy(dict(config["data"]))
    args = section.setdefault("init_args", {})
    if args.get("image_size") is None:
        model = config["model"]["init_args"]
        args["image_size"] = model.get("image_size") or input_size(model["backbone"])
    data: ImageDataModule = instantiate_class((), section)
    return data


def build(config: Mapping[str, Any]) -> tuple[ClassificationTask, ImageDataModule]:
    """Builds task and data of a config; what the task leaves open about its classes and images comes from the data.

    Args:
        config: With ``model`` and ``data``, sections of ``class_path`` (with its module) and ``init_args``.

    Returns:
        The task and the data module.

    Raises:
        ConfigError: The two contradict each other.
        VPTError: What either refuses.
    """
    data = build_data(config)
    section = copy.deepcopy(dict(config["model"]))
    args = section["init_args"]
    for key in FROM_DATA:
        truth = getattr(data, key)
        if args.get(key) not in (None, truth):
            raise ConfigError(f"model.{key} is {args[key]!r}, but {data.name} has {truth!r}: leave model.{key} out.")
        args[key] = truth
    task = instantiate_class((), section)
    if not isinstance(task, ClassificationTask):
        raise ConfigError(
            f"Experiments and profiles are of classifiers only: run {type(task).__name__} with `vpt fit`."
        )
    return task, data
