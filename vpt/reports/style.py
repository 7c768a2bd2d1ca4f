"""One style for all figures, and the figures that need no model."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from vpt.argument_types import checked
from vpt.atomic_write import atomic_write, check_writable
from vpt.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

ACCENT, NEUTRAL = "#c2410c", "#4b5563"
SEQUENTIAL, DIVERGING = "magma", "RdBu_r"
_ANNOTATED = 20  # classes; above, counts in cells are too small to read and the commonest confusions are listed
_LISTED = 15
_STYLE: Any = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": NEUTRAL,
    "axes.labelcolor": NEUTRAL,
    "xtick.color": NEUTRAL,
    "ytick.color": NEUTRAL,
    "figure.facecolor": "white",
    "image.interpolation": "nearest",
    "svg.hashsalt": "vpt",
    "text.parse_math": False,  # class names may hold dollar signs
}


@contextmanager
def style() -> Iterator[None]:
    """The settings that all figures share; draw and save within it."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def save_figure(figure: Figure, out: Path) -> Path:
    """Writes a figure as ``.png`` (160 dots per inch), ``.svg`` or ``.pdf``, by its suffix; folders are made.

    Raises what `check_figure` does, and an OutputError where it cannot be drawn.
    """
    out = Path(out)
    check_figure(out)
    content = rendered(figure, out.suffix[1:].lower(), str(out))
    with atomic_write(out) as partial:
        partial.write_bytes(content)
    return out


def check_figure(out: Path) -> None:
    """Refuses, before anything is drawn, what is no file of a figure: a ConfigError by suffix, an OutputError by place.

    Nothing is written.
    """
    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"Figures are written as .png, .svg or .pdf, not as {out.name!r}.")
    check_writable(out)


def rendered(figure: Figure, form: str, name: str) -> bytes:
    """Draws a figure as the contents of a file, ``"png"``, ``"svg"`` or ``"pdf"``; an OutputError names it."""
    file = io.BytesIO()
    with _drawn(name):
        figure.savefig(file, format=form, dpi=160)
    return file.getvalue()


@contextmanager
def _drawn(name: str) -> Iterator[None]:
    try:
        with style():
            yield
    except (ValueError, MemoryError, RuntimeError) as error:  # of matplotlib: more pixels than it can draw, no glyph
        reason = " ".join(str(error).split()) or "memory does not suffice"
        raise OutputError(f"{name} cannot be drawn: {reason.rstrip('.')}.") from error


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """Draws a figure into an array, uint8 (H, W, 3) at 100 dots per inch, without pyplot and its state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with _drawn("A figure"):
        figure.set_dpi(100)
        canvas = cast("Any", FigureCanvasAgg(figure))
        canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


@checked
def confusion_figure(matrix: NDArray[np.int64], class_names: Sequence[str]) -> Figure:
    """Draws a confusion matrix: shares of each true class in colour; counts, or the commonest confusions, in words.

    The matrix is (classes, classes) counts, rows are true classes; a ConfigError if it does not fit the names.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    classes = len(class_names)
    if matrix.shape != (classes, classes):
        raise ConfigError(f"A confusion matrix of shape {matrix.shape} does not fit {classes} class names.")
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    few = classes <= _ANNOTATED
    side = max(4.0, 0.45 * classes) if few else max(8.0, 0.105 * classes)
    with style():
        figure = Figure(figsize=(side + (2.2 if few else 4.9), side + (1.4 if few else 2.0)), layout="constrained")
        grid = figure.add_gridspec(1, 1 if few else 2, width_ratios=[1] if few else [side, 2.6])
        axes = figure.add_subplot(grid[0])
        image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1))  # the root brings out rare confusions
        names: dict[str, Any] = {"labels": [short(name) for name in class_names], "fontsize": 9.0 if few else 5.5}
        axes.set_xticks(range(classes), rotation=90, **names)
        axes.set_yticks(range(classes), **names)
        axes.tick_params(length=0)
        axes.set(xlabel="predicted", ylabel="true")
        n = int(matrix.sum())
        axes.set_title(f"Confusion matrix: {np.trace(matrix) / max(n, 1):.1%} of {n:,} images correct", loc="left")
        ticks = [0, 0.05, 0.2, 0.5, 1]
        colour_bar(figure, image, axes, "share of the true class", shrink=0.5, ticks=ticks, format="{x:.0%}")
        if few:
            _write_counts(axes, matrix, shares)
        else:
            _list_confusions(figure.add_subplot(grid[1]), matrix, class_names)
    return figure


def colour_bar(figure: Figure, image: AxesImage, axes: Axes | Sequence[Axes], label: str, **options: Any) -> None:
    """Puts a colour bar without outline beside the axes of an image, with the options of ``Figure.colorbar``."""
    bar = figure.colorbar(image, ax=axes, pad=0.02, **options)
    bar.set_label(label)
    cast("Any", bar.outline).set_visible(False)


def short(name: str, limit: int = 20) -> str:
    """Cuts a name to so many characters, with an ellipsis in its middle, since names often differ at their ends.

    It also goes without underscores at its head, with which matplotlib leaves names out of legends.
    """
    name = name.lstrip("_") or name
    return name if len(name) <= limit else f"{name[: limit // 2]}…{name[1 - limit + limit // 2 :]}"


def folded(name: str, width: int = 30) -> str:
    """Breaks a name into lines of so many characters, so that names that differ only at their ends stay apart.

    Without underscores at its head, as `short`.
    """
    parts = (name.lstrip("_") or name).replace("/", "/ ")  # a path breaks between folders
    return "\n".join(line.replace("/ ", "/") for line in textwrap.wrap(parts, width))


def _write_counts(axes: Axes, matrix: NDArray[np.int64], shares: NDArray[np.float64]) -> None:
    for row, column in zip(*np.nonzero(matrix), strict=True):
        colour = "white" if shares[row, column] > 0.35 else "black"
        axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=colour, fontsize=8)


def _list_confusions(axes: Axes, matrix: NDArray[np.int64], class_names: Sequence[str]) -> None:
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_LISTED]
    lines = [
        f"{wrong[true, guess]:>4}  {short(class_names[true])} → {short(class_names[guess])}"
        for true, guess in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[true, guess] > 0
    ]
    axes.set_axis_off()
    axes.text(0, 0.96, "Commonest confusions", va="bottom", fontsize=10, fontweight="bold", transform=axes.transAxes)
    text = "\n".join(["true → predicted", *lines] if lines else ["none"])
    axes.text(0, 0.95, text, va="top", fontsize=9, linespacing=1.6, transform=axes.transAxes)
