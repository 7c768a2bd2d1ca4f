"""What every run leaves behind: `run.json`, the record of what was done, and `delta.safetensors`, what came of it."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sized
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from vpt.atomic_write import write_json
from vpt.models.delta_file import save_delta
from vpt.models.provenance import identity
from vpt.run_record import CONFIG_FILE, DELTA_FILE, INIT_FILE, LAST_CHECKPOINT, RUN_FILE
from vpt.tasks.base import TuningTask
from vpt.version import __version__


def run_folder(trainer: L.Trainer) -> Path | None:
    """The folder that a run's files belong to, as the first of several processes sees it.

    Args:
        trainer: With or without logger.

    Returns:
        The folder of the checkpoint that is being evaluated, if that is a run's; else the logger's; None without.
    """
    if trainer.ckpt_path is not None and trainer.state.fn != "fit":
        for folder in Path(trainer.ckpt_path).resolve().parents[:2]:
            if (folder / RUN_FILE).is_file():
                return folder
    # Not `trainer.log_dir`, which all processes have to ask for at once.
    logger = trainer.logger
    place = None if logger is None else getattr(logger, "log_dir", None) or logger.save_dir
    return None if place is None else Path(place)


def last_checkpoint(folder: Path | None = None) -> ModelCheckpoint:
    """Keeps the last epoch in ``last.ckpt``, written after every epoch.

    Which epoch is reported is part of the protocol: validation does not choose it. Lightning's own ``save_last`` with
    ``save_top_k=0`` would write at the very end only.

    Args:
        folder: Where to; None for ``checkpoints`` in the run's folder.
    """
    return ModelCheckpoint(folder, filename="last", enable_version_counter=False, save_on_train_epoch_end=True)


def _written(trainer: L.Trainer, pl_module: L.LightningModule) -> tuple[Path, TuningTask] | None:
    """The folder that this process writes a task's files to, and the task; None for nothing to write."""
    folder = run_folder(trainer)
    if folder is None or not trainer.is_global_zero or not isinstance(pl_module, TuningTask):
        return None
    return folder, pl_module


class RunRecord(L.Callback):
    """Keeps `run.json` up to date: the protocol of every number that the run prints."""

    def __init__(self) -> None:
        """Starts the clock."""
        self._start = time.monotonic()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Counts parameters, prints them, and writes the protocol before anything is trained."""
        self._start = time.monotonic()
        self._update(trainer, pl_module, {"status": "running"})
        if isinstance(pl_module, TuningTask):
            trainable, total = pl_module.model.parameter_counts()
            rank_zero_info(f"Training {trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %).")
            for logger in trainer.loggers:
                logger.log_metrics({"parameters/trainable": trainable, "parameters/total": total}, step=0)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Adds the last epoch's metrics."""
        done = trainer.state.status != "interrupted" and trainer.current_epoch >= (trainer.max_epochs or 0)
        self._update(
            trainer,
            pl_module,
            {
                "status": "finished" if done else "stopped",
                "epochs": trainer.current_epoch,
                "seconds": round(time.monotonic() - self._start, 1),
                "metrics": _metrics(trainer),
                "read": _read_of(trainer, "train") | _read_of(trainer, "val"),
            },
        )

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Says how a run that did not finish ended."""
        if trainer.state.fn == "fit":
            status = "interrupted" if isinstance(exception, KeyboardInterrupt) else "failed"
            self._update(trainer, pl_module, {"status": status, "epochs": trainer.current_epoch})
            folder = run_folder(trainer)
            if status == "interrupted" and folder is not None and (folder / LAST_CHECKPOINT).is_file():
                rank_zero_info(f"To go on: vpt fit -c {folder / CONFIG_FILE} --ckpt_path {folder / LAST_CHECKPOINT}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Adds the metrics of a validation that is a run of its own."""
        if trainer.state.fn == "validate":
            self._update(trainer, pl_module, {"metrics": _metrics(trainer), "read": _read_of(trainer, "val")})

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Adds the test metrics."""
        self._update(trainer, pl_module, {"metrics": _metrics(trainer), "read": _read_of(trainer, "test")})

    def _update(self, trainer: L.Trainer, pl_module: L.LightningModule, news: dict[str, Any]) -> None:
        if (found := _written(trainer, pl_module)) is None:
            return
        folder, task = found
        now = protocol(trainer, task)
        path = folder / RUN_FILE
        record = _read(path)
        stage = trainer.state.fn
        if stage is not None and stage != "fit" and record and not _same_data(record, now):
            data = now["data"] or {"name": "data", "fingerprint": ""}
            path = folder / f"{stage.value}-{data['name']}-{data['fingerprint'][:8]}.json"
            record = _read(path)
        if not record or stage == "fit":
            record |= now
        record |= news | {key: record.get(key, {}) | news.get(key, {}) for key in ("metrics", "read")}
        write_json(path, record)


class DeltaWriter(L.Callback):
    """Writes `delta.safetensors` when training ends: the last epoch, never a chosen one."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the file."""
        if (found := _written(trainer, pl_module)) is not None:
            folder, task = found
            task.model.info = protocol(trainer, task) | {"metrics": _metrics(trainer)}
            save_delta(folder / DELTA_FILE, task.model)


class InitWriter(L.Callback):
    """Writes `init.safetensors`, the delta before the first step, for interpolation from there; add it where wanted."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the file, unless training is resumed."""
        if (found := _written(trainer, pl_module)) is not None and trainer.ckpt_path is None:
            folder, task = found
            task.model.info = {"random_head": task.hparams.get("init_head") is None}
            save_delta(folder / INIT_FILE, task.model)


def protocol(trainer: L.Trainer, task: TuningTask) -> dict[str, Any]:
    """Everything that a number of this run depends on.

    Args:
        trainer: The trainer.
        task: The task.

    Returns:
        Plain JSON values: task, hyperparameters, seed, data (preset, counts, fingerprint), backbone, parameters,
        epoch rule and versions.
    """
    data: Any = getattr(trainer, "datamodule", None)
    trainable, total = task.model.parameter_counts()
    seed = os.environ.get("PL_GLOBAL_SEED")
    return {
        "task": type(task).__name__,
        "hyperparameters": dict(task.hparams),
        "seed": None if seed is None else int(seed),
        "max_epochs": trainer.max_epochs,
        "precision": str(trainer.precision),
        "machine": machine(),
        "epoch_rule": "last",
        "data": data.describe() if hasattr(data, "describe") else None,
        "backbone": identity(task.model),
        "parameters": {"trainable": trainable, "total": total},
        "versions": {name: version(name) for name in ("torch", "lightning", "timm", "torchvision", "torchmetrics")}
        | {"vpt": __version__, "python": platform.python_version()},
    }


def machine() -> dict[str, Any]:
    """What numbers may depend on besides versions: processor, threads, accelerator."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    processor = next(named, platform.machine())
    return {"processor": processor, "threads": torch.get_num_threads(), "accelerator": accelerator}


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _same_data(record: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two protocols are of the same lists under the same preprocessing; else their numbers stay apart."""
    keys = ("name", "fingerprint", "preset", "image_size")
    return all((record["data"] or {}).get(key) == (other["data"] or {}).get(key) for key in keys)


def _read_of(trainer: L.Trainer, split: str) -> dict[str, int]:
    """How many images of a split an epoch reads: fewer than it has under ``trainer.limit_*_batches``."""
    loader: Any = trainer.train_dataloader if split == "train" else getattr(trainer, f"{split}_dataloaders")
    batches = trainer.num_training_batches if split == "train" else sum(getattr(trainer, f"num_{split}_batches"))
    if not isinstance(loader, DataLoader) or loader.batch_size is None or not batches:
        return {}
    return {split: int(min(len(cast("Sized", loader.dataset)), batches * loader.batch_size * trainer.world_size))}


def _metrics(trainer: L.Trainer) -> dict[str, float]:
    return {key: float(value) for key, value in trainer.callback_metrics.items()}
