"""The ways to adapt a backbone to a classification task."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from vpt.errors import ConfigError, UnknownNameError
from vpt.tasks.base import Batch, ClassificationTask
from vpt.tuning.logistic import fit_logistic


class PromptTuning(ClassificationTask):
    """Visual prompt tuning (Jia et al., ECCV 2022): prompts and a linear head on a frozen backbone."""

    def __init__(
        self,
        num_tokens: int = 10,
        deep: bool = True,
        dropout: float = 0.0,
        dropout_mode: Literal["sample", "shared", "key_value", "prompt"] = "sample",
        **task: Any,
    ) -> None:
        """Builds the task.

        Args:
            num_tokens: Prompts per layer.
            deep: Prompts before every block (VPT-deep) or only before the first (VPT-shallow).
            dropout: Of the prompts, in [0, 1).
            dropout_mode: What is dropped: see `vpt.tuning.prompts.Prompt`.
            **task: See `ClassificationTask`.
        """
        self._prompt = {
            "name": "prompt",
            "num_tokens": num_tokens,
            "deep": deep,
            "dropout": dropout,
            "dropout_mode": dropout_mode,
        }
        super().__init__(**task)

    def specs(self) -> list[dict[str, Any]]:
        """One prompt delta."""
        return [self._prompt]


class LinearProbe(ClassificationTask):
    """A linear head on the pooled features of a frozen backbone.

    Without augmentation each image passes the backbone once; later epochs read its features from memory.
    """

    def __init__(self, solver: Literal["gradient", "lbfgs"] = "gradient", l2: float = 0.01, **task: Any) -> None:
        """Builds the task.

        Args:
            solver: ``gradient`` trains with the optimiser; ``lbfgs`` puts the head at the minimum of the regularised
                cross-entropy over the images of the epoch (`vpt.tuning.logistic`), so that one epoch is enough.
            l2: Penalty on the head's weights with ``lbfgs``, positive; choose it on val200.
            **task: See `ClassificationTask`.

        Raises:
            ConfigError: `l2` is not positive.
            UnknownNameError: The solver does not exist.
        """
        super().__init__(**task)
        if solver not in ("gradient", "lbfgs"):
            raise UnknownNameError("solver", solver, ("gradient", "lbfgs"))
        if l2 <= 0.0:
            raise ConfigError(f"l2 must be positive, got {l2}.")
        self.automatic_optimization = solver == "gradient"
        self._epoch: list[tuple[Tensor, Tensor, Tensor]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """One step of the optimiser; or collects features, and solves for the head when the epoch is complete.

        Args:
            batch: A batch.
            batch_idx: Its position in the epoch.

        Returns:
            The mean loss, a scalar; None with ``lbfgs``.

        Raises:
            DivergedError: The loss is not finite, or the minimum was not reached.
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
        head = self.model.head
        weight, bias = fit_logistic(features[rows], labels[rows], head.out_features, float(self.hparams["l2"]))
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)
        loss = nn.functional.cross_entropy(self.model.classify(features[rows]), labels[rows])
        self.log("train/loss", loss, prog_bar=True, batch_size=len(rows))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig | None:
        """Builds optimiser and schedule, or nothing for ``lbfgs``.

        Returns:
            What Lightning expects.
        """
        return super().configure_optimizers() if self.automatic_optimization else None


class DeltaTuning(ClassificationTask):
    """Any composition of deltas and a linear head on a frozen backbone."""

    def __init__(self, deltas: list[dict[str, Any]], **task: Any) -> None:
        """Builds the task.

        Args:
            deltas: One dict per delta: its ``name`` in `vpt.tuning.DELTAS` and its arguments.
            **task: See `ClassificationTask`.
        """
        self._deltas = deltas
        super().__init__(**task)

    def specs(self) -> list[dict[str, Any]]:
        """The deltas as given."""
        return self._deltas


class FineTuning(ClassificationTask):
    """Full fine-tuning: every parameter of the backbone trains, dropout and drop path as timm sets them."""

    def __init__(self, **task: Any) -> None:
        """Builds the task.

        Args:
            **task: See `ClassificationTask`.
        """
        super().__init__(**task)
        self.model.backbone.unfreeze()
        self._kept = None
