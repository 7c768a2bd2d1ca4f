from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.special import softmax
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

from vpt.errors import ConfigError
from vpt.metrics import ood_detection as ood

RANDOM = np.random.default_rng(0)
FEATURES = RANDOM.normal(size=(60, 5)) + 3 * np.eye(5)[np.arange(60) % 3]
LABELS = np.arange(60) % 3 * 2  # class 1 has no image
OTHERS = RANDOM.normal(size=(9, 5))


def unit(values: np.ndarray) -> np.ndarray:
    return np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True))


def test_the_distance_is_mahalanobis_to_the_nearest_mean() -> None:
    known = unit(FEATURES)
    means = np.stack([known[label == LABELS].mean(axis=0) for label in (0, 2, 4)])
    precision = LedoitWolf(assume_centered=True).fit(known - means[LABELS // 2]).precision_
    expected = cdist(unit(OTHERS), means, "mahalanobis", VI=precision).min(axis=1) ** 2
    found = ood.mahalanobis(OTHERS, *ood.fit_mahalanobis(FEATURES, LABELS))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_fewer_images_than_dimensions_suffice() -> None:
    features = RANDOM.normal(size=(6, 40))
    found = ood.mahalanobis(RANDOM.normal(size=(4, 40)), *ood.fit_mahalanobis(features, np.array([0, 0, 0, 1, 1, 1])))
    assert np.isfinite(found).all()


def test_classes_without_spread_are_refused() -> None:
    with pytest.raises(ConfigError, match="equal features"):
        ood.fit_mahalanobis(np.ones((4, 3)), np.array([0, 0, 1, 1]))


@pytest.mark.parametrize("k", [1, 3])
def test_the_distance_is_that_of_the_kth_nearest(k: int) -> None:
    expected = np.sort(cdist(unit(OTHERS), unit(FEATURES), "sqeuclidean"), axis=1)[:, k - 1]
    np.testing.assert_allclose(ood.nearest_neighbours(OTHERS, FEATURES, k), expected, atol=1e-12)


@pytest.mark.parametrize("k", [0, 61])
def test_there_are_so_many_neighbours_at_most(k: int) -> None:
    with pytest.raises(ConfigError, match="1 to 60"):
        ood.nearest_neighbours(OTHERS, FEATURES, k)


def test_scores_of_logits_are_their_formulas() -> None:
    logits = RANDOM.normal(size=(7, 4))
    np.testing.assert_allclose(ood.msp(logits), 1 - softmax(logits, axis=1).max(axis=1))
    np.testing.assert_allclose(ood.energy(logits), -np.log(np.exp(logits).sum(axis=1)))


def test_detection_is_that_of_all_pairs() -> None:
    known, unknown = RANDOM.integers(0, 9, 40).astype(float), RANDOM.integers(4, 14, 30).astype(float)
    pairs = unknown[:, None] - known
    found = ood.detection(known, unknown)
    assert found.auroc == pytest.approx((pairs > 0).mean() + (pairs == 0).mean() / 2)
    passing = min(level for level in known if (known <= level).mean() >= 0.95)
    assert found.fpr95 == (unknown <= passing).mean()
    for value, (low, high) in ((found.auroc, found.auroc_interval), (found.fpr95, found.fpr95_interval)):
        assert low <= value <= high
    assert ood.detection(known, unknown) == found


def test_intervals_are_those_of_resampled_images() -> None:
    known, unknown = RANDOM.integers(0, 30, 41).astype(float), RANDOM.normal(18, 9, 23)
    random, draws = np.random.default_rng(3), []
    for _ in range(ood.RESAMPLES):
        one, other = random.choice(known, len(known)), random.choice(unknown, len(unknown))
        truth = np.r_[np.zeros(len(one)), np.ones(len(other))]
        draws.append((roc_auc_score(truth, np.r_[one, other]), (other <= np.sort(one)[38]).mean()))  # 39 of 41
    found = ood.detection(known, unknown, seed=3)
    ends = np.quantile(draws, (0.025, 0.975), axis=0)
    np.testing.assert_allclose(ends.T, [found.auroc_interval, found.fpr95_interval], rtol=1e-12)


def test_detection_needs_images_of_both_kinds() -> None:
    with pytest.raises(ConfigError, match="at least one known"):
        ood.detection(np.zeros(3), np.zeros(0))
    with pytest.raises(ConfigError, match="finite"):
        ood.detection(np.zeros(3), np.array([np.nan]))
