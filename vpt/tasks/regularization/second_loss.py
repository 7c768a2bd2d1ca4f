"""A loss beside that of the labels: what all of them can do."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from torch import Tensor

from vpt.argument_types import Options
from vpt.models.classifier import TunedModel

State = dict[str, Tensor]
"""What such a loss remembers of a run so far; checkpoints keep it."""

Seen = dict[str, Tensor]
"""What such a loss sees of the forward pass of a step, besides logits."""


class SecondLoss(Options):
    """Options of a loss that is added to the one of the labels in training.

    Attributes:
        whole_batches: Whether it is no mean over images, so that several processes cannot each compute a part of it.
    """

    whole_batches: ClassVar[bool] = False

    def check(self, options: Mapping[str, Any], model: TunedModel, data: Any) -> None:
        """Refuses, by a ConfigError, hyperparameters, models and data modules that it has no meaning for."""

    def start(self, model: TunedModel, data: Any) -> State:
        """What it remembers of a model before its first step; `data` is the data module."""
        return {}

    def begin_epoch(self, model: TunedModel, state: State) -> State:
        """What it remembers from before the first step of an epoch on, also where training is resumed there."""
        return state

    def around(self, model: TunedModel) -> AbstractContextManager[Seen]:
        """What surrounds the forward pass of each training step; when it ends, nothing of it is left on the model.

        What it gives holds, from then on, what the loss sees of that pass.
        """
        return nullcontext({})

    @abstractmethod
    def loss(
        self, model: TunedModel, state: State, batch: Mapping[str, Tensor], logits: Tensor, place: str, seen: Seen
    ) -> Tensor:
        """The second loss, a scalar.

        Args:
            model: As it is in training.
            state: What `begin_epoch` gave; it may be changed.
            batch: ``image`` uint8 (B, 3, H, W), ``label`` and ``index`` (B,).
            logits: (B, num_classes), of the batch, computed within `around`.
            place: Names run and epoch, for what is drawn.
            seen: What `around` has gathered.
        """
