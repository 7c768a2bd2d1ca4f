"""Attention while a run is training: the figure, and the prompts' share in every layer as curves."""

from __future__ import annotations

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger

from vpt.data import ImageDataModule
from vpt.errors import ConfigError
from vpt.tasks import ClassificationTask
from vpt.visualize.attention import sample_images
from vpt.visualize.figures import pixels
from vpt.visualize.measure import has_prompts, measure_attention
from vpt.visualize.panels import draw_attention


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
        """Measures and logs.

        Args:
            trainer: With an `ImageDataModule`.
            pl_module: The task.
        """
        data = getattr(trainer, "datamodule", None)
        fast: int | bool = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if not due or fast or not trainer.is_global_zero or not trainer.loggers:
            return
        if not isinstance(pl_module, ClassificationTask) or not isinstance(data, ImageDataModule):
            return
        if not has_prompts(pl_module.model):
            return
        images, labels = sample_images(data.split("val"), self.num_images)
        measured = measure_attention(pl_module.model, images)
        shares = np.nanmean(measured.share, axis=(1, 2))
        scalars = {f"attention_on_prompts/layer_{layer}": float(share) for layer, share in enumerate(shares, start=1)}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)
            if isinstance(logger, TensorBoardLogger):
                figure = pixels(draw_attention(pl_module.model, images, labels, measured))
                logger.experiment.add_image("attention/figure", figure, trainer.global_step, dataformats="HWC")
