from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax
from torchmetrics.functional.classification import binary_auroc

from vpt.errors import DataError
from vpt.robustness.ood import detection


def tables() -> tuple[np.ndarray[tuple[int, int], np.dtype[np.float32]], ...]:
    generator = np.random.default_rng(0)
    inside = 2 * generator.normal(size=(200, 6)).astype(np.float32)
    return inside, generator.normal(size=(150, 6)).astype(np.float32)


def test_areas_are_those_of_torchmetrics() -> None:
    inside, outside = (table.astype(np.float64) for table in tables())
    found = detection(inside, outside)
    target = torch.tensor([1] * 200 + [0] * 150)
    both = np.concatenate([inside, outside])
    scores = {"msp": softmax(both, axis=1).max(axis=1), "energy": logsumexp(both, axis=1) / 30}  # it takes [0, 1]
    for name, score in scores.items():
        theirs = float(binary_auroc(torch.from_numpy(score), target))
        assert found[f"auroc_{name}"] == pytest.approx(theirs, abs=1e-6)


def test_fpr95_by_hand() -> None:
    inside = np.stack([np.arange(1, 21), np.zeros(20)], axis=1)  # 19 of 20 have a margin of at least 2
    outside = np.array([[1.5, 0], [2, 0], [2.5, 0], [0.5, 0]])
    found = detection(inside, outside)
    assert found["fpr95_msp"] == 2 / 4
    assert found["fpr95_energy"] == 2 / 4
    assert found["auroc_msp"] == pytest.approx(1 - (1 + 1.5 + 2) / 80)  # pairs in the wrong order


def test_confidence_ignores_a_common_shift_of_the_logits_and_energy_does_not() -> None:
    inside, outside = tables()
    moved = detection(inside, outside + 100)
    assert moved["auroc_msp"] == pytest.approx(detection(inside, outside)["auroc_msp"], abs=1e-3)
    assert (moved["auroc_energy"], moved["fpr95_energy"]) == (0, 1)


def test_equal_scores_are_chance() -> None:
    same = np.ones((7, 3), dtype=np.float32)
    assert detection(same, same) == {"auroc_msp": 0.5, "fpr95_msp": 1, "auroc_energy": 0.5, "fpr95_energy": 1}


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(DataError, match="at least one of each"):
        detection(tables()[0], tables()[1][:0])
