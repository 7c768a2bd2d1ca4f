"""What a trial answered on its test images, for agreement and ensembles without another forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from vpt.robustness import Record, records

ANSWERS_FILE = "test.parquet"


class AnswerWriter(L.Callback):
    """Writes the logits of all test images as a record of `vpt.robustness.records`; in one process only."""

    def __init__(self, folder: Path) -> None:
        """Starts empty.

        Args:
            folder: Of the run.
        """
        self._folder = folder
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets an earlier test.

        Args:
            trainer: The trainer.
            pl_module: The task.
        """
        self._rows = []

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the logits of a batch.

        Args:
            trainer: The trainer.
            pl_module: The task.
            outputs: Logits, (B, classes).
            batch: With ``index`` and ``label``.
            batch_idx: Its position.
            dataloader_idx: Always 0.
        """
        if trainer.world_size == 1:
            self._rows.append((batch["index"].cpu(), batch["label"].cpu(), outputs.float().cpu()))

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the file.

        Args:
            trainer: The trainer.
            pl_module: The task.
        """
        if not self._rows:
            return
        index, label, logits = (torch.cat(column).numpy() for column in zip(*self._rows, strict=True))
        record = Record(index.astype(np.int64), label.astype(np.int64), logits, {"set": "test"}, True)
        records.write(self._folder / ANSWERS_FILE, record)
