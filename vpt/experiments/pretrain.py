"""One shared delta for several tasks, then each task from there, against each task alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from vpt.errors import ConfigError
from vpt.experiments.engine import Engine
from vpt.experiments.series import series
from vpt.experiments.sweep import Outcome, Plan
from vpt.experiments.trial import Config, merged
from vpt.models.delta_file import save_delta
from vpt.tasks.build import build, build_data
from vpt.tasks.multitask import MultiTask, SharedData

SHARED_FILE = "shared.safetensors"


def pretrain(configs: Mapping[str, Config], root: Path) -> Path:
    """Trains one delta on all tasks together; continues where an earlier call was stopped.

    Args:
        configs: A single run for each task, all of the same model; the first's trainer and seed are used.
        root: Folder of the experiment.

    Returns:
        The delta file, for ``model.init_delta``. The head in it belongs to no task.

    Raises:
        ConfigError: The models differ, or there is nothing to share.
    """
    path = root / SHARED_FILE
    if path.is_file():
        return path
    first = next(iter(configs.values()))
    if any(config["model"] != first["model"] for config in configs.values()):
        raise ConfigError("Shared training needs the same model section for all tasks.")
    L.seed_everything(first.get("seed_everything", 0), verbose=False)
    task, data = build(first)
    others = [build_data(config) for config in list(configs.values())[1:]]
    parts = {str(part.name): part for part in [data, *others]}
    together = MultiTask(task, {name: part.num_classes for name, part in parts.items()})
    checkpoint = root / "shared" / "last.ckpt"
    trainer = _trainer(first["trainer"], checkpoint)
    started = checkpoint if checkpoint.is_file() else None
    trainer.fit(together, datamodule=SharedData(parts), ckpt_path=started, weights_only=True)
    if trainer.state.status == "interrupted":
        raise KeyboardInterrupt
    task.model.info = {"shared": {name: part.describe() for name, part in parts.items()}}
    return save_delta(path, task.model)


def _trainer(given: dict[str, Any], checkpoint: Path) -> L.Trainer:
    keys = ("max_epochs", "precision", "accelerator", "devices", "deterministic")
    last = ModelCheckpoint(
        checkpoint.parent, filename="last", enable_version_counter=False, save_on_train_epoch_end=True
    )
    return L.Trainer(
        **{key: given[key] for key in keys if given.get(key) is not None},
        callbacks=[last],
        logger=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )


def compare(configs: Mapping[str, Config], plan: Plan, root: Path, engine: Engine) -> dict[str, Outcome]:
    """Tunes every task from the shared delta and from nothing, by the same search.

    Where the search chooses, the shared delta is trained on what its trials are trained on (train800), for all uses: a
    delta that knew the validation images would make them say nothing.

    Args:
        configs: A single run for each task.
        plan: The search of each.
        root: Folder of the experiment.
        engine: Runs the trials.

    Returns:
        By ``TASK/alone`` and ``TASK/shared``.
    """
    seen = plan.choose if len(plan.points()) > 1 else plan.retrain
    shared = str(pretrain({name: merged(config, seen) for name, config in configs.items()}, root).resolve())
    variants = {f"{name}/alone": dict(config) for name, config in configs.items()}
    variants |= {f"{name}/shared": merged(config, {"model.init_delta": shared}) for name, config in configs.items()}
    return series(variants, plan, root, engine)
