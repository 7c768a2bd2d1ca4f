"""Kept features are computed once, wherever they lie."""

from __future__ import annotations

import pytest
import torch

from vpt.models import feature_cache
from vpt.models.feature_cache import FeatureCache


@pytest.mark.parametrize("place", ["memory", "file", "nowhere"])
def test_rows_come_back_from_memory_or_from_a_file(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if place != "memory":
        monkeypatch.setattr(feature_cache, "RAM_SHARE", 0.0)
    if place == "nowhere":
        monkeypatch.setattr(feature_cache, "DISK_SHARE", 0.0)
    images = torch.rand(10, 3, 2, 2)
    seen: list[int] = []

    def compute(batch: torch.Tensor) -> torch.Tensor:
        seen.append(len(batch))
        return batch.flatten(1) * 2

    cache = FeatureCache(compute)
    for rows in ([0, 1, 2], [2, 9, 0], [9, 2]):
        index = torch.tensor(rows)
        assert torch.equal(cache("train", 10, index, images[index]), images[index].flatten(1) * 2)
    assert seen == ([3, 3, 2] if place == "nowhere" else [3, 1])


def test_sets_do_not_mix() -> None:
    cache = FeatureCache(lambda batch: batch.flatten(1))
    index = torch.tensor([0])
    cache("train", 1, index, torch.zeros(1, 3, 1, 1))
    assert torch.equal(cache("val", 1, index, torch.ones(1, 3, 1, 1)), torch.ones(1, 3))
