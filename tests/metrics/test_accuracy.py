from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vpt.errors import ConfigError
from vpt.metrics.accuracy import difference, mean_per_class, top1, wilson

# Class 0: 3 of 4 right, class 2: 0 of 1, class 1 has no image.
LABELS = np.array([0, 0, 0, 0, 2])
LOGITS = np.eye(3, dtype=np.float32)[[0, 0, 0, 1, 1]]


def test_top1_counts_images() -> None:
    assert top1(LOGITS, LABELS) == pytest.approx(3 / 5)


def test_mean_per_class_counts_only_classes_that_occur() -> None:
    assert mean_per_class(LOGITS, LABELS) == pytest.approx((3 / 4 + 0) / 2)


# Newcombe, Statistics in Medicine 17 (1998), table I, method 3; 20 of 20 by symmetry.
@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0)],
)
def test_intervals_are_the_published_ones(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("hits", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_impossible_counts_are_refused(hits: int, n: int) -> None:
    with pytest.raises(ConfigError, match=f"got {hits} of {n}"):
        wilson(hits, n)


def hits(both: int, wins: int, losses: int, neither: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which images two models classify rightly."""
    counts = [both, wins, losses, neither]
    return np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)


def test_the_difference_and_its_test_by_hand() -> None:
    found = difference(*hits(80, 9, 1, 10))
    assert (found.n, found.value) == (100, 0.08)
    assert found.p_value == pytest.approx(2 * (1 + 10) / 2**10)  # two tails of ten tosses


def test_the_interval_is_that_of_resampled_images() -> None:
    found = difference(*hits(100, 40, 25, 35))
    single = np.repeat([0, 1, -1, 0], [100, 40, 25, 35])
    drawn = single[np.random.default_rng(1).integers(0, 200, (20_000, 200))].mean(axis=1)
    assert [found.low, found.high] == pytest.approx(np.quantile(drawn, (0.025, 0.975)).tolist(), abs=0.0051)
    spread = 1.96 * np.sqrt(single.var() / 200)
    assert [found.low, found.high] == pytest.approx([0.075 - spread, 0.075 + spread], abs=0.006)


def test_a_bootstrap_depends_on_its_seed_alone() -> None:
    first, second = hits(50_000, 20_011, 19_000, 11_000)
    assert difference(first, second, seed=3) == difference(first, second, seed=3)
    assert difference(first, second, seed=3) != difference(first, second, seed=4)


@settings(max_examples=30)
@given(st.tuples(*[st.integers(0, 30)] * 4).filter(any))
def test_swapping_the_models_turns_the_sign(counts: tuple[int, int, int, int]) -> None:
    first, second = hits(*counts)
    one, other = difference(first, second), difference(second, first)
    assert one.value == -other.value
    assert one.p_value == pytest.approx(other.p_value)
    assert one.low <= one.value <= one.high


def test_equal_models_do_not_differ() -> None:
    found = difference(*hits(5, 0, 0, 5))
    assert (found.value, found.low, found.high, found.p_value) == (0, 0, 0, 1)
