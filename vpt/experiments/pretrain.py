"""One shared delta for several tasks, then each task from there, against each task alone.

All tasks train it at once, with a head for each (P-Tuning v2's multi-task setting, Liu et al., ACL 2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from vpt.data import ImageDataModule
from vpt.data.targets import check_multiclass
from vpt.deltas.composition import Delta
from vpt.errors import ConfigError, DivergedError
from vpt.experiments.executors import Engine
from vpt.experiments.sweep import Outcome, Plan
from vpt.experiments.trial import Config, Failure, claim, identity, merged, trainer_options
from vpt.experiments.variants import sweep_variants
from vpt.models.delta_file import save_delta
from vpt.run_record import TRIAL_FILE
from vpt.tasks.base import Batch
from vpt.tasks.build import build, build_data
from vpt.tasks.checkpoints import last_checkpoint
from vpt.tasks.classification import ClassificationTask
from vpt.tasks.optimizers import check_trainer, scheduled_optimizer, seed_epoch
from vpt.tasks.parallel import whole

SHARED_FILE = "shared.safetensors"


class MultiTask(L.LightningModule):
    """Trains the delta of a task together on several data sets; every step sees a batch of each.

    The loss is the mean of the tasks' cross-entropies. What is kept is the delta; the heads, one for each data set,
    only serve its training. The head of the task itself has no part in it: every parameter here that requires a
    gradient gets one in every step, without which several processes could not train.
    """

    delta: Delta

    def __init__(self, task: ClassificationTask, classes: dict[str, int]) -> None:
        """Takes over delta and backbone of a task, and draws a head for each name of data, with so many classes."""
        super().__init__()
        if len(classes) < 2:
            raise ConfigError(f"Shared training needs at least two tasks, got {', '.join(classes)}.")
        if task.model.delta is None or not list(task.model.delta.parameters()):
            raise ConfigError("Shared training needs a delta that the tasks share, such as PromptTuning's.")
        others = {"head_lr_scale": 1, "ema_decay": 0}
        if idle := [*task.reshaped(), *(name for name, none in others.items() if task.hparams[name] != none)]:
            raise ConfigError(f"Shared training is by the plain cross-entropy and one rate: leave {idle[0]} out.")
        if any(part.starts_from_images for part in task.model.parts()):
            raise ConfigError("Shared training has images of several data sets: take deltas that start from none.")
        self.backbone, self.delta = task.model.backbone, task.model.delta
        self.names = list(classes)
        self._options = dict(task.hparams)
        heads = [nn.Linear(task.model.head.in_features, count) for count in classes.values()]
        for head in heads:
            nn.init.trunc_normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
        self.heads = nn.ModuleList(heads)

    def configure_callbacks(self) -> list[L.Callback]:
        """Adds none, but refuses what a task refuses (`check_trainer`)."""
        check_trainer(self.trainer)
        return []

    def on_train_batch_start(self, batch: dict[str, Batch], batch_idx: int) -> None:
        """Seeds what an epoch draws, such as dropout."""
        if batch_idx == 0:
            seed_epoch(self)

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> Tensor:
        """Mean cross-entropy of a batch of each task, by name of the data; a DivergedError if not finite."""
        losses, parallel = [], self.trainer.world_size > 1
        for name, head in zip(self.names, self.heads, strict=True):
            logits = head(self.backbone(batch[name]["image"]))
            losses.append(nn.functional.cross_entropy(logits, batch[name]["label"]))
            self.log(f"train/loss/{name}", losses[-1], batch_size=len(logits), sync_dist=parallel)
        loss = torch.stack(losses).mean()
        if not bool(loss.detach().isfinite()):
            raise DivergedError(f"The loss is not finite in epoch {self.current_epoch}: lower base_lr.")
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimiser and schedule of the task; the loss is a mean over tasks: more of them make no larger batch."""
        scales = {each: scale for part in cast("Any", self.delta.parts) for each, scale in part.rate_scales().items()}
        trained = [p for p in self.parameters() if p.requires_grad]
        return scheduled_optimizer(trained, self._options, self.trainer, scales)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps delta and heads, which no other file holds."""
        kept = {key: tensor for key, tensor in self.state_dict().items() if key.startswith(("delta.", "heads."))}
        checkpoint["state_dict"] = kept

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Completes a checkpoint with the backbone."""
        checkpoint["state_dict"] = self.state_dict() | checkpoint["state_dict"]


class SharedData(L.LightningDataModule):
    """A batch of each of several data sets a step; shorter ones start again until the longest is through."""

    def __init__(self, parts: dict[str, ImageDataModule]) -> None:
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


def pretrain(configs: Mapping[str, Config], root: Path) -> Path:
    """Trains one delta on all tasks together; continues where an earlier call was stopped.

    The configs, by task, are single runs of the same model; the first's seed and trainer are used. Returns the delta
    file, for ``model.init_delta``; the head in it belongs to no task. A ConfigError where the models differ, there is
    nothing to share, or the folder holds what was trained otherwise.
    """
    path, folder = root / SHARED_FILE, root / "shared"
    first = next(iter(configs.values()))
    if any(config["model"] != first["model"] for config in configs.values()):
        raise ConfigError("Shared training needs the same model section for all tasks.")
    L.seed_everything(first.get("seed_everything", 0), verbose=False)
    task, data = build(first)
    others = [build_data(config) for config in list(configs.values())[1:]]
    for each in (data, *others):
        check_multiclass(each.targets, "vpt pretrain is")
        if each.preset.channels != data.preset.channels:
            raise ConfigError(f"{data.name} and {each.name} have images of other channels: give tasks of the same.")
    if data.preset.channels is not None and first["model"]["init_args"].get("normalization") is None:
        raise ConfigError("Shared training has one normalization, and these tasks their own: give model.normalization.")
    parts = dict(zip(configs, [data, *others], strict=True))
    together = MultiTask(task, {name: part.num_classes for name, part in parts.items()})
    started = checkpoint if (checkpoint := folder / "last.ckpt").is_file() else None
    if (path.is_file() or started) and not (folder / TRIAL_FILE).is_file():
        raise ConfigError(f"{root} does not say what its shared delta was trained on: name another --out.")
    claim(folder, {"tasks": {name: identity(config) for name, config in configs.items()}})
    if path.is_file():
        return path
    trainer = _trainer(first, folder)
    trainer.fit(together, datamodule=SharedData(parts), ckpt_path=started, weights_only=True)
    if trainer.state.status == "interrupted":
        raise KeyboardInterrupt
    task.model.info = {"shared": {name: part.describe() for name, part in parts.items()}}
    with whole(task.model):
        if trainer.is_global_zero:
            save_delta(path, task.model)
    trainer.strategy.barrier()
    return path


def _trainer(config: Config, folder: Path) -> L.Trainer:
    ours: dict[str, Any] = {"enable_checkpointing": True, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    callbacks: list[L.Callback] = [last_checkpoint(folder)]
    return L.Trainer(**trainer_options(config) | ours, callbacks=callbacks, logger=False, enable_model_summary=False)


def compare(configs: Mapping[str, Config], plan: Plan, root: Path, engine: Engine) -> dict[str, Outcome | Failure]:
    """Tunes every task from the shared delta and from nothing, by the same search: ``TASK/alone``, ``TASK/shared``.

    Where the search chooses, the shared delta is trained on what its trials are trained on (train800), for all uses: a
    delta that knew the validation images would make them say nothing.
    """
    seen = plan.choose if len(plan.points()) > 1 else plan.retrain
    shared = str(pretrain({name: merged(config, seen) for name, config in configs.items()}, root).resolve())
    variants = {f"{name}/alone": dict(config) for name, config in configs.items()}
    variants |= {f"{name}/shared": merged(config, {"model.init_delta": shared}) for name, config in configs.items()}
    return sweep_variants(variants, plan, root, engine)
