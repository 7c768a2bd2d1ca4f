"""The gallery of corruptions: one image under every kind at every severity."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vpt.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt, title
from vpt.data.images import decode_rgb
from vpt.data.transforms import get_preset
from vpt.reports.style import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GAP = 4  # white pixels between two images
_COLUMNS = 2
_SIZE = 224


def example(file: Path | None = None) -> NDArray[np.uint8]:
    """The centre of an image file, uint8 (224, 224, 3); of None a photograph that scikit-learn ships.

    That one is CC BY 2.0, flickr.com/photos/vultilion.
    """
    if file is not None:
        image = decode_rgb(file)
    else:
        from sklearn.datasets import load_sample_image

        image = Image.fromarray(load_sample_image("flower.jpg"))
    return get_preset("timm")(image, _SIZE)


def corruption_figure(image: NDArray[np.uint8]) -> Figure:
    """Draws a square image, uint8 (H, W, 3), clean and under each corruption: a row a kind, a column a severity."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = -(-len(CORRUPTIONS) // _COLUMNS)
    height, width = image.shape[:2]
    with style():
        figure = Figure(figsize=(15, 1.08 * rows * height / width + 0.9), layout=ConstrainedLayoutEngine(w_pad=0.2))
        about = f"{len(CORRUPTIONS)} corruptions at severities 1 to 5, with the parameters of ImageNet-C"
        figure.suptitle(about, fontsize=12, weight="bold")
        cells = figure.subplots(rows, _COLUMNS).T.ravel()
        for axes, kind in zip(cells, CORRUPTIONS, strict=False):
            _draw_row(axes, kind, [image, *(corrupt(image, kind, severity, "gallery") for severity in SEVERITIES)])
        for unused in cells[len(CORRUPTIONS) :]:
            unused.remove()
        for top in cells[::rows]:
            centres = (np.arange(1 + len(SEVERITIES)) + 0.5) * (width + _GAP)
            top.set_xticks(centres, ["clean", *(f"severity {severity}" for severity in SEVERITIES)])
    return figure


def _draw_row(axes: Axes, kind: str, images: list[NDArray[np.uint8]]) -> None:
    gap = np.full((images[0].shape[0], _GAP, 3), 255, dtype=np.uint8)
    axes.imshow(np.concatenate([part for image in images for part in (image, gap)], axis=1))
    axes.set_ylabel(title(kind).replace("_", "\n").replace(" ", "\n"), rotation=0, ha="right", va="center")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
