"""Figures of a run, drawn when training and testing end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from vpt.data import ImageDataModule, MaskDataModule
from vpt.errors import ConfigError
from vpt.models import TunedModel
from vpt.reports.style import confusion_figure, pixels, save_figure
from vpt.tasks import ClassificationTask, SegmentationTask
from vpt.tasks.callbacks import run_folder
from vpt.visualize.prompt_attention import draw_attention, has_prompts, measure_attention
from vpt.visualize.scene import sample_images
from vpt.visualize.segmentation_figure import draw_segmentation

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class FigureLogger(L.Callback):
    """Writes ``figures/attention.png`` after training and ``figures/confusion.png`` after testing.

    Of a segmentation it writes ``figures/segmentation.png`` after training instead of both. All also go to TensorBoard
    where it is the logger. Does nothing in ``fast_dev_run`` and without a logger.
    """

    def __init__(self, num_images: int = 4) -> None:
        """Keeps the number.

        Args:
            num_images: Validation images in the figure after training, at least 1.

        Raises:
            ConfigError: The number is below 1.
        """
        if num_images < 1:
            raise ConfigError(f"FigureLogger takes num_images of at least 1, got {num_images}.")
        self.num_images = num_images

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws what the prompts changed on validation images, if there are any; or the masks of a segmentation."""
        data = getattr(trainer, "datamodule", None)
        folder = _folder(trainer)
        if folder is None:
            return
        if isinstance(pl_module, SegmentationTask) and isinstance(data, MaskDataModule):
            split = data.split("val")
            shown = range(min(self.num_images, len(split)))
            _keep(trainer, folder, "segmentation", draw_segmentation({"Prediction": pl_module.model}, split, shown))
        elif (looked_at := _prompted(trainer, pl_module, self.num_images)) is not None:
            _keep(trainer, folder, "attention", draw_attention(*looked_at))

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws the confusion matrix that the task has counted."""
        if not isinstance(pl_module, ClassificationTask):
            return
        matrix = pl_module.test_confusion.compute().cpu().numpy()  # on every process: it gathers
        folder = _folder(trainer)
        if folder is not None:
            _keep(trainer, folder, "confusion", confusion_figure(matrix, pl_module.model.class_names))


def _prompted(
    trainer: L.Trainer, pl_module: L.LightningModule, number: int
) -> tuple[TunedModel, Tensor, Tensor] | None:
    """A classifier with prompts, and a few validation images with their labels; None where there are none."""
    data = getattr(trainer, "datamodule", None)
    if not isinstance(pl_module, ClassificationTask) or not isinstance(data, ImageDataModule):
        return None
    return (pl_module.model, *sample_images(data.split("val"), number)) if has_prompts(pl_module.model) else None


def _log_image(trainer: L.Trainer, name: str, figure: Figure) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, pixels(figure), trainer.global_step, dataformats="HWC")


def _keep(trainer: L.Trainer, folder: Path, name: str, figure: Figure) -> None:
    save_figure(figure, folder / "figures" / f"{name}.png")
    _log_image(trainer, f"figures/{name}", figure)


def _folder(trainer: L.Trainer) -> Path | None:
    """Where this process writes figures; None for nowhere."""
    fast: int | bool = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector
    return None if fast or not trainer.is_global_zero else run_folder(trainer)


class AttentionLogger(L.Callback):
    """Logs the attention figure to TensorBoard, and the prompts' share of attention to every logger.

    The figure is ``attention/figure``, the share of layer n ``attention_on_prompts/layer_n``: the part of the class
    token's attention (of the mean patch's where there is none) that goes to prompts, mean over heads and over the same
    few validation images each time. Training is not changed: nothing is drawn at random, modes and strength are put
    back. Does nothing without prompts, without a logger and in ``fast_dev_run``. In a config::

        trainer:
          callbacks:
            - class_path: vpt.visualize.AttentionLogger
              init_args: {every_n_epochs: 5}
    """

    def __init__(self, every_n_epochs: int = 1, num_images: int = 4) -> None:
        """Keeps the numbers.

        Args:
            every_n_epochs: Logs after each so many epochs, at least 1.
            num_images: Validation images, each of another class, at least 1.

        Raises:
            ConfigError: A number is below 1.
        """
        if min(every_n_epochs, num_images) < 1:
            raise ConfigError(
                f"AttentionLogger takes numbers of at least 1, got every_n_epochs={every_n_epochs} and "
                f"num_images={num_images}."
            )
        self.every_n_epochs, self.num_images = every_n_epochs, num_images

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures and logs."""
        fast: int | bool = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if not due or fast or not trainer.is_global_zero or not trainer.loggers:
            return
        if (looked_at := _prompted(trainer, pl_module, self.num_images)) is None:
            return
        model, images, labels = looked_at
        measured = measure_attention(model, images)
        shares = np.nanmean(measured.share, axis=(1, 2))
        scalars = {f"attention_on_prompts/layer_{layer}": float(share) for layer, share in enumerate(shares, start=1)}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)
        if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
            _log_image(trainer, "attention/figure", draw_attention(model, images, labels, measured))
