from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from vpt.errors import ConfigError
from vpt.metrics.calibration import aurc, risk_at, risk_threshold, risks


def test_risks_of_three_images_by_hand() -> None:
    confidence, correct = np.array([0.5, 0.9, 0.7]), np.array([True, True, False])
    np.testing.assert_allclose(risks(confidence, correct), [0, 1 / 2, 1 / 3])
    assert aurc(confidence, correct) == pytest.approx(5 / 18)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.sampled_from([0.4, 0.6, 1.0]), st.booleans()), min_size=1, max_size=5))
def test_ties_are_the_mean_over_all_their_orders(images: list[tuple[float, bool]]) -> None:
    curves = []
    for order in permutations(images):
        correct = [hit for _, hit in sorted(order, key=lambda image: -image[0])]
        curves.append(np.cumsum(~np.array(correct)) / np.arange(1, len(correct) + 1))
    confidence, correct_ = np.array([c for c, _ in images]), np.array([hit for _, hit in images])
    np.testing.assert_allclose(risks(confidence, correct_), np.mean(curves, axis=0), atol=1e-12)


@pytest.mark.parametrize(("coverage", "risk"), [(0.8, 0), (0.81, 1 / 9), (1.0, 2 / 10), (0.01, 0)])
def test_coverage_is_rounded_up_to_whole_images(coverage: float, risk: float) -> None:
    confidence = np.linspace(0.1, 1, 10)
    assert risk_at(coverage, confidence, confidence > 0.25) == pytest.approx(risk)


def test_a_coverage_that_only_rounding_lifts_above_a_whole_number_is_that_number() -> None:
    confidence = np.linspace(0.01, 1, 100)
    assert 0.55 * 100 > 55
    assert risk_at(0.55, confidence, confidence > 0.455) == 0


@pytest.mark.parametrize("coverage", [0, -1, 1.1])
def test_impossible_coverage_is_refused(coverage: float) -> None:
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        risk_at(coverage, np.ones(3), np.ones(3, dtype=np.bool_))


def test_a_threshold_keeps_its_promise_as_often_as_it_says() -> None:
    """Answers of confidence c are right with probability c: the true risk above a threshold is known."""
    random, broken, found = np.random.default_rng(0), 0, 0
    for _ in range(400):
        confidence = 1 - 0.4 * random.random(300) ** 2
        correct = random.random(300) < confidence
        try:
            threshold = risk_threshold(confidence, correct, 0.1)
        except ConfigError:
            continue
        found += 1
        fresh = 1 - 0.4 * random.random(200_000) ** 2
        broken += (1 - fresh[fresh >= threshold]).mean() > 0.1
    assert found > 300
    assert broken <= 0.1 * found


def test_the_errors_above_a_threshold_pass_a_binomial_test() -> None:
    random = np.random.default_rng(1)
    confidence = 1 - 0.4 * random.random(500) ** 2
    correct = random.random(500) < confidence
    threshold = risk_threshold(confidence, correct, 0.1)
    answered = confidence >= threshold
    wrong, n = int((answered & ~correct).sum()), int(answered.sum())
    assert beta.ppf(1 - 0.1 / 4, wrong + 1, n - wrong) <= 0.1
    assert risk_threshold(confidence, correct, 0.15) < threshold < risk_threshold(confidence, correct, 0.07)


def test_a_promise_that_cannot_be_kept_is_refused() -> None:
    right = np.ones(200, dtype=bool)
    assert risk_threshold(np.full(200, 0.8), right, 0.05) == 0.001
    with pytest.raises(ConfigError, match="it takes 72 right ones"):
        risk_threshold(np.full(200, 0.8), np.arange(200) % 5 > 0, 0.05)
    assert risk_threshold(np.full(72, 0.8), right[:72], 0.05) == 0.001
    with pytest.raises(ConfigError, match="No threshold"):
        risk_threshold(np.full(71, 0.8), right[:71], 0.05)
    for share in (0.0, 1.0):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            risk_threshold(np.full(200, 0.8), right, share)
