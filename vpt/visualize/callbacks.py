"""Figures of a run, drawn when training and testing end, and that of a segmentation for any models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray
from torch import Tensor

from vpt.argument_types import checked
from vpt.data import ImageDataModule, ImageDataset, MaskDataModule
from vpt.data.masks import IGNORED
from vpt.errors import ConfigError, OutputError
from vpt.models import TunedModel
from vpt.models.segmenter import DenseModel
from vpt.reports.style import NEUTRAL, confusion_figure, pixels, save_figure, short
from vpt.run_record import RUN_FILE
from vpt.tasks import ClassificationTask, RunRecord, SegmentationTask
from vpt.tasks.callbacks import run_folder
from vpt.tasks.parallel import is_sharded
from vpt.visualize.attention_map_figures import draw_attention, share_figure
from vpt.visualize.attention_maps import evaluating, has_prompts, measure_attention, prompt_shares
from vpt.visualize.figure_kinds import sample_images
from vpt.visualize.figure_panels import bare, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of Okabe and Ito, told apart by most colour-blind readers; the first class is usually the background.
_PALETTE = ("#e5e7eb", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#f0e442", "#56b4e9", "#e69f00", "#4b5563")


class FigureLogger(L.Callback):
    """Writes ``figures/attention.png`` after training and ``figures/confusion.png`` after testing.

    Of a segmentation it writes ``figures/segmentation.png`` after training instead of both. All also go to TensorBoard
    where it is the logger. Does nothing in ``fast_dev_run`` and without a logger. The matrix of a test that `RunRecord`
    keeps apart from ``run.json`` is ``confusion-NAME.png`` as well. A figure that cannot be written is an OutputError
    when all else is done.
    """

    @checked
    def __init__(self, num_images: int = 4) -> None:
        """Keeps the number; a ConfigError where it is below 1.

        Args:
            num_images: Validation images in the figure after training, at least 1.
        """
        if num_images < 1:
            raise ConfigError(f"FigureLogger takes num_images of at least 1, got {num_images}.")
        self.num_images = num_images
        self._fault: OutputError | None = None

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Says what could not be written."""
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws what the prompts changed on validation images, if there are any; or the masks of a segmentation.

        Not where the backbone is in shares (`vpt.tasks.parallel`), with which one process alone computes nothing.
        """
        data = getattr(trainer, "datamodule", None)
        folder = _folder(trainer)
        if folder is None or is_sharded(trainer):
            return
        if isinstance(pl_module, SegmentationTask) and isinstance(data, MaskDataModule):
            split = data.split("val")
            shown = range(min(self.num_images, len(split)))
            figure = draw_segmentation({"Prediction": pl_module.model}, split, shown)
            self._keep(trainer, folder, "segmentation", figure)
        elif (looked_at := _prompted(trainer, pl_module, self.num_images)) is not None:
            model, images, _ = looked_at
            known = model.backbone.has_layout
            figure = draw_attention(*looked_at) if known else share_figure(prompt_shares(model, images))
            self._keep(trainer, folder, "attention", figure)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws the confusion matrix that the task has counted."""
        if not isinstance(pl_module, ClassificationTask) or pl_module.targets != "multiclass":
            return
        matrix = pl_module.tally.compute().cpu().numpy()  # on every process: it gathers
        folder = _folder(trainer)
        if folder is not None:
            records = [each for each in cast("Any", trainer).callbacks if isinstance(each, RunRecord)]
            kept = [each.kept for each in records if each.kept is not None]
            apart = "".join(path.stem.removeprefix("test") for path in kept if path.name != RUN_FILE)
            figure = confusion_figure(matrix, pl_module.model.class_names)
            self._keep(trainer, folder, f"confusion{apart}", figure)

    def _keep(self, trainer: L.Trainer, folder: Path, name: str, figure: Figure) -> None:
        try:
            save_figure(figure, folder / "figures" / f"{name}.png")
            _log_image(trainer, f"figures/{name}", figure)
        except OutputError as error:
            self._fault = error


def _prompted(
    trainer: L.Trainer, pl_module: L.LightningModule, number: int
) -> tuple[TunedModel, Tensor, Tensor | None] | None:
    """A classifier with prompts whose attention can be looked at, and a few validation images with labels, or None."""
    data = getattr(trainer, "datamodule", None)
    if not isinstance(pl_module, ClassificationTask) or not isinstance(data, ImageDataModule):
        return None
    return (pl_module.model, *sample_images(data.split("val"), number)) if has_prompts(pl_module.model) else None


def _log_image(trainer: L.Trainer, name: str, figure: Figure) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, pixels(figure), trainer.global_step, dataformats="HWC")


def _folder(trainer: L.Trainer) -> Path | None:
    """Where this process writes figures; None for nowhere."""
    fast: int | bool = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector
    return None if fast or not trainer.is_global_zero else run_folder(trainer)


class AttentionLogger(L.Callback):
    """Logs the attention figure to TensorBoard, and the prompts' share of attention to every logger.

    The figure is ``attention/figure``, the share of layer n ``attention_on_prompts/layer_n``: the part of the class
    token's attention (of the mean patch's where there is none, of all that ask where tokens are not known) that goes to
    prompts, mean over heads and over the same
    few validation images each time. Training is not changed: nothing is drawn at random, modes and strength are put
    back. Does nothing without prompts, without a logger and in ``fast_dev_run``. In a config::

        trainer:
          callbacks:
            - class_path: vpt.visualize.AttentionLogger
              init_args: {every_n_epochs: 5}
    """

    @checked
    def __init__(self, every_n_epochs: int = 1, num_images: int = 4) -> None:
        """Keeps the numbers; a ConfigError where one is below 1.

        Args:
            every_n_epochs: Logs after each so many epochs, at least 1.
            num_images: Validation images, each of another class, at least 1.
        """
        if min(every_n_epochs, num_images) < 1:
            raise ConfigError(
                f"AttentionLogger takes numbers of at least 1, got every_n_epochs={every_n_epochs} and "
                f"num_images={num_images}."
            )
        self.every_n_epochs, self.num_images = every_n_epochs, num_images

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses, by a ConfigError, a backbone in shares, with which one process alone computes nothing."""
        if is_sharded(trainer):
            raise ConfigError(
                "AttentionLogger looks at a whole model, which trainer.strategy fsdp2 keeps in shares: leave it out, "
                "and call `vpt attention` on the delta file."
            )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures and logs."""
        fast: int | bool = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if not due or fast or not trainer.is_global_zero or not trainer.loggers:
            return
        if (looked_at := _prompted(trainer, pl_module, self.num_images)) is None:
            return
        model, images, _ = looked_at
        draw: Callable[[], Figure]
        if model.backbone.has_layout:
            measured = measure_attention(model, images)
            layers, draw = np.nanmean(measured.share, axis=(1, 2)), partial(draw_attention, *looked_at, measured)
        else:
            found = prompt_shares(model, images)
            layers, draw = np.nanmean(next(iter(found.tables.values())), axis=1), partial(share_figure, found)
        scalars = {f"attention_on_prompts/layer_{layer}": float(share) for layer, share in enumerate(layers, start=1)}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)
        if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
            _log_image(trainer, "attention/figure", draw())


@checked
def segmentation_figure(
    images: NDArray[np.uint8],
    masks: NDArray[np.uint8],
    predictions: Mapping[str, NDArray[np.uint8]],
    class_names: Sequence[str],
) -> Figure:
    """Draws a row per image: image, mask and predictions by title; under a prediction its share of right pixels.

    Images are (N, 3, H, W), masks and predictions (N, H, W), where 255 stands for pixels that do not count: white. A
    ConfigError where the shapes differ, or there is no image.
    """
    from matplotlib.patches import Patch

    if not len(images) or any(each.shape != masks.shape for each in (images[:, 0], *predictions.values())):
        raise ConfigError("A segmentation figure needs at least one image, and masks and predictions of its size.")
    colours = class_colours(len(class_names))
    columns = 2 + len(predictions)
    with panels((1.5 * columns + 0.3, 1.68 * len(images) + 0.7), len(images), columns) as (figure, axes):
        for row, image, mask in zip(axes, images, masks, strict=True):
            row[0].imshow(image.transpose(1, 2, 0))
            row[1].imshow(_painted(mask, colours))
        for column, answers in enumerate(predictions.values(), start=2):
            for row, mask, answer in zip(axes, masks, answers, strict=True):
                row[column].imshow(_painted(answer, colours))
                counted = mask != IGNORED
                row[column].set_xlabel(f"{(answer == mask)[counted].mean():.0%} of pixels" if counted.any() else "")
        for cell, title in zip(axes[0], ("Image", "Truth", *predictions), strict=True):
            cell.set_title(short(title, 18))
        for cell in axes.ravel():
            bare(cell)
        names = [Patch(color=colour, label=short(name)) for colour, name in zip(colours, class_names, strict=False)]
        figure.legend(
            handles=names, loc="outside lower center", ncols=min(len(names), columns), frameon=False, labelcolor=NEUTRAL
        )
    return figure


def class_colours(classes: int) -> NDArray[np.float64]:
    """RGB in [0, 1] of so many classes, (classes, 3): nine that are easy to tell apart, then hues."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    hues = colormaps["hsv"](np.linspace(0, 1, max(0, classes - len(_PALETTE)), endpoint=False))[:, :3]
    return np.concatenate([[to_rgb(colour) for colour in _PALETTE], hues])[:classes]


def _painted(mask: NDArray[np.uint8], colours: NDArray[np.float64]) -> NDArray[np.float64]:
    table = np.ones((256, 3))  # white where no pixel counts
    table[: len(colours)] = colours
    painted: NDArray[np.float64] = table[mask]
    return painted


@torch.no_grad()
def draw_segmentation(models: Mapping[str, DenseModel], split: ImageDataset, positions: Sequence[int]) -> Figure:
    """Draws what models, at least one by title, say of some images of a `MaskDataset`; see `segmentation_figure`."""
    batch = split.batch(positions)
    answers = {title: _answers(model, batch["image"]) for title, model in models.items()}
    names = next(iter(models.values())).class_names
    return segmentation_figure(batch["image"].numpy(), batch["mask"].numpy(), answers, names)


def _answers(model: DenseModel, images: Tensor) -> NDArray[np.uint8]:
    with evaluating(model):
        classes = model(images.to(model.backbone.mean.device)).argmax(dim=1)
    found: NDArray[np.uint8] = classes.to(torch.uint8).cpu().numpy()
    return found
