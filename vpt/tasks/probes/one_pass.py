"""Heads that are fitted to the features of all images of an epoch at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from vpt.errors import ConfigError
from vpt.tasks.base import Batch
from vpt.tasks.classification import ClassificationTask

Rows = tuple[Tensor, Tensor]
"""Features (N, dim) of images and their labels (N,)."""

_OF_GRADIENTS = ("ema_decay", "init_head", "start_decay", "keep_answers", "pace", "metric_learning")


class OnePass(ClassificationTask):
    """Collects the features of an epoch and fits the head when it is complete; one epoch is enough.

    A subclass says how: `choose` and `fit_head`.
    """

    candidates: Sequence[Any] = (None,)
    option = "choice"
    """What the candidates are values of."""

    def __init__(self, **task: Any) -> None:
        """Builds the task; see `ClassificationTask`."""
        super().__init__(**task)
        self._epoch: list[tuple[Tensor, Tensor, Tensor]] = []

    def without_gradients(self, how: str) -> None:
        """Turns the optimiser off; a ConfigError where an option has no effect then, with the words for this head."""
        given = [name for name in _OF_GRADIENTS if self.hparams[name] not in (None, 0.0)]
        if others := [*self.reshaped(), *given]:
            raise ConfigError(
                f"{others[0]} has no effect with {how}, where all images count at once, whole and alike: leave it out, "
                "or train a LinearProbe by gradient."
            )
        if self.targets != "multiclass":
            raise ConfigError(f"{how} is of images with one class each, not of {self.targets} targets.")
        self.automatic_optimization = False

    def choose(self, rest: Rows, val: Rows) -> Any:
        """The best of the candidates by the validation images, of heads fitted to the `rest` of the training images."""
        raise NotImplementedError

    def fit_head(self, rows: Rows, choice: Any) -> None:
        """Fits the model's head to training images, which are in the order of their list."""
        raise NotImplementedError

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """The mean loss of a step of the optimiser; or, without one, None.

        Then features are collected, and the head is fitted when the epoch is complete. A DivergedError where the loss
        or a feature is not finite, or the minimum was not reached.
        """
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        self._epoch.append((self.features(batch, "train"), batch["label"], batch["index"]))
        if self.trainer.is_last_batch:  # before validation, which an epoch's end would come after
            self._fit()
        return None

    def _fit(self) -> None:
        gathered = (self.all_gather(torch.cat(column)) for column in zip(*self._epoch, strict=True))
        features, labels, index = (cast("Tensor", tensor) for tensor in gathered)
        features, labels, index = features.flatten(0, -2), labels.flatten(), index.flatten()
        self._epoch = []
        seen: dict[int, int] = {image: row for row, image in enumerate(index.tolist())}
        # Each once, as a distributed sampler repeats images so that all processes get as many; and in one order.
        order = [seen[image] for image in sorted(seen)]
        features, labels, index = features[order], labels[order], index[order]
        choice = self.candidates[0]
        if len(self.candidates) > 1:
            choice = self._chosen(features, labels, index)
            self.log(f"train/{self.option}", choice, batch_size=len(order))
        self.fit_head((features, labels), choice)
        cast("Any", self.optimizers()).step()

    def _chosen(self, features: Tensor, labels: Tensor, index: Tensor) -> Any:
        data = cast("Any", self.trainer).datamodule
        if data is None:
            raise ConfigError(
                f"Several values of {self.option} need a data module with validation images to choose on."
            )
        apart = torch.from_numpy(~data.shared("train", "val")).to(index.device)[index]
        # All images in each process, where a loader gives a share: every process has to choose the same.
        dataset, size = data.split("val"), data.batch_size
        parts = (dataset.batch(range(at, min(at + size, len(dataset)))) for at in range(0, len(dataset), size))
        batches = [{key: part.to(index.device) for key, part in batch.items()} for batch in parts]
        val = torch.cat([self.features(batch, "val") for batch in batches]), torch.cat([b["label"] for b in batches])
        return self.choose((features[apart], labels[apart]), val)
