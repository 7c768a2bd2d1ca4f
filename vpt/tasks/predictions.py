"""Predictions of the test images: whole or not there, and beside them whose they are."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any, cast

import lightning as L
from PIL import Image
from torch import Tensor, distributed

from vpt.atomic_write import atomic_write, write_text
from vpt.backbones.checkpoints import fingerprint
from vpt.data import ImageDataModule
from vpt.data.targets import Targets
from vpt.errors import ConfigError
from vpt.tasks.base import TuningTask
from vpt.tasks.callbacks import run_folder
from vpt.tasks.parallel import whole


class PredictionWriter(L.Callback):
    """Writes `predictions.csv` when all images are predicted: index, path, predicted class and its probability.

    Of several labels an image it has the probability of each class, of numbers these. Of a segmentation it is the
    folder `predictions` of masks, `INDEX.png`, 8-bit class numbers. Of some of the images only, the name is
    `predictions-partial`. `predictions.json` says of which model and data they are; those of another are not replaced.
    Several processes write one file, whose `place` is None as long as none is written.
    """

    place: Path | None = None
    _target: Path | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses, before anything is predicted, to replace what is not of this model and data (ConfigError)."""
        self._rows: list[tuple[Any, ...]] = []
        self.place = self._target = None
        data = getattr(trainer, "datamodule", None)
        trying = bool(getattr(trainer, "fast_dev_run", False))
        if trying or not isinstance(pl_module, TuningTask) or not isinstance(data, ImageDataModule):
            return
        with whole(pl_module):
            found = self._prepared(trainer, pl_module, data) if trainer.is_global_zero else (Path(), "")
        target, fault = trainer.strategy.broadcast(found)  # the others wait until the folder of masks is empty
        if fault:
            raise ConfigError(fault)
        self._target = target

    def _prepared(self, trainer: L.Trainer, task: TuningTask, data: ImageDataModule) -> tuple[Path, str]:
        """Where the first process writes to, and why not, if so."""
        partial = sum(trainer.num_predict_batches) < len(cast("Sized", trainer.predict_dataloaders))
        name = "predictions-partial" if partial else "predictions"
        folder = run_folder(trainer) or Path(trainer.default_root_dir)
        target = folder / (name if task.target == "mask" else f"{name}.csv")
        described = data.describe()
        keys = ("name", "fingerprint", "preset", "image_size", "channels")
        told = {key: described[key] for key in keys if key in described}
        model = {"backbone": task.model.backbone.fingerprint, "weights": fingerprint(task.model)}
        self._source = json.dumps({"model": model, "data": told, "precision": str(trainer.precision)}, indent=2) + "\n"
        source = target.with_suffix(".json")
        if target.exists() and not (source.is_file() and source.read_text(encoding="utf-8") == self._source):
            return (
                target,
                f"{target} is of another model, other data or precision: move it, or remove it, to predict anew.",
            )
        shutil.rmtree(_unfinished(target), ignore_errors=True)
        return target, ""

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        """Keeps the lines of a batch, which the prediction names by their ``index``, or writes its masks aside."""
        if self._target is None:
            return
        index = outputs["index"].tolist()
        if "mask" in outputs:
            for position, mask in zip(index, outputs["mask"].cpu().numpy(), strict=True):
                with atomic_write(_unfinished(self._target) / f"{position:06d}.png") as partial:
                    Image.fromarray(mask).save(partial, "PNG")
            return
        targets = cast("Any", trainer).datamodule.targets
        self._rows += zip(index, _columns(outputs["logits"].float(), targets), strict=True)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Puts together what all processes have predicted."""
        if self._target is None:
            return
        parts: list[Any] = [self._rows]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size
            distributed.all_gather_object(parts, self._rows)
        if not trainer.is_global_zero:
            return
        write_text(self._target.with_suffix(".json"), self._source)
        if self._target.suffix:
            rows = sorted(row for part in parts for row in part)
            _write_table(self._target, cast("Any", trainer).datamodule, rows)
        else:
            shutil.rmtree(self._target, ignore_errors=True)
            _unfinished(self._target).rename(self._target)
        self.place = self._target

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leaves no masks of some of the images."""
        if self._target is not None and trainer.is_global_zero:
            shutil.rmtree(_unfinished(self._target), ignore_errors=True)


def _columns(outputs: Tensor, targets: Targets) -> list[tuple[float, ...]]:
    """Of each image the class and its probability, those of all classes, or the numbers."""
    if targets == "multiclass":
        confidence, label = outputs.softmax(dim=-1).max(dim=-1)
        return list(zip(label.tolist(), confidence.tolist(), strict=True))
    return list(map(tuple, (outputs.sigmoid() if targets == "multilabel" else outputs).tolist()))


def _write_table(path: Path, data: ImageDataModule, rows: Sequence[tuple[int, tuple[float, ...]]]) -> None:
    paths, names, single = data.split("test").paths, data.class_names, data.targets == "multiclass"
    other_bytes = "surrogateescape"  # which a file's name may be made of
    with atomic_write(path) as partial, partial.open("w", newline="", encoding="utf-8", errors=other_bytes) as file:
        writer = csv.writer(file)
        what = "probability" if data.targets == "multilabel" else "value"
        columns = ["predicted", "probability"] if single else [f"{what}_{name}" for name in names]
        writer.writerow(["index", "path", *columns])
        for index, values in rows:
            fields = [names[int(values[0])], f"{values[1]:.6f}"] if single else [f"{value:.7g}" for value in values]
            writer.writerow([index, paths[index], *fields])


def _unfinished(target: Path) -> Path:
    return target.with_name(f".{target.name}.part")
