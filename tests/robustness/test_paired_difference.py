from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpt.errors import DataError
from vpt.robustness.evaluation.paired_difference import check_same_images, difference
from vpt.robustness.evaluation.records import Record


def record(hits: list[bool]) -> Record:
    """Labels are all 0, so a hit is a logit of class 0."""
    logits = np.eye(2, dtype=np.float32)[[0 if hit else 1 for hit in hits]]
    n = len(hits)
    return Record(np.arange(n), np.zeros(n, dtype=np.int64), logits, {"set": "art"}, True)


def pair(both: int, wins: int, losses: int, neither: int) -> tuple[Record, Record]:
    ours = [True] * both + [True] * wins + [False] * losses + [False] * neither
    theirs = [True] * both + [False] * wins + [True] * losses + [False] * neither
    return record(ours), record(theirs)


def test_the_difference_and_its_test_by_hand() -> None:
    found = difference(*pair(80, 9, 1, 10))
    assert (found.n, found.value) == (100, 0.08)
    assert found.p_value == pytest.approx(2 * (1 + 10) / 2**10)  # two tails of ten tosses


def test_the_interval_is_that_of_resampled_images() -> None:
    first, second = pair(100, 40, 25, 35)
    found = difference(first, second)
    single = np.repeat([0, 1, -1, 0], [100, 40, 25, 35])
    drawn = single[np.random.default_rng(1).integers(0, 200, (20_000, 200))].mean(axis=1)
    assert [found.low, found.high] == pytest.approx(np.quantile(drawn, (0.025, 0.975)).tolist(), abs=0.0051)
    spread = 1.96 * np.sqrt(single.var() / 200)
    assert [found.low, found.high] == pytest.approx([0.075 - spread, 0.075 + spread], abs=0.006)


def test_a_bootstrap_depends_on_its_seed_alone() -> None:
    first, second = pair(50_000, 20_011, 19_000, 11_000)
    assert difference(first, second, seed=3) == difference(first, second, seed=3)
    assert difference(first, second, seed=3) != difference(first, second, seed=4)


@given(st.tuples(*[st.integers(0, 30)] * 4).filter(any))
def test_swapping_the_models_turns_the_sign(counts: tuple[int, int, int, int]) -> None:
    first, second = pair(*counts)
    one, other = difference(first, second), difference(second, first)
    assert one.value == -other.value
    assert one.p_value == pytest.approx(other.p_value)
    assert one.low <= one.value <= one.high


def test_equal_models_do_not_differ() -> None:
    found = difference(*pair(5, 0, 0, 5))
    assert (found.value, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_records_of_different_images_are_refused() -> None:
    ours = record([True, False])
    with pytest.raises(DataError, match=r"'art' \(2 images\) and 'art' \(3 images\) hold different images"):
        difference(ours, record([True] * 3))
    with pytest.raises(DataError, match="hold different images"):
        check_same_images(ours, replace(ours, index=np.array([0, 2])))
    with pytest.raises(DataError, match="hold different labels"):
        check_same_images(ours, replace(ours, label=np.array([0, 1])))
