"""A model is looked at in another state than it is in, and gets its own back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import nn

from vpt.backbones import Backbone
from vpt.tuning import TunedModel


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model and the deltas on it, which need not be parts of it, into eval mode, and each module's back.

    Args:
        model: A `TunedModel`, a `DenseModel` or a `Backbone`.

    Yields:
        Nothing.
    """
    backbone = cast("Backbone", model if isinstance(model, Backbone) else model.backbone)
    deltas = [part for part in backbone.attached if isinstance(part, nn.Module)]
    modes = {module: module.training for part in (model, *deltas) for module in part.modules()}
    try:
        for part in (model, *deltas):
            part.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def strength(model: TunedModel, alpha: float) -> Iterator[None]:
    """Moves a model between the bare backbone and the tuned model, and back to where it was.

    Args:
        model: With or without a delta.
        alpha: 0 for the backbone, 1 for the tuned model.

    Yields:
        Nothing.
    """
    before = model.strength
    model.set_strength(alpha)
    try:
        yield
    finally:
        model.set_strength(before)
