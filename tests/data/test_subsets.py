from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vpt.data.splits import few_shot, hold_out, position_hash
from vpt.errors import ConfigError

SIZES = st.lists(st.integers(2, 30), min_size=1, max_size=6)
SEEDS = st.integers(0, 2**32)


def listed(sizes: list[int], seed: int = 0) -> tuple[list[str], NDArray[np.int64], list[str]]:
    """A list in mixed order of classes of these sizes."""
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    return (
        [f"images/{position}.jpg" for position in range(len(labels))],
        labels,
        [f"class {i}" for i in range(99)][: len(sizes)],
    )


@settings(max_examples=40)
@given(SIZES, SEEDS)
def test_shots_take_that_many_of_every_class_and_more_shots_hold_fewer(sizes: list[int], seed: int) -> None:
    names, labels, classes = listed(sizes)
    parts = [few_shot(names, labels, classes, shots, None, seed) for shots in range(1, min(sizes) + 1)]
    for shots, part in enumerate(parts, start=1):
        assert np.bincount(labels[part]).tolist() == [shots] * len(sizes)
        assert part.tolist() == sorted(set(part.tolist()))
        assert set(part.tolist()) >= set(parts[max(0, shots - 2)].tolist())


@settings(max_examples=40)
@given(SIZES, SEEDS, st.floats(0, 1, exclude_min=True), st.floats(0, 1, exclude_min=True))
def test_fractions_are_nested_and_within_half_an_image_of_each_class(
    sizes: list[int], seed: int, one: float, other: float
) -> None:
    names, labels, classes = listed(sizes)
    small, large = (few_shot(names, labels, classes, None, fraction, seed) for fraction in sorted((one, other)))
    assert set(small.tolist()) <= set(large.tolist())
    counts = np.bincount(labels[small], minlength=len(sizes))
    wanted = np.maximum(1, min(one, other) * np.array(sizes))
    assert (abs(counts - wanted) <= 0.5).all()
    assert few_shot(names, labels, classes, None, 1.0, seed).tolist() == list(range(len(names)))


@settings(max_examples=40)
@given(SIZES, SEEDS)
def test_the_choice_follows_the_names_and_not_the_order_of_the_list(sizes: list[int], seed: int) -> None:
    names, labels, classes = listed(sizes)
    order = np.random.default_rng(1).permutation(len(names))
    again = few_shot([names[i] for i in order], labels[order], classes, 2, None, seed)
    assert sorted(order[again]) == few_shot(names, labels, classes, 2, None, seed).tolist()


def test_another_seed_chooses_other_images() -> None:
    names, labels, classes = listed([40, 40])
    assert len({tuple(few_shot(names, labels, classes, 4, None, seed).tolist()) for seed in range(20)}) == 20


def test_the_choice_is_the_same_on_every_machine() -> None:
    names, labels, classes = [f"{i}.jpg" for i in range(8)], np.array([0, 1] * 4), ["a", "b"]
    ranks = {i: hashlib.sha256(f"7 {i}.jpg".encode()).hexdigest() for i in range(8)}
    first = sorted(range(0, 8, 2), key=ranks.__getitem__)[:2] + sorted(range(1, 8, 2), key=ranks.__getitem__)[:2]
    assert few_shot(names, labels, classes, 2, None, 7).tolist() == sorted(first) == [0, 2, 3, 5]
    assert position_hash(np.array([0, 2, 3, 5])) == hashlib.sha256(b"0\n2\n3\n5").hexdigest()


def test_more_shots_than_the_smallest_class_has_are_refused() -> None:
    names, labels, _ = listed([9, 5, 7])
    with pytest.raises(ConfigError, match="shots is 6, but class 'owl' has 5 training images: take at most 5"):
        few_shot(names, labels, ["cat", "owl", "dog"], 6, None, 0)
    assert len(few_shot(names, labels, ["cat", "owl", "dog"], 5, None, 0)) == 15


def test_a_test_set_has_no_shots() -> None:
    with pytest.raises(ConfigError, match="these data have none"):
        few_shot([], np.array([], dtype=np.int64), ["cat"], 1, None, 0)


@pytest.mark.parametrize(
    ("shots", "fraction", "part"),
    [(2, 0.5, "not both"), (None, None, "Give either"), (0, None, "shots must be a whole number of at least 1"),
     (2.5, None, "a whole number of at least 1, got 2.5"), (True, None, "got True"), (None, 0.0, "fraction is 0"),
     (None, 1.1, "fraction is 1.1"), (None, float("nan"), "fraction is nan")],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(shots: Any, fraction: float | None, part: str) -> None:
    names, labels, classes = listed([4, 4])
    with pytest.raises(ConfigError, match=part):
        few_shot(names, labels, classes, shots, fraction, 0)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), SEEDS, st.floats(0.01, 0.99))
def test_a_held_out_part_and_the_rest_are_the_list_and_every_class_is_on_both_sides(
    sizes: list[int], seed: int, fraction: float
) -> None:
    names, labels, _ = listed([*sizes, 2])
    train, val = hold_out(names, labels, fraction, seed)
    assert sorted([*train, *val]) == list(range(len(names)))
    trained = np.bincount(labels[train], minlength=len(sizes) + 1)
    for size, rest in zip([*sizes, 2], trained, strict=True):
        assert rest == (size if size < 2 else min(max(round(size - fraction * size), 1), size - 1)) or (
            abs(rest - (1 - fraction) * size) <= 0.5
        )
        assert (0 < rest < size) or size < 2


def test_nothing_can_be_held_out_of_single_images() -> None:
    with pytest.raises(ConfigError, match="No class has two training images"):
        hold_out(["a", "b"], np.array([0, 1]), 0.5, 0)
    with pytest.raises(ConfigError, match=r"val_fraction is 1.* must lie in \(0, 1\)"):
        hold_out(["a", "b"], np.array([0, 0]), 1.0, 0)
