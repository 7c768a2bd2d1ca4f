"""The segmentation figure: a row per image with its mask and what models say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vpt.data import ImageDataset
from vpt.data.masks import IGNORED
from vpt.errors import ConfigError
from vpt.models.segmenter import DenseModel
from vpt.reports.style import NEUTRAL, short
from vpt.visualize.attention_maps import evaluating
from vpt.visualize.figure_panels import bare, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of Okabe and Ito, told apart by most colour-blind readers; the first class is usually the background.
_PALETTE = ("#e5e7eb", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#f0e442", "#56b4e9", "#e69f00", "#4b5563")
_LEFT_OUT = "#ffffff"


def segmentation_figure(
    images: NDArray[np.uint8],
    masks: NDArray[np.uint8],
    predictions: Mapping[str, NDArray[np.uint8]],
    class_names: Sequence[str],
) -> Figure:
    """Draws images, their masks and predictions in the same colours; under a prediction its share of right pixels.

    Args:
        images: (N, 3, H, W).
        masks: (N, H, W), classes and 255 for pixels that do not count, which are white.
        predictions: By title, each (N, H, W).
        class_names: One per class.

    Returns:
        The figure: a row per image.

    Raises:
        ConfigError: The shapes differ, or there is no image.
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
    """Colours of classes.

    Args:
        classes: How many.

    Returns:
        RGB in [0, 1], (classes, 3): nine that are easy to tell apart, then hues.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    hues = colormaps["hsv"](np.linspace(0, 1, max(0, classes - len(_PALETTE)), endpoint=False))[:, :3]
    return np.concatenate([[to_rgb(colour) for colour in _PALETTE], hues])[:classes]


def _painted(mask: NDArray[np.uint8], colours: NDArray[np.float64]) -> NDArray[np.float64]:
    from matplotlib.colors import to_rgb

    table = np.full((256, 3), to_rgb(_LEFT_OUT))
    table[: len(colours)] = colours
    painted: NDArray[np.float64] = table[mask]
    return painted


@torch.no_grad()
def draw_segmentation(models: Mapping[str, DenseModel], split: ImageDataset, positions: Sequence[int]) -> Figure:
    """Draws what models say of some images.

    Args:
        models: By title, at least one.
        split: A `MaskDataset`.
        positions: Which of its images.

    Returns:
        See `segmentation_figure`.
    """
    batch = split.batch(positions)
    answers = {title: _answers(model, batch["image"]) for title, model in models.items()}
    names = next(iter(models.values())).class_names
    return segmentation_figure(batch["image"].numpy(), batch["mask"].numpy(), answers, names)


def _answers(model: DenseModel, images: Tensor) -> NDArray[np.uint8]:
    with evaluating(model):
        classes = model(images.to(model.backbone.mean.device)).argmax(dim=1)
    found: NDArray[np.uint8] = classes.to(torch.uint8).cpu().numpy()
    return found
