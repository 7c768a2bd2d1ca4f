"""A linear head alone: trained by gradient, or solved for."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from vpt.errors import ConfigError, UnknownNameError, check_number
from vpt.models.closed_form import fit_class_means, fit_ridge
from vpt.models.logistic_regression import Fit, choose_l2, fit_logistic
from vpt.tasks.base import Batch
from vpt.tasks.classification import ClassificationTask

SOLVERS: dict[str, Fit] = {
    "lbfgs": fit_logistic,
    "ridge": fit_ridge,
    "ncm": lambda features, labels, num_classes, _: fit_class_means(features, labels, num_classes),
}
"""How a head is found from the features of an epoch; the last one has no penalty."""


class LinearProbe(ClassificationTask):
    """A linear head on the pooled features of a frozen backbone.

    Without augmentation each image passes through the backbone once; later epochs use cached features.
    """

    def __init__(
        self,
        solver: Literal["gradient", "lbfgs", "ridge", "ncm"] = "gradient",
        l2: float | list[float] = 0.01,
        **task: Any,
    ) -> None:
        """Builds the task.

        Args:
            solver: ``gradient`` trains with the optimiser. The others take the images of the epoch at once, and one
                epoch is enough: ``lbfgs`` finds the exact minimum of the regularised cross-entropy
                (`vpt.models.logistic_regression`), ``ridge`` that of the regularised squared error, and ``ncm`` is the
                nearest class mean (`vpt.models.closed_form`).
            l2: L2 penalty on the head's weights with ``lbfgs`` and ``ridge``, positive. Of several, the one with the
                best validation accuracy, fitted to the training images that are not validation images; then the head is
                fitted to all training images.
            **task: See `ClassificationTask`.

        Raises:
            ConfigError: `l2` is empty or not positive.
            UnknownNameError: The solver does not exist.
        """
        super().__init__(**task)
        if solver not in ("gradient", *SOLVERS):
            raise UnknownNameError("solver", solver, ("gradient", *SOLVERS))
        penalties = list(l2) if isinstance(l2, list) else [l2]
        for each in penalties:
            check_number("l2", each, 0)
        if not penalties or min(penalties) <= 0.0:
            raise ConfigError(f"l2 must be positive, got {l2}.")
        self._candidates = penalties[:1] if solver == "ncm" else penalties
        given = [name for name in ("ema_decay", "init_head", "start_decay") if self.hparams[name] not in (None, 0.0)]
        self.automatic_optimization = solver == "gradient"
        if not self.automatic_optimization and (others := [*self.reshaped(), *given]):
            raise ConfigError(
                f"{others[0]} has no effect with solver {solver}, which takes all images at once, whole and alike: "
                "leave it out, or train with solver gradient."
            )
        if not self.automatic_optimization and self.targets != "multiclass":
            raise ConfigError(f"solver {solver} is of images with one class each, not of {self.targets} targets.")
        self._epoch: list[tuple[Tensor, Tensor, Tensor]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """The mean loss of a step of the optimiser; or, with another solver, None.

        Then features are collected, and the head is solved for when the epoch is complete. A DivergedError where the
        loss or a feature is not finite, or the minimum was not reached.
        """
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        self._epoch.append((self.features(batch, "train"), batch["label"], batch["index"]))
        if self.trainer.is_last_batch:  # before validation, which an epoch's end would come after
            self._solve()
        return None

    def _solve(self) -> None:
        gathered = (self.all_gather(torch.cat(column)) for column in zip(*self._epoch, strict=True))
        features, labels, index = (cast("Tensor", tensor) for tensor in gathered)
        features, labels, index = features.flatten(0, -2), labels.flatten(), index.flatten()
        self._epoch = []
        seen: dict[int, int] = {image: row for row, image in enumerate(index.tolist())}
        rows = list(seen.values())  # a distributed sampler repeats images so that all processes get as many
        features, labels, index = features[rows], labels[rows], index[rows]
        head, l2 = self.model.head, self._candidates[0]
        if len(self._candidates) > 1:
            l2 = self._choose(features, labels, index)
            self.log("train/l2", l2, batch_size=len(rows))
        weight, bias = self._solver(features, labels, head.out_features, l2)
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)
        cast("Any", self.optimizers()).step()
        loss = nn.functional.cross_entropy(self.model.classify(features), labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(rows))

    def _choose(self, features: Tensor, labels: Tensor, index: Tensor) -> float:
        """Chooses `l2` on the validation images, with a head that has not seen them."""
        data = cast("Any", self.trainer).datamodule
        if data is None:
            raise ConfigError("Several values of l2 need a data module with validation images to choose on.")
        apart = torch.from_numpy(~data.shared("train", "val")).to(index.device)[index]
        # All images in each process, where a loader gives a share: every process has to choose the same.
        dataset, size = data.split("val"), data.batch_size
        parts = (dataset.batch(range(at, min(at + size, len(dataset)))) for at in range(0, len(dataset), size))
        batches = [{key: part.to(index.device) for key, part in batch.items()} for batch in parts]
        val = torch.cat([self.features(batch, "val") for batch in batches]), torch.cat([b["label"] for b in batches])
        rest = features[apart], labels[apart]
        return choose_l2(rest, val, self.model.head.out_features, self._candidates, fit=self._solver)

    @property
    def _solver(self) -> Fit:
        return SOLVERS[self.hparams["solver"]]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Builds optimiser and schedule; for another solver one that never moves anything.

        Lightning counts steps, and keeps a checkpoint, only where an optimiser steps.
        """
        if self.automatic_optimization:
            return super().configure_optimizers()
        return torch.optim.SGD(self.model.head.parameters(), lr=0.0)
