from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest

from vpt.errors import ConfigError
from vpt.reports.style import confusion_figure, folded, pixels, style


def test_few_classes_show_counts_and_shares_of_the_true_class() -> None:
    figure = confusion_figure(np.array([[3, 1], [0, 0]]), ["cat", "dog"])
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "Confusion matrix: 75.0% of 4 images correct"
    assert sorted(text.get_text() for text in axes.texts) == ["1", "3"]
    np.testing.assert_allclose(np.asarray(axes.images[0].get_array()), np.array([[0.75, 0.25], [0, 0]]))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog"]


def test_many_classes_list_the_commonest_confusions_instead() -> None:
    matrix = np.diag(np.full(102, 5))
    matrix[7, 9], matrix[3, 50] = 4, 2
    figure = confusion_figure(matrix, [f"class{i}" for i in range(102)])
    assert not figure.axes[0].texts
    listed = [text.get_text() for axes in figure.axes[1:] for text in axes.texts][-1].splitlines()
    assert [line.split() for line in listed[1:]] == [["4", "class7", "→", "class9"], ["2", "class3", "→", "class50"]]


def test_dollar_signs_in_names_are_no_formulas() -> None:
    pixels(confusion_figure(np.eye(2, dtype=np.int64), [r"$\no{such}$", "US$ or A$"]))


def test_names_that_do_not_fit_the_matrix_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not fit 3 class names"):
        confusion_figure(np.zeros((2, 2), dtype=np.int64), ["a", "b", "c"])


def test_pixels_are_rgb_and_not_blank() -> None:
    drawn = pixels(confusion_figure(np.eye(2, dtype=np.int64), ["a", "b"]))
    assert drawn.dtype == np.uint8
    assert drawn.shape[2] == 3
    assert drawn.min() < 50
    assert drawn.max() == 255


def test_the_style_ends_with_its_context() -> None:
    before = dict(mpl.rcParams)
    with style():
        assert not mpl.rcParams["axes.spines.top"]
    assert dict(mpl.rcParams) == before


def test_a_long_name_is_folded_between_folders() -> None:
    assert folded("own/photos_split/vpt_deep/version_0") == "own/photos_split/vpt_deep/\nversion_0"
    assert folded("_hidden") == "hidden"
