from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from vpt.errors import ConfigError
from vpt.metrics.accuracy import clopper_pearson, wilson

Interval = Callable[[int, int], tuple[float, float]]


# Newcombe, Statistics in Medicine 17 (1998), table I, methods 3 and 5; 20 of 20 by symmetry.
@pytest.mark.parametrize(
    ("interval", "hits", "n", "low", "high"),
    [
        (wilson, 81, 263, 0.2553, 0.3662),
        (wilson, 15, 148, 0.0624, 0.1605),
        (wilson, 0, 20, 0.0, 0.1611),
        (wilson, 20, 20, 0.8389, 1.0),
        (clopper_pearson, 81, 263, 0.2527, 0.3676),
        (clopper_pearson, 15, 148, 0.0578, 0.1617),
        (clopper_pearson, 0, 20, 0.0, 0.1684),
        (clopper_pearson, 20, 20, 0.8316, 1.0),
    ],
)
def test_intervals_are_the_published_ones(interval: Interval, hits: int, n: int, low: float, high: float) -> None:
    assert list(interval(hits, n)) == pytest.approx([low, high], abs=5e-5)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_intervals_are_those_of_scipy(case: tuple[int, int]) -> None:
    for interval, method in ((wilson, "wilson"), (clopper_pearson, "exact")):
        theirs = binomtest(*case).proportion_ci(0.95, method)
        assert list(interval(*case)) == pytest.approx([theirs.low, theirs.high], abs=1e-12)


@pytest.mark.parametrize("interval", [wilson, clopper_pearson])
@pytest.mark.parametrize(("hits", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_impossible_counts_are_refused(interval: Interval, hits: int, n: int) -> None:
    with pytest.raises(ConfigError, match=f"got {hits} of {n}"):
        interval(hits, n)
