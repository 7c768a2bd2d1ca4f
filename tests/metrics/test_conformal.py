from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import softmax

from vpt.errors import ConfigError
from vpt.metrics import conformal

RULES: tuple[conformal.Rule, ...] = ("lac", "aps")


def drawn(seed: int, n: int, classes: int = 6) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Probabilities and labels that do not follow them: the promise holds for wrong models too."""
    random = np.random.default_rng(seed)
    logits = 2 * random.normal(size=(n, classes))
    return softmax(2 * logits, axis=1), (logits + random.gumbel(size=(n, classes))).argmax(axis=1)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.sampled_from([0, 1, 2, 5]), min_size=4, max_size=4).filter(any), min_size=1, max_size=4))
def test_scores_are_those_of_the_definitions(counts: list[list[int]]) -> None:
    probabilities = np.array(counts) / np.sum(counts, axis=1, keepdims=True)
    above = [[sum(q for q in row if q > p) for p in row] for row in probabilities]
    np.testing.assert_allclose(conformal.nonconformity(probabilities, "aps"), above, atol=1e-12)
    np.testing.assert_allclose(conformal.nonconformity(probabilities, "lac"), 1 - probabilities)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.sampled_from([0.1, 0.5, 0.9, 0.95]))
def test_the_quantile_is_the_smallest_score_that_enough_others_do_not_exceed(scores: list[float], share: float) -> None:
    rank = math.ceil((len(scores) + 1) * share - 1e-9)
    if rank > len(scores):
        with pytest.raises(ConfigError, match="do not suffice"):
            conformal.quantile(np.array(scores), share)
    else:
        assert conformal.quantile(np.array(scores), share) == sorted(scores)[rank - 1]


@pytest.mark.parametrize("share", [0.8, 0.9])
def test_so_many_images_suffice_as_the_sentence_says(share: float) -> None:
    with pytest.raises(ConfigError, match="it takes") as error:
        conformal.quantile(np.zeros(3), share)
    least = int(str(error.value).split("it takes ")[1].split()[0])
    assert conformal.quantile(np.zeros(least), share) == 0
    with pytest.raises(ConfigError):
        conformal.quantile(np.zeros(least - 1), share)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("coverage", [0.8, 0.9])
def test_sets_hold_the_truth_as_often_as_promised(rule: conformal.Rule, coverage: float) -> None:
    shares = []
    for seed in range(200):  # the promise is of the mean over calibrations
        probabilities, labels = drawn(seed, 300)
        own = conformal.nonconformity(probabilities[:100], rule)[np.arange(100), labels[:100]]
        held = conformal.sets(probabilities[100:], rule, conformal.quantile(own, coverage))
        shares.append(held[np.arange(200), labels[100:]].mean())
    error = np.std(shares) / math.sqrt(len(shares))
    assert coverage - 3 * error < np.mean(shares) < coverage + 0.02 + 3 * error


@pytest.mark.parametrize("rule", RULES)
def test_a_set_holds_the_most_probable_class_and_no_class_without_those_above_it(rule: conformal.Rule) -> None:
    probabilities, _ = drawn(0, 50)
    for threshold in (-1.0, 0.3, 0.9):
        held = conformal.sets(probabilities, rule, threshold)
        for row, kept in zip(probabilities, held, strict=True):
            order = np.argsort(-row)
            assert kept[order].tolist() == [True] * kept.sum() + [False] * (6 - kept.sum())
            assert kept[order[0]]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        conformal.quantile(np.arange(100.0), share)
