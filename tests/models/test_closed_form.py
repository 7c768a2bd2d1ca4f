"""Heads in closed form are scikit-learn's, and never choose a class that they have not seen."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.neighbors import NearestCentroid
from torch import Tensor

from vpt.errors import ConfigError, DivergedError
from vpt.models.closed_form import fit_class_means, fit_ridge

Head = tuple[Tensor, Tensor]


def problem(rows: int = 60, seed: int = 0, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = 2 * torch.randn(rows, 8, generator=generator, dtype=torch.float64) + 3
    return features, torch.randint(0, classes, (rows,), generator=generator)


def ridge(features: Tensor, labels: Tensor, num_classes: int) -> Head:
    return fit_ridge(features, labels, num_classes, 0.1)


@pytest.mark.parametrize("rows", [6, 60], ids=["fewer images than features", "more"])
@pytest.mark.parametrize("l2", [1e-3, 0.1, 10.0])
def test_ridge_is_that_of_scikit_learn(l2: float, rows: int) -> None:
    features, labels = problem(rows)
    weight, bias = fit_ridge(features, labels, 4, l2)
    targets = np.eye(4)[labels.numpy()]
    theirs = Ridge(alpha=l2 * rows).fit(features.numpy(), targets)
    np.testing.assert_allclose(weight, theirs.coef_, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(bias, theirs.intercept_, rtol=1e-8, atol=1e-12)
    if len(set(labels.tolist())) == 4:
        classifier = RidgeClassifier(alpha=l2 * rows).fit(features.numpy(), labels.numpy())
        decisions = classifier.decision_function(features.numpy())  # of targets −1 and 1
        np.testing.assert_allclose(features @ weight.T + bias, (decisions + 1) / 2, rtol=1e-8, atol=1e-12)


def test_ridge_is_where_the_gradient_of_its_loss_vanishes() -> None:
    features, labels = problem()
    weight, bias = (part.requires_grad_() for part in fit_ridge(features, labels, 4, 0.2))
    errors = features @ weight.T + bias - torch.eye(4, dtype=torch.float64)[labels]
    loss = 0.5 * errors.square().sum(dim=1).mean() + 0.5 * 0.2 * weight.square().sum()
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_outputs_of_ridge_sum_to_one() -> None:
    features, labels = problem()
    weight, bias = fit_ridge(features, labels, 4, 0.01)
    torch.testing.assert_close((features @ weight.T + bias).sum(dim=1), torch.ones(60, dtype=torch.float64))


def test_the_nearest_class_mean_is_that_of_scikit_learn() -> None:
    features, labels = problem()
    weight, bias = fit_class_means(features, labels, 4)
    theirs = NearestCentroid().fit(features.numpy(), labels.numpy())
    new = problem(500, seed=1)[0]
    logits = new @ weight.T + bias
    np.testing.assert_array_equal(logits.argmax(dim=1), theirs.predict(new.numpy()))
    distances = torch.cdist(new, torch.from_numpy(theirs.centroids_)).square()
    torch.testing.assert_close(logits.softmax(dim=1), (-distances).softmax(dim=1), rtol=1e-8, atol=1e-12)
    centre = torch.from_numpy(theirs.centroids_).mean(dim=0)
    torch.testing.assert_close(logits, (new - centre).square().sum(dim=1, keepdim=True) - distances)


@pytest.mark.parametrize("fit", [ridge, fit_class_means], ids=["ridge", "ncm"])
@given(seed=st.integers(0, 2**31), absent=st.integers(0, 4))
def test_a_class_without_images_is_never_chosen(
    fit: Callable[[Tensor, Tensor, int], Head], seed: int, absent: int
) -> None:
    features, labels = problem(12, seed)
    labels = labels + (labels >= absent).long()
    weight, bias = fit(features.float(), labels, 5)
    assert weight.dtype == torch.float32
    logits = 3 * problem(50, seed + 1)[0].float() @ weight.T + bias
    others = [each for each in range(5) if each in labels]
    if len(others) > 1:
        assert bool((logits[:, absent] < logits[:, others].amax(dim=1)).all())


@pytest.mark.parametrize("fit", [ridge, fit_class_means], ids=["ridge", "ncm"])
def test_rows_that_no_head_can_be_fitted_to_are_refused(fit: Callable[[Tensor, Tensor, int], Head]) -> None:
    features, labels = problem()
    with pytest.raises(DivergedError, match="Features of training images are not finite"):
        fit(features * float("inf"), labels, 4)
    with pytest.raises(ConfigError, match=r"one label a row, at least one, in \[0, 3\)"):
        fit(features, labels, 3)


def test_ridge_without_a_penalty_is_refused() -> None:
    with pytest.raises(ConfigError, match="l2 must be positive"):
        fit_ridge(*problem(), 4, 0.0)
