from __future__ import annotations

from itertools import combinations
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize

from vpt.errors import ConfigError
from vpt.metrics.agreement_line import agreement

NORMAL = NormalDist()


def drawn(seed: int, models: int = 5, n: int = 400, classes: int = 6) -> tuple[NDArray[np.int64], ...]:
    """Predictions of models of different quality in and out of distribution, and the labels of both."""
    random = np.random.default_rng(seed)
    found = []
    for worse in (0.0, 0.25):
        labels = random.integers(0, classes, n)
        right = random.random((models, n)) < np.linspace(0.55, 0.9, models)[:, None] - worse
        found += [np.where(right, labels, random.integers(0, classes, (models, n))), labels]
    return tuple(found)


@pytest.mark.parametrize("seed", range(4))
def test_the_line_and_both_estimates_are_those_of_the_paper(seed: int) -> None:
    inside, labels, outside, _ = drawn(seed)
    accuracy = (inside == labels).mean(axis=1)
    found = agreement(inside, outside, accuracy)
    pairs = list(combinations(range(5), 2))
    x = [NORMAL.inv_cdf(float(np.mean(inside[i] == inside[j]))) for i, j in pairs]
    y = [NORMAL.inv_cdf(float(np.mean(outside[i] == outside[j]))) for i, j in pairs]
    slope = np.cov(x, y)[0, 1] / np.var(x, ddof=1)
    intercept = np.mean(y) - slope * np.mean(x)
    assert (found.pairs, found.left_out) == (10, 0)
    assert [found.slope, found.intercept] == pytest.approx([slope, intercept])
    assert found.r2 == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)
    probit = [NORMAL.inv_cdf(float(each)) for each in accuracy]
    np.testing.assert_allclose(found.aline_s, [NORMAL.cdf(slope * each + intercept) for each in probit])

    def apart(w: NDArray[np.float64]) -> float:
        total: float = sum(
            ((w[i] + w[j]) / 2 - y[place] - slope * ((probit[i] + probit[j]) / 2 - x[place])) ** 2
            for place, (i, j) in enumerate(pairs)
        )
        return total

    best = minimize(apart, np.zeros(5), tol=1e-14).x
    assert found.aline_d is not None
    np.testing.assert_allclose(found.aline_d, [NORMAL.cdf(float(each)) for each in best], atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), order=st.permutations(range(5)))
def test_the_order_of_models_changes_nothing(seed: int, order: list[int]) -> None:
    inside, labels, outside, _ = drawn(seed)
    accuracy = (inside == labels).mean(axis=1)
    one, other = agreement(inside, outside, accuracy), agreement(inside[order], outside[order], accuracy[order])
    np.testing.assert_allclose(other.aline_s, one.aline_s[order], rtol=1e-9)
    assert one.aline_d is not None
    assert other.aline_d is not None
    np.testing.assert_allclose(other.aline_d, one.aline_d[order], rtol=1e-9)


def test_without_a_shift_the_line_is_the_diagonal() -> None:
    inside, labels, *_ = drawn(7)
    accuracy = (inside == labels).mean(axis=1)
    found = agreement(inside, inside, accuracy)
    assert [found.slope, found.intercept, found.r2] == pytest.approx([1.0, 0.0, 1.0])
    for estimate in (found.aline_s, found.aline_d):
        np.testing.assert_allclose(estimate, accuracy)  # type: ignore[arg-type]


def test_models_that_pairs_do_not_determine_have_no_direct_estimate() -> None:
    inside, labels, outside, _ = drawn(2, models=4)
    twins = [np.concatenate([each[:3], each[2:3]]) for each in (inside, outside)]  # the last two agree on all
    found = agreement(twins[0], twins[1], (twins[0] == labels).mean(axis=1))
    assert (found.pairs, found.left_out) == (5, 1)
    assert found.aline_d is not None  # the other pairs suffice
    alone = [np.concatenate([each[:3], each[:1] * 0 + 99]) for each in (inside, outside)]  # agrees with nobody
    found = agreement(alone[0], alone[1], np.array([*(inside[:3] == labels).mean(axis=1), 0.1]))
    assert (found.pairs, found.left_out, found.aline_d) == (3, 3, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y, a: (x[:2], y[:2], a[:2]), "at least three models, got 2"),
        (lambda x, y, a: (x, y, a * 0), "right on all images in distribution or on none"),
        (lambda x, y, a: (x[[0] * 5], y, a), "Only 0 of 10 pairs of models agree on 5% to 98%"),
    ],
)
def test_what_is_no_line_is_refused(change: object, message: str) -> None:
    inside, labels, outside, _ = drawn(1)
    with pytest.raises(ConfigError, match=message):
        agreement(*change(inside, outside, (inside == labels).mean(axis=1)))  # type: ignore[operator]


def test_equal_agreement_everywhere_is_no_line() -> None:
    inside = np.array([[0, 0, 1, 1, 2], [0, 1, 0, 1, 2], [1, 0, 0, 1, 2]])
    with pytest.raises(ConfigError, match="which is no line"):
        agreement(inside, inside, np.full(3, 0.5))
