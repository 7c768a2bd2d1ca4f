"""Nothing trains: new images are classified by the training images that are nearest to them."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from vpt.backbones import Backbone
from vpt.errors import ConfigError
from vpt.models.nearest_neighbours import TEMPERATURE, K, NeighbourModel, check_neighbours, choose_k
from vpt.tasks.probes.one_pass import OnePass, Rows


class NearestNeighbours(OnePass):
    """The votes of the k nearest training images on the pooled features of a frozen backbone.

    The model keeps the features of all training images (`vpt.models.nearest_neighbours`). There is no training loss:
    each training image is its own nearest neighbour.
    """

    option = "k"
    model: NeighbourModel

    def __init__(self, k: int | list[int] = K, temperature: float = TEMPERATURE, **task: Any) -> None:
        """Builds the task.

        Args:
            k: How many vote, at least 1; all where there are fewer images. Of several, the one with the best validation
                accuracy, by the training images that are not validation images; then all training images are kept.
            temperature: Of the votes, exp(cosine similarity / temperature), from 0.001 to 100.
            **task: See `ClassificationTask`. What is for training by gradient has no effect.

        Raises:
            ConfigError: `k` is empty, or a value is out of range.
        """
        super().__init__(**task)
        self.candidates = list(k) if isinstance(k, list) else [k]
        for each in self.candidates:
            check_neighbours(each, temperature)
        if not self.candidates:
            raise ConfigError("k is a number of neighbours, or a list of several, and the list is empty.")
        self.without_gradients("a head of nearest neighbours")
        self._unmoved = nn.Parameter(torch.zeros(()))

    def _build(self, backbone: Backbone, num_classes: int) -> NeighbourModel:
        return NeighbourModel(backbone, num_classes, temperature=self.hparams["temperature"])

    def choose(self, rest: Rows, val: Rows) -> int:
        """See `OnePass.choose`: how many vote; ties go to the larger number."""
        self.fit_head(rest, self.candidates[0])
        return choose_k(self.model.head, val, self.candidates)

    def fit_head(self, rows: Rows, choice: int) -> None:
        """See `OnePass.fit_head`."""
        self.model.head.keep(*rows, choice)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Builds an optimiser that never moves anything.

        Lightning counts steps, and keeps a checkpoint, only where an optimiser steps.
        """
        return torch.optim.SGD([self._unmoved], lr=0.0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also keeps how many vote."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["neighbours"] = self.model.head.k

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also makes room for the images that a checkpoint keeps; see `TuningTask.on_load_checkpoint`."""
        kept, head = checkpoint["state_dict"].get("model.head.labels"), self.model.head
        if kept is not None:
            head.features = head.features.new_zeros(len(kept), self.model.backbone.num_features)
            head.labels = head.labels.new_zeros(len(kept))
            head.k = checkpoint["neighbours"]
        super().on_load_checkpoint(checkpoint)
