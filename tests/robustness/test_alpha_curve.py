from __future__ import annotations

from fractions import Fraction
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vpt.errors import ConfigError, DataError
from vpt.metrics.accuracy import top1
from vpt.metrics.logits import group_max
from vpt.robustness.alpha_curve import accuracy_curve

GRID = np.arange(17) / 16  # sums of small integers are exact at these α
Tables = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]


@st.composite
def small(draw: st.DrawFn, classes: int | None = None) -> Tables:
    """Tables of small integers, where ties abound."""
    n, c = draw(st.integers(1, 6)), classes or draw(st.integers(1, 4))
    numbers = draw(st.lists(st.integers(-3, 3), min_size=2 * n * c, max_size=2 * n * c))
    zero, one = np.array(numbers, dtype=np.float32).reshape(2, n, c)
    labels = draw(st.lists(st.integers(0, c - 1), min_size=n, max_size=n))
    return zero, one, np.array(labels, dtype=np.int64)


def mixed(zero: NDArray[np.float32], one: NDArray[np.float32], alpha: float) -> NDArray[np.float64]:
    return (1 - alpha) * zero.astype(np.float64) + alpha * one.astype(np.float64)


@given(small())
def test_the_curve_is_brute_force_on_a_grid(tables: Tables) -> None:
    zero, one, labels = tables
    curve = accuracy_curve(zero, one, labels)
    brute = [top1(mixed(zero, one, alpha).astype(np.float32), labels) for alpha in GRID]
    assert curve.accuracy(GRID).tolist() == brute
    assert not np.signbit(curve.breaks).any()  # no -0
    assert curve.accuracy([0, 1]).tolist() == [top1(zero, labels), top1(one, labels)]


@given(small(classes=6), st.permutations(range(6)), st.sampled_from([(1, 2), (2, 2), (3, 1), (1, 1, 3), (2, 2, 2)]))
def test_the_curve_of_groups_is_brute_force_on_a_grid(tables: Tables, order: list[int], sizes: tuple[int, ...]) -> None:
    zero, one, labels = tables
    ends = np.cumsum(sizes)
    groups = [order[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    labels = labels % len(groups)
    tables_at = [torch.from_numpy(mixed(zero, one, alpha)) for alpha in GRID]
    brute = [top1(group_max(table, groups).float().numpy(), labels) for table in tables_at]
    assert accuracy_curve(zero, one, labels, groups).accuracy(GRID).tolist() == brute


@settings(deadline=None)
@given(small())
def test_the_best_is_the_best_of_all_real_numbers(tables: Tables) -> None:
    zero, one, labels = tables
    crossings = {Fraction(0), Fraction(1)}
    for start, end in zip(zero.astype(int).tolist(), one.astype(int).tolist(), strict=True):
        for j, k in combinations(range(len(start)), 2):
            gap, drift = start[j] - start[k], end[j] - end[k]
            if gap * drift <= 0 and gap != drift:
                crossings.add(Fraction(gap, gap - drift))
    points = sorted(crossings)
    points += [(low + high) / 2 for low, high in pairwise(points)]

    def brute(alpha: Fraction) -> float:
        hits = 0
        for start, end, label in zip(zero.astype(int).tolist(), one.astype(int).tolist(), labels, strict=True):
            logits = [(1 - alpha) * a + alpha * b for a, b in zip(start, end, strict=True)]
            hits += logits.index(max(logits)) == label
        return hits / len(labels)

    curve, exact = accuracy_curve(zero, one, labels), [brute(point) for point in points]
    assert curve.accuracy([float(point) for point in points]).tolist() == exact
    assert curve.best == max(exact)


@pytest.mark.parametrize("block", [1, 2**19])
def test_real_logits_are_brute_force_between_all_breaks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vpt.metrics.logits._BLOCK", block)
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 10, 60)
    zero, one = generator.normal(size=(2, 60, 10)).astype(np.float32) + np.eye(10, dtype=np.float32)[labels]
    curve = accuracy_curve(zero, one, labels)
    middles = (curve.breaks[1:] + curve.breaks[:-1]) / 2
    assert len(middles) > 40
    assert curve.between.tolist() == [float((mixed(zero, one, a).argmax(1) == labels).mean()) for a in middles]


def test_one_image_by_hand() -> None:
    # The lead of class 1 over 0 is 4α − 1, over 2 it is 3 − 4α; of a tie the first class wins.
    zero, one = np.array([[1, 0, -3]], dtype=np.float32), np.array([[0, 3, 4]], dtype=np.float32)
    curve = accuracy_curve(zero, one, np.array([1]))
    assert curve.breaks.tolist() == [0, 0.25, 0.75, 1]
    assert curve.at.tolist() == [0, 0, 1, 0]
    assert curve.between.tolist() == [0, 1, 0]
    assert curve.best == 1


def test_a_class_of_two_columns_may_win_twice_and_counts_once() -> None:
    # First image: 4 − 4α and 4α against 2.5. Second: both columns win at every α.
    zero = np.array([[4, 0, 2.5], [2, 2, 0]], dtype=np.float32)
    one = np.array([[0, 4, 2.5], [2, 2, 0]], dtype=np.float32)
    curve = accuracy_curve(zero, one, np.array([0, 0]), [[0, 1], [2]])
    assert curve.breaks.tolist() == [0, 0.375, 0.625, 1]
    assert curve.at.tolist() == [1, 1, 1, 1]
    assert curve.between.tolist() == [1, 0.5, 1]


def test_the_curve_of_a_mask_is_that_of_its_columns() -> None:
    zero, one = np.random.default_rng(1).normal(size=(2, 20, 8)).astype(np.float32)
    labels = np.arange(20) % 3
    curve = accuracy_curve(zero[:, [5, 2, 7]], one[:, [5, 2, 7]], labels)
    grouped = accuracy_curve(zero, one, labels, [[5], [2], [7]])
    np.testing.assert_array_equal(curve.breaks, grouped.breaks)
    np.testing.assert_array_equal(curve.between, grouped.between)


def test_what_has_no_curve_is_refused() -> None:
    zero, labels = np.zeros((2, 3), dtype=np.float32), np.array([0, 1])
    with pytest.raises(DataError, match="float16, a reduced record"):
        accuracy_curve(zero, zero.astype(np.float16), labels)
    with pytest.raises(DataError, match=r"shapes \(2, 3\) and \(2, 2\)"):
        accuracy_curve(zero, zero[:, :2], labels)
    with pytest.raises(DataError, match=r"Row 0 .* not finite"):
        accuracy_curve(zero, zero - np.inf, labels)
    with pytest.raises(DataError, match="Label 1 is none of 1 classes"):
        accuracy_curve(zero, zero, labels, [[0, 1, 2]])
    with pytest.raises(ConfigError, match="names column 3"):
        accuracy_curve(zero, zero, labels, [[0], [3]])


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_a_curve_ends_at_0_and_1(alpha: float) -> None:
    zero = np.zeros((1, 2), dtype=np.float32)
    with pytest.raises(ConfigError, match=r"between 0 \(first table\) and 1"):
        accuracy_curve(zero, zero, np.array([0])).accuracy(alpha)
