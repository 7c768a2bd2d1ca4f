from __future__ import annotations

import numpy as np
import pytest

from vpt.errors import DataError
from vpt.metrics.label_errors import suspicious


def test_the_example_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.4, 0.6], [0.95, 0.05]])
    labels = np.array([0, 0, 1, 1, 1])
    # Usual probabilities: class 0 (0.9 + 0.7) / 2 = 0.8, class 1 (0.8 + 0.6 + 0.05) / 3 = 0.483.
    assert suspicious(probabilities, labels).tolist() == [4]


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_confident_joint_off_its_diagonal(seed: int) -> None:
    random = np.random.default_rng(seed)
    probabilities = random.dirichlet(np.ones(4), 200)
    labels = (probabilities + 0.2 * random.random((200, 4))).argmax(axis=1)
    usual = [probabilities[labels == each, each].mean() for each in range(4)]
    expected = []
    for row, label in enumerate(labels):
        confident = [each for each in range(4) if probabilities[row, each] >= usual[each]]
        if confident:
            best = max(confident, key=lambda each: probabilities[row, each])
            if best != label and probabilities[row, best] > probabilities[row, label]:
                expected.append(row)
    found = suspicious(probabilities, labels)
    assert sorted(found.tolist()) == expected
    own = probabilities[found, labels[found]]
    assert (np.diff(own) >= 0).all()


def test_flipped_labels_are_found() -> None:
    random = np.random.default_rng(0)
    truth = random.integers(0, 5, 500)
    probabilities = 0.9 * np.eye(5)[truth] + 0.02
    labels = truth.copy()
    flipped = random.choice(500, 20, replace=False)
    labels[flipped] = (labels[flipped] + 1) % 5
    assert set(suspicious(probabilities, labels).tolist()) == set(flipped.tolist())


def test_labels_without_a_column_are_refused() -> None:
    with pytest.raises(DataError, match="none of 2 classes"):
        suspicious(np.full((3, 2), 0.5), np.array([0, 1, 2]))
