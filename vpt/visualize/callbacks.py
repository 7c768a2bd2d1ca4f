"""Figures of a run, drawn when training and testing end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from vpt.data import ImageDataModule, MaskDataModule
from vpt.errors import ConfigError
from vpt.tasks import ClassificationTask, SegmentationTask
from vpt.tasks.callbacks import run_folder
from vpt.visualize.attention import sample_images
from vpt.visualize.figures import confusion_figure, pixels, save_figure
from vpt.visualize.measure import has_prompts
from vpt.visualize.panels import draw_attention
from vpt.visualize.segmentation import draw_segmentation

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
        """Draws what the prompts changed on validation images, nothing without prompts; or the masks of a segmentation.

        Args:
            trainer: With an `ImageDataModule`.
            pl_module: The task.
        """
        data = getattr(trainer, "datamodule", None)
        folder = _folder(trainer)
        if isinstance(pl_module, SegmentationTask) and isinstance(data, MaskDataModule) and folder is not None:
            split = data.split("val")
            shown = range(min(self.num_images, len(split)))
            _keep(trainer, folder, "segmentation", draw_segmentation({"Prediction": pl_module.model}, split, shown))
        if not isinstance(pl_module, ClassificationTask) or not isinstance(data, ImageDataModule):
            return
        model = pl_module.model
        if folder is not None and has_prompts(model):
            images, labels = sample_images(data.split("val"), self.num_images)
            _keep(trainer, folder, "attention", draw_attention(model, images, labels))

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws the confusion matrix that the task has counted.

        Args:
            trainer: The trainer.
            pl_module: The task.
        """
        if not isinstance(pl_module, ClassificationTask):
            return
        matrix = pl_module.test_confusion.compute().cpu().numpy()  # on every process: it gathers
        folder = _folder(trainer)
        if folder is not None:
            _keep(trainer, folder, "confusion", confusion_figure(matrix, pl_module.model.class_names))


def _keep(trainer: L.Trainer, folder: Path, name: str, figure: Figure) -> None:
    save_figure(figure, folder / "figures" / f"{name}.png")
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(f"figures/{name}", pixels(figure), trainer.global_step, dataformats="HWC")


def _folder(trainer: L.Trainer) -> Path | None:
    """Where this process writes figures; None for nowhere."""
    fast: int | bool = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector
    return None if fast or not trainer.is_global_zero else run_folder(trainer)
