from __future__ import annotations

import numpy as np
import pytest

from vpt.backbones import create_backbone
from vpt.data import ShapeScenesDataModule
from vpt.errors import ConfigError
from vpt.models.segmenter import DenseModel
from vpt.reports.style import pixels
from vpt.visualize.callbacks import class_colours, draw_segmentation, segmentation_figure

IMAGES = np.zeros((2, 3, 4, 4), dtype=np.uint8)
PROMPT = {"name": "prompt", "num_tokens": 2, "dropout": 0.5}
MASKS = np.zeros((2, 4, 4), dtype=np.uint8)


def test_a_row_per_image_and_the_share_of_right_pixels_that_count() -> None:
    masks, answers = MASKS.copy(), MASKS.copy()
    masks[0, 0], answers[0, 1] = 255, 1  # 4 pixels do not count, 4 of the other 12 are wrong
    figure = segmentation_figure(IMAGES, masks, {"frozen": answers}, ["sky", "sea"])
    assert len(figure.axes) == 2 * 3
    assert [axes.get_title() for axes in figure.axes[:3]] == ["Image", "Truth", "frozen"]
    assert [axes.get_xlabel() for axes in figure.axes[2::3]] == ["67% of pixels", "100% of pixels"]
    shown = np.asarray(figure.axes[1].images[0].get_array())
    assert np.allclose(shown[0], 1)  # white
    assert np.allclose(shown[1:], class_colours(2)[0])
    assert pixels(figure).min() < 100


def test_many_classes_have_different_colours() -> None:
    assert len(np.unique(class_colours(30).round(3), axis=0)) == 30


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ConfigError, match="masks and predictions of its size"):
        segmentation_figure(IMAGES, MASKS, {"frozen": MASKS[:1]}, ["sky"])
    with pytest.raises(ConfigError, match="at least one image"):
        segmentation_figure(IMAGES[:0], MASKS[:0], {}, ["sky"])


def test_models_are_drawn_as_they_answer_and_left_in_their_mode() -> None:
    split = ShapeScenesDataModule().split("val")
    models = [DenseModel(create_backbone("vit_nano_patch8_64"), 5, [PROMPT] * number).train() for number in (0, 1)]
    models[1].backbone.eval()
    modes = [[module.training for module in model.modules()] for model in models]
    figure = draw_segmentation(dict(zip(("one", "two"), models, strict=True)), split, [3, 5, 7])
    assert [[module.training for module in model.modules()] for model in models] == modes
    drawn = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    assert len(drawn) == 3 * 4
    for column, model in enumerate(models, start=2):
        answers = model.eval()(split.batch([3, 5, 7])["image"]).argmax(dim=1).numpy()
        for row, answer in enumerate(answers):
            assert np.allclose(drawn[4 * row + column], class_colours(5)[answer])
