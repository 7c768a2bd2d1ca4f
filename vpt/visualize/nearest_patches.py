"""The patches that listen most to a prompt, as crops of their images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vpt.errors import ConfigError
from vpt.reports.style import ACCENT, NEUTRAL, style
from vpt.visualize.attention_maps import AttentionMaps, LayerMaps
from vpt.visualize.prompt_attention import bare

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float32]

_PROMPTS, _CROPS = 5, 8


def nearest_patches(layer: LayerMaps, prompt: int, number: int = _CROPS) -> list[tuple[int, int, int, float]]:
    """Finds the patches that attend most to a prompt, at most one of each image.

    The score of patch i of image b is the attention weight from it to prompt p, mean over the heads h of the block,
    s(b, i) = 1/H · Σ_h softmax_k(q_bhi · k_bhk / √d + bias)_p: how much of p's value the block mixes into the patch.
    This is how a deep prompt acts on the image; its own query acts on nothing. Of each image the best patch enters,
    images are ordered by it; ties go to the first in row-major order.

    Args:
        layer: From `attention_maps` over the images that are to be searched.
        prompt: Counted from 0.
        number: How many to return at most.

    Returns:
        (image, row, column, score in [0, 1]) of each, best first.
    """
    scores = layer.to_prompts[:, prompt]
    flat = scores.reshape(len(scores), -1)
    best = flat.argmax(axis=1)
    tops = flat[np.arange(len(flat)), best]
    order = np.argsort(-tops, kind="stable")[:number]
    columns = scores.shape[2]
    return [(int(i), int(best[i]) // columns, int(best[i]) % columns, float(tops[i])) for i in order]


def nearest_figure(images: Tensor, tuned: AttentionMaps, layer: int | None = None) -> Figure:
    """Draws the patches that attend most to some prompts; see `nearest_patches`.

    Args:
        images: uint8 (B, 3, H, W), those of the maps.
        tuned: With prompts.
        layer: Counted from 0; None for the one whose patches attend most to prompts.

    Returns:
        A row for each of the five prompts that patches attend to most, a column for each of up to eight patches. Each
        is framed within a crop of three by three patches; where those end the image ends.

    Raises:
        ConfigError: There are no prompts in this layer.
    """
    from matplotlib.figure import Figure

    layer = tuned.strongest if layer is None else layer
    maps = tuned.layers[layer]
    if not maps.to_prompts.shape[1]:
        raise ConfigError(f"There are no prompts in layer {layer + 1}, so no patch attends to one.")
    prompts = np.argsort(-maps.to_prompts.mean(axis=(0, 2, 3)), kind="stable")[:_PROMPTS]
    columns = min(_CROPS, len(images))
    with style():
        figure = Figure(figsize=(max(5.6, 1.15 * columns + 0.6), 1.4 * len(prompts) + 0.8), layout="constrained")
        axes = figure.subplots(len(prompts), columns, squeeze=False)
        for line, prompt in zip(axes, prompts, strict=True):
            line[0].set_ylabel(f"prompt {prompt + 1}", fontweight="bold")
            for cell, (image, row, column, score) in zip(line, nearest_patches(maps, int(prompt)), strict=False):
                _crop(cell, images[image], maps.to_prompts.shape[2:], row, column)
                cell.set_xlabel(f"{score:.1%}")
        title = f"The patches that attend most to each prompt in layer {layer + 1}, of {len(images)} images"
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, weight="bold")
        note = "Below: the part of the framed patch's attention that goes to the prompt, mean over heads."
        figure.supxlabel(note, x=0.01, ha="left", fontsize=9, color=NEUTRAL)
    return figure


def _crop(axes: Axes, image: Tensor, grid: tuple[int, ...], row: int, column: int) -> None:
    from matplotlib.patches import Rectangle

    height, width = image.shape[1] / grid[0], image.shape[2] / grid[1]
    axes.imshow(image.permute(1, 2, 0).cpu().numpy())
    axes.set_xlim((column - 1) * width - 0.5, (column + 2) * width - 0.5)
    axes.set_ylim((row + 2) * height - 0.5, (row - 1) * height - 0.5)
    corner = (column * width - 0.5, row * height - 0.5)
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=ACCENT, linewidth=1.5))
    bare(axes)
    axes.set_facecolor("#e5e7eb")
