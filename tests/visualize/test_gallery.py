from __future__ import annotations

import numpy as np

from vpt.data.corruptions import CORRUPTIONS, corrupt
from vpt.visualize.gallery import corruption_figure


def test_every_kind_has_a_row_with_the_image_at_every_severity() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    figure = corruption_figure(image)
    labels = [axes.get_ylabel().replace("\n", "_") for axes in figure.axes]
    assert sorted(labels) == sorted([*CORRUPTIONS, "clean"])
    fog = np.asarray(figure.axes[labels.index("fog")].images[0].get_array())
    parts = np.split(fog, 5, axis=1)
    for severity, part in enumerate(parts, start=1):
        np.testing.assert_array_equal(part[:, :16], corrupt(image, "fog", severity, 0))
