from __future__ import annotations

import numpy as np
import pytest

from vpt.metrics.accuracy import mean_per_class, top1, worst_group

# Class 0: 3 of 4 right, class 2: 0 of 1, class 1 has no image.
LABELS = np.array([0, 0, 0, 0, 2])
LOGITS = np.eye(3, dtype=np.float32)[[0, 0, 0, 1, 1]]


def test_top1_counts_images() -> None:
    assert top1(LOGITS, LABELS) == pytest.approx(3 / 5)


def test_mean_per_class_counts_only_classes_that_occur() -> None:
    assert mean_per_class(LOGITS, LABELS) == pytest.approx((3 / 4 + 0) / 2)


def test_the_worst_group_is_the_lowest_share_of_those_that_occur() -> None:
    assert worst_group(LOGITS, LABELS, np.array([0, 0, 3, 3, 3])) == pytest.approx(1 / 3)
    assert worst_group(LOGITS, LABELS, np.zeros(5, dtype=np.int64)) == top1(LOGITS, LABELS)
