from __future__ import annotations

import json

import numpy as np
import pytest

from vpt.metrics.summary import summary

# Probabilities 3/4, 4/5 and 3/5 of the first answers; the second is wrong.
LOGITS = np.log(np.array([[3, 1], [1, 4], [3, 2]])).astype(np.float32)
LABELS = np.array([0, 0, 0])


def test_a_summary_by_hand() -> None:
    found = summary(LOGITS, LABELS)
    expected = {
        "n": 3,
        "top1": 2 / 3,
        "top1_low": 0.2077,
        "top1_high": 0.9385,
        "mean_per_class": 2 / 3,
        "worst_class": 2 / 3,
        "nll": -np.log([3 / 4, 1 / 5, 3 / 5]).mean(),
        "brier": (2 / 16 + 2 * 16 / 25 + 2 * 4 / 25) / 3,
        "ece": (1 / 4 + 4 / 5 + 2 / 5) / 3,
        "ece_equal_mass": (1 / 4 + 4 / 5 + 2 / 5) / 3,
        "aurc": (1 + 1 / 2 + 1 / 3) / 3,
        "risk_at_80": 1 / 3,
        "temperature": None,
        "nll_scaled": None,
        "ece_scaled": None,
        "ece_equal_mass_scaled": None,
    }
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, abs=5e-5)
    assert json.loads(json.dumps(found)) == found


def test_a_temperature_adds_its_scores_and_changes_no_other() -> None:
    plain, scaled = summary(LOGITS, LABELS), summary(LOGITS, LABELS, temperature=2.0)
    halved = summary(LOGITS / 2, LABELS)
    assert list(scaled) == list(plain)
    changed = {"nll_scaled": "nll", "ece_scaled": "ece", "ece_equal_mass_scaled": "ece_equal_mass"}
    assert [scaled[key] for key in changed] == pytest.approx([halved[key] for key in changed.values()])
    assert {key for key in plain if plain[key] != scaled[key]} == {"temperature", *changed}
