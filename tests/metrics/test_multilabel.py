"""Scores of several labels an image and of numbers are scikit-learn's, and weights are repeated images."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score, mean_absolute_error, r2_score

from vpt.errors import ConfigError
from vpt.metrics import multilabel, regression
from vpt.metrics.accuracy import bootstrap

RANDOM = np.random.default_rng(0)
LABELS = np.array(RANDOM.random((60, 4)) < [0.5, 0.2, 0.05, 0.9], dtype=np.uint8)
SCORES = np.round(RANDOM.random((60, 4)) + 0.3 * LABELS, 1)  # with ties


def test_average_precision_is_that_of_scikit_learn_with_ties() -> None:
    expected = [average_precision_score(LABELS[:, k], SCORES[:, k]) for k in range(4)]
    np.testing.assert_allclose(multilabel.average_precision(SCORES, LABELS), expected, rtol=1e-12)


def test_a_class_without_images_has_no_average_precision_and_does_not_count() -> None:
    labels = LABELS.copy()
    labels[:, 1] = 0
    found = multilabel.average_precision(SCORES, labels)
    assert np.isnan(found[1])
    value, low, high = multilabel.mean_average_precision(SCORES, labels)
    assert value == pytest.approx(found[[0, 2, 3]].mean(), rel=1e-12)
    assert low < value < high


def test_weights_are_how_often_an_image_is_there() -> None:
    times = RANDOM.integers(0, 4, 60)
    rows = np.repeat(np.arange(60), times)
    weighted, repeated = (
        multilabel.average_precision(SCORES, LABELS, times.astype(float)),
        multilabel.average_precision(SCORES[rows], LABELS[rows]),
    )
    np.testing.assert_allclose(weighted, repeated, rtol=1e-12)


def test_f1_is_that_of_scikit_learn() -> None:
    decided = SCORES >= 0.7
    expected = f1_score(LABELS, decided, average=None, zero_division=0)
    np.testing.assert_allclose(multilabel.f1(decided, LABELS), expected, rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_threshold_has_a_larger_f1_than_the_one_that_is_found(draw: st.DataObject) -> None:
    count = draw.draw(st.integers(1, 12))
    whole = st.lists(st.integers(-5, 5), min_size=count, max_size=count)
    logits = np.array(draw.draw(whole), dtype=np.float64)[:, None]
    labels = np.array(draw.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)))[:, None]
    (found,) = multilabel.f1_thresholds(logits, labels)
    if not labels.any():
        assert found == 0
        return
    every = [multilabel.f1(logits >= limit, labels)[0] for limit in np.linspace(-6, 6, 241)]
    assert multilabel.f1(logits >= found, labels)[0] == pytest.approx(max(every), rel=1e-12)


def test_errors_of_numbers_are_those_of_scikit_learn() -> None:
    truth = SCORES + RANDOM.normal(size=SCORES.shape)
    expected = r2_score(truth, SCORES, multioutput="raw_values")
    np.testing.assert_allclose(regression.r2(SCORES, truth), expected, rtol=1e-12)
    value, low, high = regression.mean_absolute_error(SCORES, truth)
    assert value == pytest.approx(mean_absolute_error(truth, SCORES), rel=1e-12)
    assert low < value < high
    assert np.isnan(regression.r2(SCORES[:, :1], np.ones((60, 1))))


def test_the_interval_of_a_mean_is_that_of_its_normal_approximation() -> None:
    values = RANDOM.normal(size=400)
    value, low, high = bootstrap(lambda weights: float(weights @ values / 400), 400)
    margin = 1.96 * values.std() / 20
    assert value == pytest.approx(values.mean(), rel=1e-12)
    assert low == pytest.approx(value - margin, abs=0.2 * margin)
    assert high == pytest.approx(value + margin, abs=0.2 * margin)
    with pytest.raises(ConfigError, match="at least one image"):
        bootstrap(lambda weights: 0.0, 0)
