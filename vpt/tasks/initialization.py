"""What training takes from its images before the first step: prompts from their tokens, a head from the exact probe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.distributed.tensor import DTensor

from vpt.data import ImageDataModule, MaskDataModule
from vpt.deltas.base import TrainingImages
from vpt.errors import ConfigError
from vpt.models.logistic_regression import choose_l2, fit_logistic
from vpt.models.prediction import Bar, batch_answers
from vpt.run_record import global_seed
from vpt.screen import console, progress
from vpt.tasks.parallel import shared_as

if TYPE_CHECKING:
    from vpt.backbones.strength import Strength
    from vpt.models.classifier import AdaptedModel, TunedModel

PENALTIES = (0.001, 0.003, 0.01, 0.03, 0.1)
"""Of the head's weights, among which one is chosen; more on the side of the best one, where that is at an end."""


def check_start(model: AdaptedModel, data: Any, file: str | None = None) -> None:
    """Refuses, by a ConfigError, deltas that start from training images where there are none, or without classes.

    Where they start from the values of a `file` instead there is nothing to refuse.
    """
    starting = [part for part in model.parts() if part.starts_from_images and file is None]
    if starting and not hasattr(data, "split"):
        raise ConfigError("A delta that starts from training images needs a data module that has them.")
    for part in starting:
        if part.starts_from_classes and _classes(data) is None:
            raise ConfigError(
                f"{type(part).__name__} starts from training images with one class each, which these data have not: "
                "take another delta, another init of prompts, or an init_delta of images that have."
            )


def _classes(data: Any) -> Tensor | None:
    """The class of each training image, int64 (N,); None where an image has other than one."""
    if isinstance(data, MaskDataModule) or getattr(data, "targets", "multiclass") != "multiclass":
        return None
    return torch.as_tensor(data.split("train").labels, dtype=torch.long)


def start_deltas(model: AdaptedModel, data: ImageDataModule, quiet: bool = False) -> None:
    """Gives the deltas that start from training images (`DeltaPart.start_from_images`) what they ask for.

    The images are not augmented. All that is random follows from the run's seed. Bars show how far it is unless it is
    `quiet`.
    """
    if not any(part.starts_from_images for part in model.parts()):
        return
    mode, alpha, split = model.training, model.strength, data.split("train")
    rng = np.random.default_rng(global_seed())
    model.eval()
    model.set_strength(0.0)
    device = model.backbone.mean.device

    def images(rows: Sequence[int]) -> Tensor:
        return cast("Tensor", split.batch(rows)["image"].to(device))

    def shown(steps: Sequence[Any], word: str) -> Iterable[Any]:
        return steps if quiet else progress(steps, word, len(steps), few=20)

    training = TrainingImages(len(split), images, _classes(data), model, shown)
    for part in model.parts():
        part.start_from_images(training, rng)
    model.set_strength(alpha)
    model.train(mode)


def agree(model: AdaptedModel, trainer: L.Trainer) -> None:
    """Gives every process the model of the first: each has computed its own, and gradients alone are shared.

    But for what is in shares (`vpt.tasks.parallel`): those are of one model.
    """
    if trainer.world_size > 1:
        with torch.no_grad():
            for tensor in (each for each in model.owned().values() if not isinstance(each, DTensor)):
                tensor.copy_(trainer.strategy.broadcast(tensor.detach()).to(tensor.device))


def start_at_probe(
    model: TunedModel, data: ImageDataModule, strength: Strength, l2: float | None = None, quiet: bool = False
) -> float:
    """Sets a head to the exact minimum of its regularised cross-entropy over all training images.

    They are not augmented, and the delta has the `strength`: 0 for the frozen backbone. Without `l2` the penalty is the
    one of `PENALTIES` with the best accuracy on the validation images, by a head that is fitted to the training images
    that are none of these, as `LinearProbe` has it. All else of the model stays as it was. A bar shows how far it is
    unless it is `quiet`.

    Returns:
        The penalty.

    Raises:
        ConfigError: There are no validation images to choose the penalty on, or all training images are such.
    """
    training, alpha = model.training, model.strength
    model.eval()
    if alpha != strength:
        model.set_strength(strength)
    found = {}
    for name in ("train", "val") if l2 is None else ("train",):
        split = data.split(name)
        features = torch.from_numpy(
            batch_answers(model, split, size=data.batch_size, bar=iter if quiet else _bar(name))[1]
        )
        found[name] = features, torch.as_tensor(split.labels)
    classes = model.head.out_features
    penalty = _chosen(found, data, classes) if l2 is None else l2
    weight, bias = fit_logistic(*found["train"], classes, penalty)
    with torch.no_grad():
        model.head.weight.copy_(shared_as(weight, model.head.weight))
        model.head.bias.copy_(shared_as(bias, model.head.bias))
    if alpha != strength:
        model.set_strength(alpha)
    model.train(training)
    return penalty


def _chosen(found: Mapping[str, tuple[Tensor, Tensor]], data: ImageDataModule, classes: int) -> float:
    apart = torch.from_numpy(~data.shared("train", "val"))
    if not bool(apart.any()) or not len(found["val"][1]):
        raise ConfigError(
            "init_head probe needs training images besides the validation images, and some of these, to choose its "
            "penalty on: add some, or give probe_l2."
        )
    rest = found["train"][0][apart], found["train"][1][apart]
    return choose_l2(rest, found["val"], classes, PENALTIES, widen=True)


def _bar(name: str) -> Bar:
    words = {"train": "training", "val": "validation"}[name]
    return partial(track, description=f"Features of {words} images", console=console(stderr=True))
