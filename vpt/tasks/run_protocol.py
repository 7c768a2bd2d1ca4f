"""What a number of a run depends on, as plain values for its record."""

from __future__ import annotations

import inspect
import platform
from enum import Enum
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.cli import SaveConfigCallback

from vpt.models.delta_format import identity
from vpt.run_record import PROBE, file_identity, global_seed
from vpt.tasks.base import TuningTask
from vpt.version import versions


def protocol(trainer: L.Trainer, task: TuningTask, read: bool = True) -> dict[str, Any]:
    """Everything that a number of this run depends on, as plain JSON values.

    Task, hyperparameters and the files that it starts from, seed, training, data (preset, counts, fingerprints),
    backbone, parameters, machine and versions. Without `read` the fingerprints are left out where images would have to
    be read for them (`ImageDataModule.hashed`).
    """
    data: Any = getattr(trainer, "datamodule", None)
    describe = getattr(data, "describe" if read or getattr(data, "hashed", True) else "outline", None)
    trainable, total = task.model.parameter_counts()
    starts = {key: task.hparams.get(key) for key in ("init_delta", "init_head")}
    return {
        "task": type(task).__name__,
        # Lightning's command line adds its own, under such names
        "hyperparameters": {key: value for key, value in task.hparams.items() if not key.startswith("_")},
        "starts": {
            key: PROBE if (key, path) == ("init_head", PROBE) else file_identity(Path(path))
            for key, path in starts.items()
            if path is not None
        },
        "seed": global_seed(),
        "max_epochs": trainer.max_epochs,
        "precision": str(trainer.precision),
        "training": _training(trainer),
        "machine": machine(),
        "data": None if describe is None else describe(),
        "backbone": identity(task.model),
        "parameters": {"trainable": trainable, "total": total},
        "versions": versions(),
    }


_SHOWING = (
    *(callbacks.Checkpoint, callbacks.ProgressBar, callbacks.ModelSummary),
    *(callbacks.LearningRateMonitor, callbacks.DeviceStatsMonitor, SaveConfigCallback),
)
"""Callbacks of Lightning that change nothing that is trained."""


_INDIFFERENT = {
    *("logger", "callbacks", "max_epochs", "max_time", "precision", "devices", "num_nodes", "accelerator", "strategy"),
    *("plugins", "fast_dev_run", "barebones", "limit_val_batches", "limit_test_batches", "limit_predict_batches"),
    *("val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps", "log_every_n_steps", "profiler"),
    *("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "enable_autolog_hparams"),
    *("deterministic", "benchmark", "inference_mode", "detect_anomaly", "default_root_dir", "model_registry"),
}
"""Arguments of Lightning's trainer that stand elsewhere in the record, or change no number but by rounding."""
_ALWAYS = (
    "max_steps",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
)


def _training(trainer: L.Trainer) -> dict[str, Any]:
    """What of the trainer a result depends on, beside epochs, precision and data.

    It is all that is not known to be indifferent, arguments of later versions of Lightning included; most of it only
    where it is not the default.
    """
    wiring = trainer._accelerator_connector
    wired = {
        "sync_batchnorm": wiring._layer_sync is not None,
        "use_distributed_sampler": wiring.use_distributed_sampler,
    }
    told: dict[str, Any] = {"devices": trainer.world_size}
    for name, argument in inspect.signature(L.Trainer).parameters.items():
        value = wired.get(name, getattr(trainer, name, argument.default))
        if name in _ALWAYS or (name not in _INDIFFERENT and value != argument.default):
            told[name] = str(value.value) if isinstance(value, Enum) else value
    others = [each for each in callbacks_of(trainer) if not isinstance(each, _SHOWING)]
    foreign = [each for each in others if not type(each).__module__.startswith("vpt.")]
    return told | {"callbacks": sorted(map(_with_settings, foreign))}


def _with_settings(callback: L.Callback) -> str:
    """A callback's class, and those of its arguments that it keeps as plain values."""
    found = {name: getattr(callback, name, None) for name in inspect.signature(type(callback)).parameters}
    plain = {name: value for name, value in found.items() if isinstance(value, int | float | str)}
    return f"{type(callback).__qualname__}({', '.join(f'{name}={value!r}' for name, value in plain.items())})"


def machine() -> dict[str, Any]:
    """What numbers may depend on besides versions: processor, threads, accelerator."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    processor = next(named, platform.machine())
    return {"processor": processor, "threads": torch.get_num_threads(), "accelerator": accelerator}


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    """All callbacks of a trainer."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]
