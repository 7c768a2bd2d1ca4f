"""What the figures of this room are made of: a titled grid of panels, bare images, colour bars, pairs of maps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vpt.reports.style import DIVERGING, NEUTRAL, SEQUENTIAL, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float32]
Grid = NDArray[np.object_]
"""Axes in rows and columns."""

WITHOUT_WITH = ("Without prompts", "With prompts", "with − without")
UNTUNED_TUNED = ("Untuned", "Tuned", "tuned − untuned")


@contextmanager
def panels(
    size: tuple[float, float], rows: int, columns: int, title: str = "", note: str = ""
) -> Iterator[tuple[Figure, Grid]]:
    """Starts a figure, within whose style it is to be drawn.

    Args:
        size: Width and height in inches.
        rows: Of panels.
        columns: Of panels.
        title: Above them, at the left.
        note: Below them, at the left.

    Yields:
        The figure, and its axes (rows, columns).
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
    """Writes the title of a figure or a part of it.

    Args:
        figure: A figure or subfigure.
        title: At its upper left.
    """
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, weight="bold")


def bare(axes: Axes) -> None:
    """Takes ticks and frame away, as images have none.

    Args:
        axes: That an image is drawn in.
    """
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def show(axes: Axes, image: Tensor) -> None:
    """Draws an image.

    Args:
        axes: Where.
        image: uint8 (3, H, W).
    """
    axes.imshow(image.permute(1, 2, 0).cpu().numpy())


def colour_bar(drawn: Any, axes: Grid, label: str, **options: Any) -> None:
    """Adds the colour bar of some panels, without a frame.

    Args:
        drawn: What one of them shows, all on one scale.
        axes: The panels that give it room.
        label: What the numbers are.
        **options: See matplotlib's ``Figure.colorbar``.
    """
    bar = drawn.figure.colorbar(drawn, ax=axes.ravel().tolist(), **options)
    bar.set_label(label)
    bar.outline.set_visible(False)


def draw_pairs(
    axes: Grid,
    without: Array,
    with_prompts: Array,
    images: Tensor,
    label: str,
    words: tuple[str, str, str] = WITHOUT_WITH,
) -> None:
    """Draws a row per image: input, map without prompts, map with them, difference; one scale for what is compared.

    Args:
        axes: (B, 4).
        without: (B, rows, columns).
        with_prompts: Likewise.
        images: uint8 (B, 3, H, W).
        label: Of the colour bar of the maps.
        words: Titles of the two columns of maps, and the label of the difference's colour bar.
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
    """Picks positions evenly, the last among them.

    Args:
        number: Of positions, at least 1.
        most: How many fit.

    Returns:
        Ascending positions, counted from 0.
    """
    few = min(number, most)
    return [number * (place + 1) // few - 1 for place in range(few)]
