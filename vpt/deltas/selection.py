"""Parameters of the backbone of which a part trains that is selected by gradients on training images."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from vpt.backbones.compilation import eagerly
from vpt.deltas.base import TrainingImages
from vpt.deltas.partial_tuning import Subset
from vpt.errors import ConfigError

Loss = Callable[[Tensor, Tensor], Tensor]
"""A scalar of a batch: of images as the backbone takes them, and of their classes."""


class Selection(Subset):
    """Selects what it trains once, before the first step; a file and a checkpoint keep the selection as buffers."""

    starts_from_classes = True

    @property
    def starts_from_images(self) -> bool:
        """See `DeltaPart`."""
        return not self.started

    @torch.no_grad()
    def start_from_images(self, training: TrainingImages, rng: np.random.Generator) -> None:
        """Selects what is trained; a ConfigError where images have not one class each."""
        if self.started:
            return
        if training.labels is None:
            raise ConfigError(f"{type(self).__name__} selects weights by images with one class each.")
        self._select(training, training.labels, rng)
        self.started = True

    @abstractmethod
    def _select(self, training: TrainingImages, labels: Tensor, rng: np.random.Generator) -> None:
        """Selects, without a gradient, by training images and the class of each."""

    def _gradients(
        self,
        parameters: Mapping[str, nn.Parameter],
        training: TrainingImages,
        labels: Tensor,
        batches: Sequence[Sequence[int]],
        loss: Loss,
    ) -> Iterator[dict[str, Tensor]]:
        """Gradients of parameters of the backbone for each batch of images, which are given by their positions."""
        before = {key: parameter.requires_grad for key, parameter in parameters.items()}
        try:
            for parameter in parameters.values():
                parameter.requires_grad_()
            for rows in batches:
                images, classes = training.images(rows), labels[rows].to(self.backbone.mean.device)
                with torch.enable_grad(), eagerly():
                    found = loss(images, classes)
                each = torch.autograd.grad(found, [*parameters.values()], allow_unused=True, materialize_grads=True)
                yield dict(zip(parameters, each, strict=True))
        finally:
            for key, parameter in parameters.items():
                parameter.requires_grad_(before[key])


def in_batches(order: Sequence[int], size: int) -> list[Sequence[int]]:
    """Consecutive positions, `size` at a time; fewer in the last batch."""
    return [order[start : start + size] for start in range(0, len(order), size)]
