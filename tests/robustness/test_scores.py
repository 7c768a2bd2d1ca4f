from __future__ import annotations

import numpy as np
import pytest

from vpt.robustness.scores import mean_per_class, top1, wilson

# Class 0: 3 of 4 right, class 2: 0 of 1, class 1 has no image.
LABELS = np.array([0, 0, 0, 0, 2])
LOGITS = np.eye(3, dtype=np.float32)[[0, 0, 0, 1, 1]]


def test_top1_counts_images() -> None:
    assert top1(LOGITS, LABELS) == pytest.approx(3 / 5)


def test_mean_per_class_counts_only_classes_that_occur() -> None:
    assert mean_per_class(LOGITS, LABELS) == pytest.approx((3 / 4 + 0) / 2)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    # 15 of 148 and 81 of 263: Newcombe, Statistics in Medicine 17 (1998), table I, method 3; the ends by hand.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0)],
)
def test_wilson_gives_the_published_intervals(hits: int, n: int, low: float, high: float) -> None:
    assert list(wilson(hits, n)) == pytest.approx([low, high], abs=5e-5)
