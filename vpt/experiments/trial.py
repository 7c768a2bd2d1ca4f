"""One trial: a run in a folder of its own that can be stopped at any time, and is never done twice."""

from __future__ import annotations

import copy
import gc
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import yaml
from lightning.pytorch.cli import instantiate_class
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from vpt.atomic_write import write_json, write_text
from vpt.errors import ConfigError
from vpt.models.together import Member, out_of_memory
from vpt.robustness import logit_records
from vpt.run_record import (
    CONFIG_FILE,
    DELTA_FILE,
    ENDED,
    LAST_CHECKPOINT,
    RUN_FILE,
    TRIAL_FILE,
    epoch_rule,
    file_identity,
    finished_record,
    lacking,
    read_json,
    read_record,
    score,
)
from vpt.tasks import DeltaWriter, RunRecord
from vpt.tasks.build import build, build_data
from vpt.tasks.checkpoints import last_checkpoint

Config = dict[str, Any]
Record = dict[str, Any]

ANSWERS_FILE = "test.parquet"
_OURS = ("logger", "callbacks", "default_root_dir", "enable_progress_bar", "enable_model_summary")
_FILES = ("weights", "init_delta", "init_head")


@dataclass(frozen=True)
class Trial:
    """What is to be run, and where.

    Attributes:
        name: Folder below that of the experiment: whatever it is, a trial of something else is refused there.
        config: ``seed_everything``, ``trainer``, ``model`` and ``data`` as in a config of `vpt fit`.
        test: Read the test split once when training has ended.
        stop: Pause after this epoch, with the schedule of the whole training; None for the end.
        values: What sets it apart from others of the experiment, for tables.
    """

    name: str
    config: Config
    test: bool = False
    stop: int | None = None
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A trial that ended without a result, and the reason in one line."""

    reason: str


def val_score(result: Record | Failure) -> float:
    """What trials are chosen by on validation images (`run_record.SCORES`); -∞ where it was not measured."""
    found = score(result, "val") if isinstance(result, dict) else None
    return -math.inf if found is None else found


def merged(config: Mapping[str, Any], values: Mapping[str, Any]) -> Config:
    """Puts values into a new config, the old one as of a `Trial`.

    They are by dotted keys as on the command line: ``model.base_lr``, ``data.train``, ``trainer.max_epochs``,
    ``seed_everything``; a ConfigError where a key is not one of a config.
    """
    new: Config = copy.deepcopy(dict(config))
    for key, value in values.items():
        section, _, name = key.partition(".")
        if "." in name or name in ("class_path", "init_args"):
            section = ""
        if section in ("model", "data") and name:
            new[section].setdefault("init_args", {})[name] = value
        elif section == "trainer" and name:
            new[section][name] = value
        elif key == "seed_everything":
            new[key] = value
        else:
            raise ConfigError(f"{key!r} is no key of a config: model.X, data.X, trainer.X or seed_everything.")
    return new


def identity(config: Config) -> dict[str, Any]:
    """What the result of a config depends on, as plain JSON: itself, and the contents of its data and files."""
    paths = {key: config["model"]["init_args"].get(key) for key in _FILES}
    files = {key: file_identity(Path(path)) for key, path in paths.items() if path is not None and Path(path).is_file()}
    plain: dict[str, Any] = json.loads(json.dumps(config))
    return {"config": plain, "files": files, "data": build_data(config).describe()["fingerprint"]}


def claim(folder: Path, found: Mapping[str, Any]) -> None:
    """Makes a folder that of all that its contents depend on; a ConfigError where it is that of something else.

    A RecordError where it does not say of what it is.
    """
    path = folder / TRIAL_FILE
    if not path.is_file():
        write_json(path, found)
        return
    kept = read_json(path)
    if kept != found:
        differ = ", ".join(sorted(key for key in kept.keys() | found.keys() if kept.get(key) != found.get(key)))
        raise ConfigError(f"{folder} holds a trial that differs in its {differ}: name another --out.")


def finished(trial: Trial, root: Path) -> Record | None:
    """The `run.json` of a trial that has nothing left to do, else None; of one that pauses as it was at its stop.

    A ConfigError if its folder is of another, or of one that did not pause there; a RecordError where a record is
    damaged.
    """
    folder = root / trial.name
    if not (folder / RUN_FILE).is_file() or not (folder / TRIAL_FILE).is_file():
        return None
    claim(folder, identity(trial.config))
    if trial.stop is not None and _at(folder, trial.stop).is_file():
        return read_record(folder, _at(folder, trial.stop).name)
    record = read_record(folder)
    status, epochs = record.get("status"), record.get("epochs", 0)
    if trial.stop is not None and epochs > trial.stop:
        raise ConfigError(
            f"{folder} was trained beyond epoch {trial.stop}, where its search now compares it with others: name "
            "another --out, or go on with the --halving and --first-rung that it began with."
        )
    paused = trial.stop is not None and epochs == trial.stop and status != "running"
    trained = paused or (status in ENDED and (folder / DELTA_FILE).is_file())
    lacks_test = trial.test and "test/loss" not in record.get("metrics", {})
    return record if trained and not lacks_test and not lacking(record, ["epochs", "images", "metrics"]) else None


def _at(folder: Path, stop: int) -> Path:
    """The record of a trial as it was after an epoch, for searches that resume when it has gone on."""
    return folder / f"run_after_{stop}.json"


def run_trial(trial: Trial, root: Path, member: Member | None = None) -> Record:
    """Runs a trial, or what is left of it, below the folder of the experiment, and returns its `run.json`.

    As a `member` of those that train together, where there are some.

    Where memory does not suffice the batch is split, with the gradient of the whole (``model.micro_batch``). A VPTError
    if the config is wrong or training diverges.
    """
    if (found := finished(trial, root)) is not None:
        return found
    folder = root / trial.name
    if not (folder / RUN_FILE).is_file():  # one that was refused before it began may be mended
        (folder / TRIAL_FILE).unlink(missing_ok=True)
    claim(folder, identity(trial.config))
    write_text(folder / CONFIG_FILE, yaml.safe_dump(trial.config, sort_keys=False))
    config = trial.config
    while True:
        try:
            _run(trial, config, folder, member)
            break
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            config = _halved(config)
        gc.collect()  # frames of the failed step hold memory and, in torch 2.10, the hooks of a dead checkpoint
    record = read_record(folder)
    if trial.stop is not None:
        write_json(_at(folder, trial.stop), record)
    return record


def _run(trial: Trial, config: Config, folder: Path, member: Member | None) -> None:
    seed = config.get("seed_everything", 0)
    if isinstance(seed, bool):
        raise ConfigError(f"seed_everything is {seed}: a trial needs a number.")
    L.seed_everything(seed, verbose=False, workers=True)
    task, data = build(config)
    task.together = member
    checkpoint = folder / LAST_CHECKPOINT
    trainer = _trainer(config, folder, trial.stop, RunRecord() if member is None else RunRecord(member.seconds))
    trainer.fit(task, datamodule=data, ckpt_path=checkpoint if checkpoint.is_file() else None, weights_only=True)
    if trainer.state.status == "interrupted":  # Lightning swallows Ctrl+C
        raise KeyboardInterrupt
    if trainer.limit_val_batches and score(read_record(folder), "val") is None:
        trainer.validate(task, datamodule=data, verbose=False)  # its last epoch had none, or its record
    if trial.test:
        trainer.test(task, datamodule=data, verbose=False)
    if trial.stop is None:
        checkpoint.unlink(missing_ok=True)  # the delta file is what came of it; with its optimiser it is far larger


def trainer_options(config: Config) -> dict[str, Any]:
    """What a config says of the trainer, without what an experiment decides."""
    return {key: value for key, value in config["trainer"].items() if value is not None and key not in _OURS}


def _trainer(config: Config, folder: Path, stop: int | None, record: RunRecord) -> L.Trainer:
    given = trainer_options(config)
    callbacks: list[Any] = [instantiate_class((), each) for each in config["trainer"].get("callbacks") or []]
    callbacks += [record, DeltaWriter(), AnswerWriter(folder)]
    if stop is not None:
        callbacks.append(_Pause(stop))
    if given.get("enable_checkpointing") is not False:
        callbacks.append(last_checkpoint(folder / LAST_CHECKPOINT.parent))
    return L.Trainer(
        **given,
        callbacks=callbacks,
        logger=TensorBoardLogger(folder.parent, name="", version=folder.name, default_hp_metric=False),
        enable_progress_bar=False,
        enable_model_summary=False,
    )


class AnswerWriter(L.Callback):
    """Writes the logits of all test images as a record (`logit_records`) to a folder; in one process only."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets an earlier test."""
        self._rows = []

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        """Keeps the logits of a batch, (B, classes), with its ``index`` and ``label``."""
        if trainer.world_size == 1 and batch["label"].ndim == 1:
            self._rows.append((batch["index"].cpu(), batch["label"].cpu(), outputs.float().cpu()))

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the file."""
        if not self._rows:
            return
        index, label, logits = (torch.cat(column).numpy() for column in zip(*self._rows, strict=True))
        record = logit_records.Record(index.astype(np.int64), label.astype(np.int64), logits, {"set": "test"}, True)
        logit_records.write(self._folder / ANSWERS_FILE, record)


class _Pause(L.Callback):
    """Ends training after an epoch, without a change to the schedule."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch + 1 >= self.epochs:
            trainer.should_stop = True


def _halved(config: Config) -> Config:
    args = config["model"]["init_args"]
    size = args.get("micro_batch") or config["data"]["init_args"].get("batch_size") or 0
    if size < 2:
        raise ConfigError("The memory does not suffice for a single image: take a smaller backbone or image_size.")
    return merged(config, {"model.micro_batch": (size + 1) // 2})


@dataclass(frozen=True)
class Comparison:
    """A run and its repetition.

    Attributes:
        numbers: By metric that both have, the stored value and the new one.
        alone: Metrics that only one of them has.
        differences: What else differs: versions, machine, data.
    """

    numbers: dict[str, tuple[float, float]]
    alone: list[str]
    differences: list[str]

    @property
    def equal(self) -> bool:
        """Whether every number came out bit for bit."""
        return not self.alone and all(old == new for old, new in self.numbers.values())


def rerun(folder: Path, config: Config, out: Path | None = None) -> Comparison:
    """Repeats a run with its config, in a folder `out` or in one that is gone afterwards.

    A ConfigError if it was not finished, or the two have no number in common; a VPTError if it cannot be repeated here.
    """
    stored = finished_record(folder)
    trial = Trial("again", config, test=score(stored, "test") is not None)
    with tempfile.TemporaryDirectory() as temporary:
        record = run_trial(trial, out or Path(temporary))
    old, new = stored["metrics"], record["metrics"]
    if not old.keys() & new.keys():
        raise ConfigError(f"{folder} and its repetition have no metric in common: there is nothing to compare.")
    numbers = {key: (old[key], new[key]) for key in sorted(old.keys() & new.keys())}
    return Comparison(numbers, sorted(old.keys() ^ new.keys()), _differences(stored, record))


def _differences(stored: Record, record: Record) -> list[str]:
    found = []
    for part in ("versions", "machine"):
        old, new = stored.get(part) or {}, record.get(part) or {}
        found += [_said(f"{part} {key}", old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys())]
    found.append(_said("seed", stored.get("seed"), record.get("seed")))
    for key in ("fingerprint", "preset", "seed"):
        found.append(_said(f"data {key}", (stored.get("data") or {}).get(key), (record["data"] or {}).get(key)))
    weights = [(each.get("backbone") or {}).get("fingerprint") for each in (stored, record)]
    found.append(_said("weights", *weights))
    found.append(_said("epoch rule", epoch_rule(stored), epoch_rule(record)))  # a repetition is tested at its last
    return [text for text in found if text]


def _said(what: str, old: Any, new: Any) -> str:
    return "" if old == new else f"{what}: {old} then, {new} now"
