"""What every run leaves behind: `run.json`, the record of what was done, and `delta.safetensors`, what came of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sized
from math import isfinite
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from vpt.atomic_write import check_writable, write_json
from vpt.errors import ConfigError
from vpt.models.delta_file import fill, save_delta
from vpt.run_record import (
    CONFIG_FILE,
    DELTA_FILE,
    INIT_FILE,
    LAST_CHECKPOINT,
    RUN_FILE,
    TRIAL_FILE,
    identity,
    of_steps,
    read_record,
    training_protocol,
)
from vpt.tasks.base import TuningTask
from vpt.tasks.parallel import images_of_step, whole
from vpt.tasks.run_protocol import callbacks_of, protocol


def run_folder(trainer: L.Trainer) -> Path | None:
    """The folder that a run's files belong to, as the first of several processes sees it.

    It is that of the checkpoint that is being evaluated, if that is a run's; else the logger's; None without.
    """
    if trainer.ckpt_path is not None and trainer.state.fn != "fit" and (own := run_of(trainer.ckpt_path)) is not None:
        return own
    # Not `trainer.log_dir`, which all processes have to ask for at once.
    logger = trainer.logger
    place = None if logger is None else getattr(logger, "log_dir", None) or logger.save_dir
    return None if place is None else Path(place)


def run_of(checkpoint: str | Path) -> Path | None:
    """The folder of the run that a checkpoint belongs to, if it lies in one."""
    return next((each for each in Path(checkpoint).resolve().parents[:2] if (each / RUN_FILE).is_file()), None)


def best_checkpoints(trainer: L.Trainer) -> dict[str, Path]:
    """The checkpoint that each `ModelCheckpoint` with a monitor has found best, by what it watches."""
    found = (each for each in callbacks_of(trainer) if isinstance(each, callbacks.ModelCheckpoint))
    return {str(each.monitor): Path(each.best_model_path) for each in found if each.monitor and each.best_model_path}


def _written(trainer: L.Trainer, pl_module: L.LightningModule) -> tuple[Path, TuningTask] | None:
    """The folder that this process writes a task's files to, and the task; None for nothing to write."""
    folder = run_folder(trainer)
    if folder is None or not trainer.is_global_zero or not isinstance(pl_module, TuningTask):
        return None
    return folder, pl_module


class RunRecord(L.Callback):
    """Keeps `run.json` up to date: the protocol of every number that the run prints.

    `measured` is what the precision was chosen by, if it was; `clock` says how many seconds have passed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = clock()
        self._loaded: dict[str, int] | None = None
        self.validated: int | None = None
        self._protocol: dict[str, Any] | None = None
        self.trained: dict[str, float] = {}
        self._before, self._images = 0.0, 0
        self._over = False
        self.kept: Path | None = None
        self.measured: dict[str, float] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses, before anything is computed, a folder that cannot be written to (OutputError), a damaged record."""
        self._over, self.kept = False, None
        if (found := _written(trainer, pl_module)) is not None:
            check_writable(found[0], folder=True)
            if stage != "fit":
                _read(found[0] / RUN_FILE)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Knows that all is done: what fails from here on is no failure of the run."""
        self._over = True

    def state_dict(self) -> dict[str, Any]:
        """What training has cost so far, all legs of a resumed run together."""
        return {"seconds": self._seconds(), "images": self._images, "measured": self.measured}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting where the checkpoint stood."""
        self._before, self._images = state_dict["seconds"], state_dict["images"]
        self.measured = state_dict.get("measured")

    def _seconds(self) -> float:
        return self._before + self._clock() - self._start

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the images of all devices."""
        self._images += images_of_step(batch, batch_idx, trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Counts parameters, prints them, and writes the protocol before anything is trained."""
        self._start, self._loaded = self._clock(), None
        self.trained = self.trained if trainer.ckpt_path is not None else {}
        self._update(trainer, pl_module, {"status": "running"}, anew=True, read=False)
        if isinstance(pl_module, TuningTask):
            self._protocol = training_protocol(protocol(trainer, pl_module, read=False))
            trainable, total = pl_module.model.parameter_counts()
            rank_zero_info(f"Training {trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %).")
            for logger in trainer.loggers:
                logger.log_metrics({"parameters/trainable": trainable, "parameters/total": total}, step=0)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Adds the last epoch's metrics."""
        epochs, steps = trainer.current_epoch, trainer.global_step
        whole = 0 <= (trainer.max_epochs or 0) <= epochs or 0 <= trainer.max_steps <= steps
        done = whole and trainer.state.status != "interrupted"
        early = any(isinstance(each, callbacks.EarlyStopping) and each.stopped_epoch for each in callbacks_of(trainer))
        status = "finished" if done else "stopped early" if early else "stopped"
        news: dict[str, Any] = {"status": status, "epochs": epochs, "steps": steps}
        news |= {"seconds": round(self._seconds(), 1), "images": self._images}
        read = _read_of(trainer, "train") | _read_of(trainer, "val")
        metrics = _metrics(trainer)
        if any(key.startswith("val/") for key in metrics) and isinstance(pl_module, TuningTask):
            state = {"epochs": epochs, "steps": steps}
            news["evaluated"] = {"val": _told(protocol(trainer, pl_module), state, read.get("val"))}
        if best := best_checkpoints(trainer):
            news["best"] = {monitor: path.name for monitor, path in best.items()}
        self._update(trainer, pl_module, news | {"metrics": metrics, "read": read})

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Says how a run that did not finish ended, and how it goes on where it was stopped, by Ctrl+C or SIGTERM."""
        if trainer.state.fn == "fit" and not self._over:
            status = "interrupted" if isinstance(exception, KeyboardInterrupt | SystemExit) else "failed"
            news = {"status": status, "epochs": trainer.current_epoch, "steps": trainer.global_step}
            self._update(trainer, pl_module, news, read=False)
            folder = run_folder(trainer)
            if folder is None or (folder / TRIAL_FILE).is_file():
                return
            if status == "interrupted" and (folder / LAST_CHECKPOINT).is_file():
                rank_zero_info(f"To go on: vpt fit -c {folder / CONFIG_FILE} --ckpt_path {folder / LAST_CHECKPOINT}")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps what training depends on, and what its last epoch measured: a run may be killed before its record."""
        data: Any = getattr(trainer, "datamodule", None)
        read = training_protocol({"data": data.describe()}) if hasattr(data, "describe") else {}
        checkpoint["protocol"] = None if self._protocol is None else self._protocol | read
        checkpoint["trained"] = {key: each for key, each in _metrics(trainer).items() if key.startswith("train/")}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notes which state of the training is evaluated; refuses to go on with other data, seeds or options."""
        self._loaded = {"epochs": checkpoint["epoch"] + 1, "steps": checkpoint["global_step"]}
        self.trained = checkpoint.get("trained", {})
        before = checkpoint.get("protocol")  # version 0.1.0 did not keep it
        if before is None or trainer.state.fn != "fit" or not isinstance(pl_module, TuningTask):
            return
        before, now = of_steps(before), of_steps(training_protocol(protocol(trainer, pl_module)))
        if differs := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
            told = "; ".join(f"{key} {before.get(key)!s:.24} then, {now.get(key)!s:.24} now" for key in differs[:3])
            raise ConfigError(
                f"Training cannot go on from another run's checkpoint: {told}. Train anew, or as it began."
            )

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses a damaged record before anything is measured."""
        if (found := _written(trainer, pl_module)) is not None:
            _read(found[0] / RUN_FILE)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As before a test, in a validation that is a run of its own."""
        if trainer.state.fn == "validate":
            self.on_test_start(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Adds the metrics of a validation that is a run of its own; notes after which step one in training was."""
        if trainer.state.fn == "validate":
            self._evaluated(trainer, pl_module, "val")
        self.validated = trainer.global_step

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Adds the test metrics."""
        self._evaluated(trainer, pl_module, "test")

    def _update(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        news: dict[str, Any],
        anew: bool = False,
        read: bool = True,
    ) -> None:
        if (found := _written(trainer, pl_module)) is not None:
            folder, task = found
            path = folder / RUN_FILE
            now = protocol(trainer, task, read) | ({"precision_measured": self.measured} if self.measured else {})
            write_json(path, _with(({} if anew else _read(path)) | now, news))

    def _evaluated(self, trainer: L.Trainer, pl_module: L.LightningModule, split: str) -> None:
        """Keeps what was measured in the run's record, or beside it in a file of its own.

        The record holds one evaluation of a split: that of the run's own data, of its last state, of all images, as far
        as there has been one. All others lie in files that are named by what they are of. `kept` is where this one is.
        """
        if (found := _written(trainer, pl_module)) is None:
            return
        folder, task = found
        now = protocol(trainer, task)
        record = _read(folder / RUN_FILE) or now
        state = self._loaded or {"epochs": trainer.current_epoch, "steps": trainer.global_step}
        read = _read_of(trainer, split)
        told = _told(now, state, read.get(split))
        loaded = Path(trainer.ckpt_path or "").name
        if chosen := [monitor for monitor, name in record.get("best", {}).items() if name == loaded]:
            told["chosen_by"] = chosen[0]
        own = told["data"]
        news = {"metrics": _metrics(trainer), "read": read, "evaluated": {split: told}}
        rival = record.get("evaluated", {}).get(split)
        ours = all((record.get("data") or {}).get(key) == value for key, value in own.items())
        if not ours or (rival not in (None, told) and _rank(told, record, split) <= _rank(rival, record, split)):
            self.kept = _apart(folder, split, told)
            write_json(self.kept, _with(now, news))
            return
        if rival not in (None, told):
            metrics = {k: v for k, v in record["metrics"].items() if k.startswith(_PREFIXES[split])}
            write_json(_apart(folder, split, rival), record | {"metrics": metrics, "evaluated": {split: rival}})
        self.kept = folder / RUN_FILE
        write_json(self.kept, _with(record, news))


def _told(now: dict[str, Any], state: dict[str, int], read: int | None) -> dict[str, Any]:
    """What an evaluation is of."""
    data = now["data"] or {}
    own = {key: data.get(key) for key in ("name", "fingerprint", "preset", "image_size")}
    own |= {"channels": data["channels"]} if "channels" in data else {}
    return {"data": own, **state, "precision": now["precision"], "read": read}


_PREFIXES = {"val": ("val/", "trained/"), "test": ("test/",)}


def _with(record: dict[str, Any], news: dict[str, Any]) -> dict[str, Any]:
    both = {key: record.get(key, {}) | news.get(key, {}) for key in ("metrics", "read", "evaluated")}
    return record | news | both


def _apart(folder: Path, split: str, told: dict[str, Any]) -> Path:
    """The file of an evaluation that is not the one of the run's record."""
    return folder / f"{split}-{told['data']['name'] or 'data'}-{identity(told)[:8]}.json"


def _rank(told: dict[str, Any], record: dict[str, Any], split: str) -> tuple[bool, bool]:
    """Whether an evaluation is of the last state of a run, not because it was the best, and of all images."""
    count = (record.get("data") or {}).get("counts", {}).get(split)
    return "chosen_by" not in told and told["steps"] == record.get("steps"), told["read"] == count


class EpochLines(L.Callback):
    """Says what each epoch gave on a line of its own, where no terminal shows a bar."""

    def __init__(self) -> None:
        self._began, self._images, self._validated = 0.0, 0, False

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._began, self._images, self._validated = time.monotonic(), 0, False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the images of all devices."""
        self._images += images_of_step(batch, batch_idx, trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes that the validation metrics are of this epoch."""
        self._validated = True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints loss, validation metrics and trained images a second, validation included in the time."""
        if sys.stdout.isatty() or not trainer.is_global_zero:
            return
        wanted = ("train/", "val/") if self._validated else ("train/",)
        found = [f"{key} {value:.4g}" for key, value in trainer.callback_metrics.items() if key.startswith(wanted)]
        speed = f"{self._images / (time.monotonic() - self._began):,.0f} images/s"
        whole = f" of {trainer.max_epochs}" if (trainer.max_epochs or 0) > 0 else ""
        print(f"epoch {trainer.current_epoch + 1}{whole}: {', '.join([*found, speed])}", flush=True)


class DeltaWriter(L.Callback):
    """Writes `delta.safetensors` when training ends: the last epoch, never a chosen one.

    Beside it `delta-best-MONITOR.safetensors` of each `ModelCheckpoint` with a monitor: the epoch that this has chosen,
    with its ``epoch_rule``.
    """

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the files."""
        with whole(pl_module):
            if (found := _written(trainer, pl_module)) is not None:
                _save(trainer, *found)


def _save(trainer: L.Trainer, folder: Path, task: TuningTask) -> None:
    told = protocol(trainer, task)
    task.model.info = told | {"metrics": _metrics(trainer)}
    save_delta(folder / DELTA_FILE, task.model)
    for monitor, checkpoint in best_checkpoints(trainer).items():
        if checkpoint.is_file():
            _save_checkpoint(folder / best_delta(monitor), task, checkpoint, told | {"epoch_rule": f"best {monitor}"})


def best_delta(monitor: str) -> str:
    """The name of the delta file of the best epoch by a metric, e.g. ``val/acc``."""
    return f"delta-best-{monitor.replace('/', '_')}.safetensors"


def _save_checkpoint(path: Path, task: TuningTask, checkpoint: Path, told: dict[str, Any]) -> None:
    """Writes the delta file of a checkpoint of this task; the task is afterwards as it was."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model, info = task.model, task.model.info
    kept = {key: tensor.detach().clone() for key, tensor in model.owned().items()}
    fill(model, {key.removeprefix("model."): tensor for key, tensor in content["state_dict"].items()}, str(checkpoint))
    try:
        model.info = told | {"epochs": content["epoch"] + 1, "steps": content["global_step"]}
        save_delta(path, model)
    finally:
        fill(model, kept, "the model")
        model.info = info


class InitWriter(L.Callback):
    """Writes `init.safetensors`, the delta before the first step, for interpolation from there; add it where wanted."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the file, unless training is resumed; a head that is fitted first is fitted by now."""
        with whole(pl_module):
            if (found := _written(trainer, pl_module)) is not None and trainer.ckpt_path is None:
                folder, task = found
                task.model.info = {"random_head": task.hparams.get("init_head") is None}
                save_delta(folder / INIT_FILE, task.model)


def _read(path: Path) -> dict[str, Any]:
    return read_record(path.parent) if path.is_file() else {}


def _read_of(trainer: L.Trainer, split: str) -> dict[str, int]:
    """How many images of a split an epoch reads: fewer than it has under ``trainer.limit_*_batches``."""
    loader: Any = trainer.train_dataloader if split == "train" else getattr(trainer, f"{split}_dataloaders")
    batches = trainer.num_training_batches if split == "train" else sum(getattr(trainer, f"num_{split}_batches"))
    if not isinstance(loader, DataLoader) or loader.batch_size is None or not batches:
        return {}
    return {split: int(min(len(cast("Sized", loader.dataset)), batches * loader.batch_size * trainer.world_size))}


def _metrics(trainer: L.Trainer) -> dict[str, float]:
    """What was measured, without a validation of an earlier state than the last (``check_val_every_n_epoch``)."""
    records = [each for each in callbacks_of(trainer) if isinstance(each, RunRecord)] * (trainer.state.fn == "fit")
    stale = any(each.validated != trainer.global_step for each in records)
    found = {key: value for each in records for key, value in each.trained.items()}
    found |= {key: float(value) for key, value in trainer.callback_metrics.items()}
    # JSON has no NaN, which a score of torchmetrics may be, as kappa where there is one class
    return {key: value for key, value in found.items() if isfinite(value) and not (stale and key.startswith("val/"))}
