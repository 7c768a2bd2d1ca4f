"""What `vpt predict` leaves behind: one line per image, or one mask."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image
from torch import Tensor

from vpt.tasks.callbacks import run_folder

PREDICTIONS_FILE = "predictions.csv"
MASKS_FOLDER = "predictions"


class PredictionWriter(BasePredictionWriter):
    """Writes `predictions.csv` batch by batch: index, path, predicted class and its probability.

    Of a segmentation, writes `predictions/INDEX.png`, 8-bit masks of class numbers.
    """

    def __init__(self) -> None:
        """Writes after every batch, so that no logits pile up."""
        super().__init__(write_interval="batch")

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Adds the lines of a batch; the first batch starts the file.

        Args:
            trainer: The trainer, with a data module.
            pl_module: The task.
            prediction: ``index`` (B,), and ``logits`` (B, classes) or ``mask`` (B, H, W).
            batch_indices: Unused: the prediction says which images it is about.
            batch: Unused.
            batch_idx: Position of the batch.
            dataloader_idx: Unused: there is one loader.
        """
        if getattr(trainer, "fast_dev_run", False):
            return
        if "mask" in prediction:
            _write_masks(predictions_path(trainer).parent / MASKS_FOLDER, prediction)
            return
        data: Any = getattr(trainer, "datamodule", None)
        paths = data.split("test").paths
        confidence, label = prediction["logits"].float().softmax(dim=-1).max(dim=-1)
        rows = zip(prediction["index"].tolist(), label.tolist(), confidence.tolist(), strict=True)
        with predictions_path(trainer).open("w" if batch_idx == 0 else "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if batch_idx == 0:
                writer.writerow(["index", "path", "predicted", "probability"])
            writer.writerows([i, paths[i], data.class_names[c], f"{p:.6f}"] for i, c, p in rows)


def _write_masks(folder: Path, prediction: Mapping[str, Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    for index, mask in zip(prediction["index"].tolist(), prediction["mask"].cpu().numpy(), strict=True):
        Image.fromarray(mask).save(folder / f"{index:06d}.png")


def predictions_path(trainer: L.Trainer) -> Path:
    """Where the predictions of a process go: the run's folder; each further device has a file of its own.

    Args:
        trainer: The trainer.

    Returns:
        The path; its folder exists.
    """
    folder = run_folder(trainer) or Path(trainer.default_root_dir)
    folder.mkdir(parents=True, exist_ok=True)
    name = Path(PREDICTIONS_FILE)
    return folder / (name if trainer.is_global_zero else f"{name.stem}_{trainer.global_rank}{name.suffix}")
