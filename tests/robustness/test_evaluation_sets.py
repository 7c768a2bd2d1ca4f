from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.robustness.fakes import images, task
from vpt.data.corruptions import BASIC
from vpt.errors import ConfigError, UnknownNameError
from vpt.robustness.evaluation_sets import EvaluationSet, evaluation_sets, subset


def test_sets_are_clean_then_shifts_then_every_corruption_at_every_severity() -> None:
    names = [item.name for item in evaluation_sets(task(), (1, 5))]
    assert names == ["clean", "art", *(f"{kind}-{severity}" for kind in BASIC for severity in (1, 5))]


@pytest.mark.parametrize("severities", [(0,), (6,), (3, 3)])
def test_severities_that_do_not_exist_are_refused(severities: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="distinct numbers out of 1, 2, 3, 4, 5"):
        evaluation_sets(task(), severities)


def test_the_kinds_of_corruption_can_be_chosen_and_a_mistake_in_them_is_named() -> None:
    names = [item.name for item in evaluation_sets(task(shift=None), (2,), ("fog", "frost"))]
    assert names == ["clean", "fog-2", "frost-2"]
    with pytest.raises(UnknownNameError, match="did you mean 'frost'"):
        evaluation_sets(task(), corruptions=("frosty",))
    with pytest.raises(ConfigError, match="'fog' is named twice"):
        evaluation_sets(task(), corruptions=("fog", "fog"))


def test_a_shift_named_like_another_set_is_refused() -> None:
    with pytest.raises(ConfigError, match="shift_contrast-3"):
        evaluation_sets(task(shift="contrast-3"))


def test_an_image_is_corrupted_alike_in_any_company() -> None:
    batch = torch.from_numpy(images(4, 0))
    noise = EvaluationSet("test", "gaussian_noise", 3)
    together = noise.variant(batch, ["a.jpg", "b.jpg", "c.jpg", "d.jpg"])
    alone = noise.variant(batch[2:3], ["c.jpg"])
    assert together.shape == batch.shape
    assert together.dtype == torch.uint8
    assert torch.equal(together[2:3], alone)
    assert not torch.equal(together, batch)


def test_a_subset_keeps_the_shares_of_the_classes_and_depends_on_the_seed() -> None:
    labels = np.repeat(np.arange(3), [60, 30, 10])
    chosen = subset(labels, 20, seed=0)
    assert np.bincount(labels[chosen]).tolist() == [12, 6, 2]
    assert np.all(np.diff(chosen) > 0)
    assert np.array_equal(chosen, subset(labels, 20, seed=0))
    assert not np.array_equal(chosen, subset(labels, 20, seed=1))


@pytest.mark.parametrize("number", [1, 2, 7, 99])
def test_a_subset_has_exactly_the_size_asked_for(number: int) -> None:
    labels = np.repeat(np.arange(5), 20)
    assert len(subset(labels, number, seed=3)) == number


@pytest.mark.parametrize("number", [None, 100, 1000])
def test_no_limit_means_all_images(number: int | None) -> None:
    assert np.array_equal(subset(np.zeros(100, dtype=np.int64), number, seed=0), np.arange(100))


def test_an_empty_subset_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        subset(np.zeros(3, dtype=np.int64), 0, seed=0)
