"""A loss beside that of the labels: what all of them can do."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from vpt.argument_types import Options
from vpt.models.classifier import TunedModel

State = dict[str, Tensor]
"""What such a loss remembers of the start of a run; checkpoints keep it."""


class SecondLoss(Options):
    """Options of a loss that is added to the one of the labels in training."""

    def check(self, options: Mapping[str, Any], model: TunedModel, data: Any) -> None:
        """Refuses, by a ConfigError, hyperparameters, models and data modules that it has no meaning for."""

    def start(self, model: TunedModel) -> State:
        """What it remembers of a model before its first step."""
        return {}

    def around(self, model: TunedModel) -> AbstractContextManager[None]:
        """What surrounds the forward pass of each training step; when it ends, nothing of it is left on the model."""
        return nullcontext()

    @abstractmethod
    def loss(
        self, model: TunedModel, state: Mapping[str, Tensor], batch: Mapping[str, Tensor], logits: Tensor, place: str
    ) -> Tensor:
        """The second loss, a scalar.

        Args:
            model: As it is in training.
            state: What `start` gave.
            batch: ``image`` uint8 (B, 3, H, W), ``label`` and ``index`` (B,).
            logits: (B, num_classes), of the batch, computed within `around`.
            place: Names run and epoch, for what is drawn.
        """
