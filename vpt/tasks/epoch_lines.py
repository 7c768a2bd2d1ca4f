"""What a fit says off a terminal: a line an epoch."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L


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
        self._images += len(batch["index"]) * trainer.world_size

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
