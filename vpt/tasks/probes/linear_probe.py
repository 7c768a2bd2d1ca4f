"""A linear head alone: trained by gradient, or solved for."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler

from vpt.errors import ConfigError, UnknownNameError, check_number
from vpt.models.closed_form import fit_class_means, fit_ridge
from vpt.models.logistic_regression import Fit, choose_l2, fit_logistic
from vpt.tasks.probes.one_pass import OnePass, Rows

SOLVERS: dict[str, Fit] = {
    "lbfgs": fit_logistic,
    "ridge": fit_ridge,
    "ncm": lambda features, labels, num_classes, _: fit_class_means(features, labels, num_classes),
}
"""How a head is found from the features of an epoch; the last one has no penalty."""


class LinearProbe(OnePass):
    """A linear head on the pooled features of a frozen backbone.

    Without augmentation each image passes through the backbone once; later epochs use cached features.
    """

    option = "l2"

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
        self.candidates = penalties[:1] if solver == "ncm" else penalties
        if solver != "gradient":
            self.without_gradients(f"solver {solver}")

    @property
    def _solver(self) -> Fit:
        return SOLVERS[self.hparams["solver"]]

    def choose(self, rest: Rows, val: Rows) -> float:
        """See `OnePass.choose`: the penalty; ties go to the stronger one."""
        return choose_l2(rest, val, self.model.head.out_features, self.candidates, fit=self._solver)

    def fit_head(self, rows: Rows, choice: float) -> None:
        """See `OnePass.fit_head`; logs the loss that is left."""
        head, (features, labels) = self.model.head, rows
        weight, bias = self._solver(*rows, head.out_features, choice)
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)
            loss = self.loss(self.model.classify(features), {"label": labels})
        self.log("train/loss", loss, prog_bar=True, batch_size=len(labels))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Builds optimiser and schedule; for another solver one that never moves anything.

        Lightning counts steps, and keeps a checkpoint, only where an optimiser steps.
        """
        if self.automatic_optimization:
            return super().configure_optimizers()
        return torch.optim.SGD(self.model.head.parameters(), lr=0.0)
