"""A strength for each image, against the rule written out, and where it must be one of the ends."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import softmax
from scipy.stats import entropy as scipy_entropy

from vpt.errors import ConfigError
from vpt.robustness.per_image import answers, entropy, models, weights


def logits(seed: int, n: int = 7, classes: int = 4) -> NDArray[np.float64]:
    return np.asarray(np.random.default_rng(seed).normal(0, 3, (n, classes)))


@given(st.integers(0, 100), st.floats(0.05, 20))
def test_weights_are_the_softmax_of_negative_entropies(seed: int, temperature: float) -> None:
    start, end = logits(seed), logits(seed + 1)
    ours = np.stack([scipy_entropy(softmax(each, axis=1), axis=1) for each in (start, end)])
    np.testing.assert_allclose(entropy(start), ours[0], atol=1e-12)
    expected = softmax(-ours / temperature, axis=0)[1]
    np.testing.assert_allclose(weights(start, end, temperature), expected, atol=1e-12)
    np.testing.assert_allclose(
        answers(start, end, temperature), (1 - expected)[:, None] * start + expected[:, None] * end, atol=1e-10
    )


def test_a_sure_end_has_its_way_and_equal_ones_half() -> None:
    sure, unsure = np.array([[50.0, 0, 0]]), np.zeros((1, 3))
    assert weights(unsure, sure, 1e-3) == pytest.approx(1.0)
    assert weights(sure, unsure, 1e-3) == pytest.approx(0.0)
    assert weights(sure, sure) == 0.5
    left = np.array([[5.0, 0.0, -np.inf]]), np.array([[0.0, 0.1, -np.inf]])
    assert answers(*left, 0.01).argmax(axis=1).tolist() == [0]
    masked = np.array([[1.0, 2.0, -np.inf]])
    assert entropy(masked) == pytest.approx(entropy(masked[:, :2]))


@given(st.integers(0, 50))
def test_models_are_those_of_the_nearest_measured_strength(seed: int) -> None:
    by_alpha = {alpha: logits(seed + number) for number, alpha in enumerate((0.0, 0.25, 0.5, 1.0))}
    found = models(by_alpha)
    for row, weight in enumerate(weights(by_alpha[0.0], by_alpha[1.0])):
        nearest = min(by_alpha, key=lambda alpha: (abs(alpha - weight), alpha))
        assert np.array_equal(found[row], by_alpha[nearest][row])
    ends = {alpha: by_alpha[alpha] for alpha in (0.0, 1.0)}
    assert np.isin(models(ends), np.concatenate(list(ends.values()))).all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_is_positive(temperature: float) -> None:
    with pytest.raises(ConfigError, match="is positive"):
        weights(logits(0), logits(1), temperature)
