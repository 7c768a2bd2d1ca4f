"""One delta on several tasks at once, with a head for each (P-Tuning v2's multi-task setting, Liu et al., ACL 2022)."""

from __future__ import annotations

from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from vpt.data import ImageDataModule
from vpt.errors import ConfigError, DivergedError
from vpt.tasks.base import Batch
from vpt.tasks.classification import ClassificationTask
from vpt.tasks.optimizers import build_optimizer, warmup_cosine


class MultiTask(L.LightningModule):
    """Trains the delta of a task together on several data sets; every step sees a batch of each.

    The loss is the mean of the tasks' cross-entropies. What is kept is the delta; the heads only serve its training.
    """

    def __init__(self, task: ClassificationTask, classes: dict[str, int]) -> None:
        """Takes over delta and backbone of a task, and draws a head for each data set.

        Args:
            task: On the backbone, with the delta to be trained.
            classes: Number of classes by name of the data.

        Raises:
            ConfigError: There are fewer than two data sets, or there is nothing to share.
        """
        super().__init__()
        if len(classes) < 2:
            raise ConfigError(f"Shared training needs at least two tasks, got {', '.join(classes)}.")
        if task.model.delta is None:
            raise ConfigError("Shared training needs a delta that the tasks share, such as PromptTuning's.")
        self.task = task
        self.names = list(classes)
        heads = [nn.Linear(task.model.head.in_features, count) for count in classes.values()]
        for head in heads:
            nn.init.trunc_normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
        self.heads = nn.ModuleList(heads)

    def train(self, mode: bool = True) -> MultiTask:
        """Leaves frozen parts in eval mode, as the task does."""
        super().train(mode)
        self.task.train(mode)
        return self

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> Tensor:
        """Mean cross-entropy of a batch of each task.

        Args:
            batch: By name of the data.
            batch_idx: Its position.

        Returns:
            A scalar.

        Raises:
            DivergedError: The loss is not finite.
        """
        losses = []
        for name, head in zip(self.names, self.heads, strict=True):
            logits = head(self.task.model.backbone(batch[name]["image"]))
            losses.append(nn.functional.cross_entropy(logits, batch[name]["label"]))
            self.log(f"train/loss/{name}", losses[-1], batch_size=len(logits))
        loss = torch.stack(losses).mean()
        if not bool(loss.detach().isfinite()):
            raise DivergedError(f"The loss is not finite in epoch {self.current_epoch}: lower base_lr.")
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimiser and schedule of the task, over delta and heads."""
        options: Any = self.task.hparams
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        delta = cast("nn.Module", self.task.model.delta)
        trained = [p for p in [*delta.parameters(), *self.heads.parameters()] if p.requires_grad]
        rate = options["base_lr"] * self._batch / 256
        optimizer = build_optimizer(trained, options["optimizer"], rate, options["weight_decay"], options["momentum"])
        schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, steps, options["warmup"]))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def _batch(self) -> int:
        loaders = cast("dict[str, Any]", self.trainer.train_dataloader)
        return max(int(loader.batch_size) for loader in loaders.values())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what trains."""
        checkpoint["state_dict"] = {key: p for key, p in self.named_parameters() if p.requires_grad}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Completes a checkpoint with what is frozen."""
        checkpoint["state_dict"] = self.state_dict() | checkpoint["state_dict"]


class SharedData(L.LightningDataModule):
    """A batch of each of several data sets a step; shorter ones start again until the longest is through."""

    def __init__(self, parts: dict[str, ImageDataModule]) -> None:
        """Keeps the data modules.

        Args:
            parts: By name.
        """
        super().__init__()
        self.parts = parts

    def prepare_data(self) -> None:
        """Decodes what is not decoded yet."""
        for part in self.parts.values():
            part.prepare_data()

    def setup(self, stage: str) -> None:
        """Sets all of them up."""
        for part in self.parts.values():
            part.trainer = self.trainer
            part.setup(stage)

    def train_dataloader(self) -> CombinedLoader:
        """All training loaders as one."""
        loaders = {name: part.train_dataloader() for name, part in self.parts.items()}
        return CombinedLoader(loaders, "max_size_cycle")
