from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpt.data.datasets.published_files import hold_out, image_list
from vpt.data.images import ImageList


def images(sizes: list[int]) -> ImageList:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return image_list(Path("train.txt"), Path("folder"), [f"{i}.jpg" for i in range(len(labels))], labels)


def counts(part: ImageList, classes: int) -> list[int]:
    return [int(count) for count in np.bincount(part.labels, minlength=classes)]


@pytest.mark.parametrize(
    ("sizes", "train", "val"),
    [
        ([30] * 194 + [29] * 6, 5394, 600),  # CUB-200-2011: 29 or 30 a class
        ([100] * 120, 10800, 1200),  # Stanford Dogs: 100 a class
        ([41] * 108 + [42] * 88 + [20], 7329, 815),  # Stanford Cars: 8,144 in all
        ([43] * 554 + [107], 21536, 2393),  # NABirds: 23,929 in all
    ],
)
def test_one_in_ten_gives_the_sizes_of_the_published_splits(sizes: list[int], train: int, val: int) -> None:
    kept, held = hold_out(images(sizes), 10)
    assert (len(kept.paths), len(held.paths)) == (train, val)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=12), st.integers(2, 12), st.integers(0, 3))
def test_each_class_gives_its_share_to_within_one_image(sizes: list[int], every: int, seed: int) -> None:
    whole = images(sizes)
    kept, held = hold_out(whole, every, seed)
    assert len(held.paths) == -(-sum(sizes) // every)
    assert sorted([*kept.paths, *held.paths]) == sorted(whole.paths)
    label = dict(zip(whole.paths, whole.labels, strict=True))
    for part in (kept, held):
        assert [label[path] for path in part.paths] == part.labels.tolist()
        assert part.paths == sorted(part.paths, key=lambda path: int(path[:-4]))
    assert all(abs(found - size / every) < 1 for found, size in zip(counts(held, len(sizes)), sizes, strict=True))


def test_the_split_is_the_same_everywhere_and_another_with_another_seed() -> None:
    whole = images([10, 10, 10])
    assert hold_out(whole, 10)[1].paths == ["0.jpg", "12.jpg", "23.jpg"]  # smallest sha256
    assert hold_out(whole, 10, seed=1)[1].paths != hold_out(whole, 10)[1].paths
