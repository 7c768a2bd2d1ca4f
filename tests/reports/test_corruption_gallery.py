from __future__ import annotations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from vpt.data.corruptions import CORRUPTIONS, corrupt, title
from vpt.errors import ConfigError
from vpt.reports.corruption_gallery import corruption_figure

IMAGE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def test_every_kind_has_a_row_with_the_image_itself_and_at_every_severity() -> None:
    figure = corruption_figure(IMAGE)
    labels = [axes.get_ylabel().replace("\n", "_") for axes in figure.axes]
    assert sorted(labels) == sorted(title(kind).replace(" ", "_") for kind in CORRUPTIONS)
    fog = np.asarray(figure.axes[labels.index("fog")].images[0].get_array())
    clean, *parts = np.split(fog, 6, axis=1)
    np.testing.assert_array_equal(clean[:, :16], IMAGE)
    for severity, part in enumerate(parts, start=1):
        np.testing.assert_array_equal(part[:, :16], corrupt(IMAGE, "fog", severity, "gallery"))
    columns = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert columns == ["clean", *(f"severity {severity}" for severity in range(1, 6))]


def test_no_label_touches_the_edge() -> None:
    figure = corruption_figure(np.tile(IMAGE, (4, 4, 1)))
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert axes.yaxis.label.get_window_extent().x0 >= 0.05 * figure.dpi  # of an inch


def test_an_image_without_room_for_corruptions_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 8×8 pixels"):
        corruption_figure(IMAGE[:4, :4])
