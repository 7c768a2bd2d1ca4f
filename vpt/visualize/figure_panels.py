"""What figures of attention are made of: a titled grid of panels, images without axes, colour bars, pairs of maps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vpt.data.channels import false_colours
from vpt.reports.style import DIVERGING, NEUTRAL, SEQUENTIAL, style
from vpt.visualize.attention_maps import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Grid = NDArray[np.object_]
"""Axes in rows and columns."""


@contextmanager
def panels(
    size: tuple[float, float], rows: int, columns: int, title: str = "", note: str = ""
) -> Iterator[tuple[Figure, Grid]]:
    """Starts a figure of a size in inches, within whose style it is to be drawn, and gives its axes (rows, columns).

    The title stands above them at the left, the note below.
    """
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=size, layout="constrained")
        axes: Grid = figure.subplots(rows, columns, squeeze=False)
        yield figure, axes
        if title:
            head(figure, title)
        if note:
            figure.supxlabel(note, x=0.01, ha="left", fontsize=9, color=NEUTRAL)


def head(figure: Any, title: str) -> None:
    """Writes the title of a figure or subfigure at its upper left."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, weight="bold")


def bare(axes: Axes) -> None:
    """Takes ticks and frame away, as images have none."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def show(axes: Axes, image: Tensor) -> None:
    """Draws an image, uint8 (3, H, W); other channels in false colours."""
    axes.imshow(false_colours(image.cpu().numpy()))


def colour_bar(drawn: Any, axes: Grid, label: str, **options: Any) -> None:
    """Adds the colour bar of some panels on one scale, of which one shows what is drawn, without a frame."""
    bar = drawn.figure.colorbar(drawn, ax=axes.ravel().tolist(), **options)
    bar.set_label(label)
    bar.outline.set_visible(False)


def draw_pairs(
    axes: Grid, without: Array, with_prompts: Array, images: Tensor, label: str, words: tuple[str, str, str]
) -> None:
    """Draws a row per image: input, map without prompts, map with them, difference; one scale for what is compared.

    Axes are (B, 4), maps (B, rows, columns); words are the titles of maps and the label of the difference's bar.
    """
    difference = with_prompts - without
    both = np.concatenate([without, with_prompts])
    # A few sink patches get 20 times the mean and more; they saturate so that the others stay visible.
    high, reach = float(np.quantile(both, 0.96)), float(np.quantile(np.abs(difference), 0.96))
    for row, image in zip(axes, images, strict=True):
        show(row[0], image)
    below: dict[str, Any] = {"location": "bottom", "shrink": 0.8, "pad": 0.08 / len(axes)}
    for column, maps, colours, low, up in (
        (1, without, SEQUENTIAL, 0.0, high),
        (2, with_prompts, SEQUENTIAL, 0.0, high),
        (3, difference, DIVERGING, -reach, reach),
    ):
        for row, values in zip(axes, maps, strict=True):
            drawn = row[column].imshow(values, cmap=colours, vmin=low, vmax=up)
        if column == 2:
            colour_bar(drawn, axes[:, 1:3], label, aspect=30, extend="max", **below)
        elif column == 3:
            colour_bar(drawn, axes[:, 3], words[2], aspect=14, extend="both", **below)
    for cell in axes.ravel():
        bare(cell)
    for cell, title in zip(axes[0], ("Input", *words[:2], "Difference"), strict=True):
        cell.set_title(title)


def chosen(number: int, most: int) -> list[int]:
    """Picks at most so many of a number of positions evenly, the last among them; ascending, counted from 0."""
    few = min(number, most)
    return [number * (place + 1) // few - 1 for place in range(few)]
