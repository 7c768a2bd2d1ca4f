from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from sklearn.metrics import log_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from vpt.errors import DataError
from vpt.metrics.calibration import equal_mass, equal_width, temperature
from vpt.metrics.logits import predictions


def table(seed: int, n: int = 300, classes: int = 5) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits that are too sure: labels are drawn from the softmax at temperature 2.5."""
    generator = np.random.default_rng(seed)
    logits = (3 * generator.normal(size=(n, classes))).astype(np.float32)
    noise = generator.gumbel(size=(n, classes))
    return logits, (logits / 2.5 + noise).argmax(axis=1)


def test_probabilities_of_two_classes_by_hand() -> None:
    logits = np.log(np.array([[3, 1], [1, 4]], dtype=np.float64))  # 3/4 and 1/5
    found = predictions(logits, np.array([0, 0]))
    assert found.correct.tolist() == [True, False]
    np.testing.assert_allclose(found.confidence, [3 / 4, 4 / 5])
    np.testing.assert_allclose(found.log_likelihood, np.log([3 / 4, 1 / 5]))
    np.testing.assert_allclose(found.brier, [2 / 16, 2 * 16 / 25])
    assert found.nll == pytest.approx(-(math.log(3 / 4) + math.log(1 / 5)) / 2)


@pytest.mark.parametrize("block", [1, 64, 2**19])
def test_likelihood_and_brier_are_those_of_the_plain_formulation(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vpt.metrics.logits._BLOCK", block)
    logits, labels = table(0)
    found, plain = predictions(logits, labels), softmax(logits.astype(np.float64), axis=1)
    assert found.nll == pytest.approx(log_loss(labels, plain, labels=range(5)))
    assert found.brier.mean() == pytest.approx(np.square(plain - np.eye(5)[labels]).sum(axis=1).mean())
    np.testing.assert_array_equal(found.correct, logits.argmax(axis=1) == labels)


def test_logits_of_any_size_have_finite_scores() -> None:
    found = predictions(np.array([[1e4, -1e4], [0, 1e-30]], dtype=np.float32), np.array([1, 1]))
    assert found.log_likelihood.tolist() == pytest.approx([-2e4, math.log(0.5)])
    assert found.brier.tolist() == pytest.approx([2, 0.5])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_calibration_error_is_that_of_torchmetrics(seed: int) -> None:
    logits, labels = table(seed)
    found = predictions(logits, labels)
    assert found.confidence.max() < 1  # which torchmetrics bins apart
    probabilities = torch.from_numpy(softmax(logits.astype(np.float64), axis=1))
    theirs = multiclass_calibration_error(probabilities, torch.from_numpy(labels), num_classes=5, n_bins=15)
    assert equal_width(found.confidence, found.correct).error == pytest.approx(float(theirs), abs=1e-7)


def test_bins_of_equal_width_hold_their_upper_edge() -> None:
    confidence = np.array([0.5, 0.51, 0.9, 1.0])
    found = equal_width(confidence, np.array([True, False, True, True]), bins=2)
    assert found.count.tolist() == [1, 3]
    np.testing.assert_allclose(found.confidence, [0.5, (0.51 + 0.9 + 1.0) / 3])
    np.testing.assert_allclose(found.accuracy, [1, 2 / 3])
    assert found.error == pytest.approx(0.25 * 0.5 + 0.75 * ((0.51 + 0.9 + 1.0) / 3 - 2 / 3))


def test_bins_of_equal_mass_by_hand() -> None:
    confidence = np.array([0.9, 0.2, 0.6, 0.4, 0.8])
    found = equal_mass(confidence, np.array([True, True, False, False, True]), bins=2)
    assert found.count.tolist() == [3, 2]
    np.testing.assert_allclose(found.confidence, [0.4, 0.85])
    np.testing.assert_allclose(found.accuracy, [1 / 3, 1])
    assert found.error == pytest.approx((3 * (0.4 - 1 / 3) + 2 * 0.15) / 5)


@given(
    images=st.lists(st.tuples(st.sampled_from([0.2, 0.5, 0.8, 1.0]), st.booleans()), min_size=1, max_size=40),
    seed=st.integers(0, 99),
)
def test_bins_do_not_depend_on_the_order_of_the_images(images: list[tuple[float, bool]], seed: int) -> None:
    confidence, correct = np.array([c for c, _ in images]), np.array([hit for _, hit in images])
    order = np.random.default_rng(seed).permutation(len(images))
    for bins in (equal_width, equal_mass):
        ours, theirs = bins(confidence, correct), bins(confidence[order], correct[order])
        assert ours.count.sum() == len(images)
        assert ours.error == pytest.approx(theirs.error, abs=1e-12)
        assert np.average(ours.accuracy, weights=ours.count) == pytest.approx(correct.mean())
        assert np.average(ours.confidence, weights=ours.count) == pytest.approx(confidence.mean())


@pytest.mark.parametrize(("right", "margin"), [(9, 2.0), (7, 0.3), (6, 40.0)])
def test_the_temperature_of_equal_margins_is_known(right: int, margin: float) -> None:
    logits = np.tile(np.array([[margin, 0.0]]), (10, 1))
    labels = np.repeat([0, 1], [right, 10 - right])
    assert temperature(logits, labels) == pytest.approx(margin / math.log(right / (10 - right)), rel=1e-12)


def test_the_temperature_minimises_the_negative_log_likelihood() -> None:
    logits, labels = table(4, n=2000)
    found = temperature(logits, labels)
    searched = minimize_scalar(lambda t: predictions(logits, labels, t).nll, bounds=(0.1, 20), method="bounded")
    assert found == pytest.approx(searched.x, rel=1e-4)
    assert found == pytest.approx(2.5, rel=0.1)
    before, after = predictions(logits, labels), predictions(logits, labels, found or 1)
    assert equal_width(after.confidence, after.correct).error < equal_width(before.confidence, before.correct).error


@given(scale=st.floats(1e-3, 1e3))
def test_the_temperature_follows_the_scale_of_the_logits(scale: float) -> None:
    logits, labels = table(5, n=50)
    base, scaled = temperature(logits, labels), temperature(logits.astype(np.float64) * scale, labels)
    assert scaled == pytest.approx((base or 0) * scale, rel=1e-9)


def test_without_errors_or_without_knowledge_there_is_no_temperature() -> None:
    logits = np.array([[2, 0, 1], [0, 3, 1]], dtype=np.float32)
    assert temperature(logits, np.array([0, 1])) is None  # T → 0
    assert temperature(logits, np.array([1, 0])) is None  # T → ∞
    assert temperature(np.zeros((2, 3), dtype=np.float32), np.array([1, 0])) is None


def test_labels_outside_the_classes_are_refused() -> None:
    for score in (predictions, temperature):
        with pytest.raises(DataError, match="Label 7 is none of 5 classes"):
            score(table(0)[0], np.full(300, 7))
