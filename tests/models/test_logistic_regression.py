"""The exact head is the minimum that scikit-learn finds, and says so when there is none."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from vpt.errors import ConfigError, DivergedError
from vpt.models.logistic_regression import fit_logistic, out_of_fold


def problem(rows: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = 2 * torch.randn(rows, 8, generator=generator, dtype=torch.float64)
    return features, torch.randint(0, 4, (rows,), generator=generator)


@pytest.mark.parametrize("l2", [1e-3, 0.1, 10.0])
def test_it_is_the_minimum_of_scikit_learn(l2: float) -> None:
    features, labels = problem()
    weight, bias = fit_logistic(features, labels, 4, l2)
    theirs = LogisticRegression(C=1 / (l2 * len(labels)), tol=1e-10, max_iter=10_000)
    theirs.fit(features.numpy(), labels.numpy())
    torch.testing.assert_close(weight, torch.from_numpy(theirs.coef_), rtol=1e-4, atol=1e-5)
    # A constant on all biases changes no probability.
    centred = torch.from_numpy(theirs.intercept_ - theirs.intercept_.mean())
    torch.testing.assert_close(bias - bias.mean(), centred, rtol=1e-4, atol=1e-4)


def test_a_class_without_images_gets_the_lowest_bias() -> None:
    features, labels = problem()
    weight, bias = fit_logistic(features.float(), labels, 5, 0.1)
    assert weight.shape == (5, 8)
    assert weight.dtype == torch.float32
    assert int(bias.argmin()) == 4


def test_no_penalty_and_no_minimum_are_refused() -> None:
    features, labels = problem()
    with pytest.raises(ConfigError, match="l2 must be positive"):
        fit_logistic(features, labels, 4, 0.0)
    with pytest.raises(DivergedError, match="L-BFGS stopped"):
        fit_logistic(features * float("nan"), labels, 4, 0.1)


def test_answers_out_of_fold_are_of_heads_that_have_not_seen_the_image() -> None:
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 3
    features = torch.randn(24, 4, generator=random, dtype=torch.float64) + 2 * torch.eye(4, dtype=torch.float64)[labels]
    found = out_of_fold(features, labels, 3, 0.1, folds=4)
    seen = 0
    for row in range(24):
        others = [each for each in range(24) if each != row]
        changed = features.clone()
        changed[row] += 5
        moved = out_of_fold(changed, labels, 3, 0.1, folds=4)
        mates = [each for each in others if torch.allclose(moved[each], found[each], atol=1e-9)]
        assert len(mates) == 5  # those of its own fold, whose heads have not seen it
        assert sorted(labels[[row, *mates]].tolist()) == [0, 0, 1, 1, 2, 2]
        kept = [each for each in others if each not in mates]
        weight, bias = fit_logistic(features[kept], labels[kept], 3, 0.1)
        torch.testing.assert_close(found[row], features[row] @ weight.T + bias, rtol=1e-9, atol=1e-9)
        seen += 1
    assert seen == 24
