from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from vpt.errors import ConfigError, DataError
from vpt.metrics.accuracy import top1
from vpt.metrics.class_masks import group_max, group_mean, masked, matched
from vpt.metrics.logits import blocks, check_table

LOGITS = np.array([[9, 1, 2, 0], [0, 3, 1, 8], [5, 0, 4, 4]], dtype=np.float32)
LABELS = np.array([2, 1, 0])


def test_a_mask_takes_its_columns_before_the_argmax() -> None:
    subset = masked(LOGITS, (1, 2))
    assert subset.tolist() == [[1, 2], [3, 1], [0, 4]]
    assert subset.dtype == np.float32
    assert (top1(LOGITS[:2], LABELS[:2]), top1(subset[:2], LABELS[:2] - 1)) == (0, 1)


def test_the_order_of_a_mask_is_the_order_of_the_classes() -> None:
    assert masked(LOGITS, (2, 1)).tolist() == [[2, 1], [1, 3], [4, 0]]


def test_a_record_is_matched_to_classes_by_rows_and_columns() -> None:
    logits, labels = matched(LOGITS, LABELS, (2, 0))
    assert logits.tolist() == [[2, 9], [4, 5]]
    assert labels.tolist() == [0, 1]


def test_a_class_of_several_columns_has_the_largest_logit() -> None:
    assert group_max(LOGITS, [[3, 0], [1]]).tolist() == [[9, 1], [8, 3], [5, 0]]


@given(st.integers(0, 99))
def test_a_class_of_several_columns_has_their_mean_probability(seed: int) -> None:
    logits = 5 * np.random.default_rng(seed).normal(size=(4, 7))
    groups = [[0, 3], [1], [6, 2, 4]]
    means = np.stack([softmax(logits, axis=1)[:, group].mean(axis=1) for group in groups], axis=1)
    np.testing.assert_allclose(softmax(group_mean(logits, groups), axis=1), means / means.sum(axis=1, keepdims=True))


def test_mean_probabilities_that_underflow_still_order_the_classes() -> None:
    logits = np.array([[9000, -3000, -3000, -2000, -9000]], dtype=np.float32)
    np.testing.assert_allclose(group_mean(logits, [[1, 2], [3, 4]]), [[-3000, -2000 - np.log(2)]])


@pytest.mark.parametrize(
    ("classes", "message"),
    [((1, 4), "names column 4, the logits have columns 0 to 3"), ((-1,), "names column -1"), ((), "is empty"),
     ((1, 1), "names a column twice")],
)  # fmt: skip
def test_masks_that_do_not_fit_are_refused(classes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        masked(LOGITS, classes)


def test_groups_that_do_not_fit_are_refused() -> None:
    for score in (group_max, group_mean):
        with pytest.raises(ConfigError, match="is empty"):
            score(LOGITS, [[0], []])
        with pytest.raises(ConfigError, match="names column 9"):
            score(LOGITS, [[0, 9]])


def test_classes_without_images_cannot_be_matched() -> None:
    with pytest.raises(ConfigError, match="None of 3 images has one of the 1 classes"):
        matched(LOGITS, LABELS, (3,))


def test_reduced_records_are_not_masked() -> None:
    with pytest.raises(DataError, match="float16, a reduced record"):
        masked(LOGITS.astype(np.float16), (0, 1))
    with pytest.raises(DataError, match="reduced record"):
        group_mean(LOGITS.astype(np.float16), [[0, 1]])


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (LOGITS[:0], LABELS[:0], "at least one of each"),
        (LOGITS[0], LABELS, "table of images × classes"),
        (LOGITS, LABELS[:2], "3 rows of logits and labels of shape"),
        (LOGITS, LABELS + 2, "Label 4 is none of 4 classes, 0 to 3"),
        (LOGITS, LABELS - 1, "Label -1 is none"),
        (np.where(LOGITS == 8, np.nan, LOGITS), LABELS, "Row 1 .* not finite"),
        (np.where(LOGITS == 8, -np.inf, LOGITS), LABELS, "by a mask rather than by -inf"),
    ],
)
def test_tables_that_cannot_be_scored_are_refused(
    logits: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
    labels: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    message: str,
) -> None:
    with pytest.raises(DataError, match=message):
        check_table(logits, labels)


@given(rows=st.integers(0, 3000), columns=st.integers(1, 2**20))
def test_blocks_cover_every_row_once_and_stay_small(rows: int, columns: int) -> None:
    cut = list(blocks(rows, columns))
    assert [row for piece in cut for row in range(piece.start, piece.stop)] == list(range(rows))
    assert all((piece.stop - piece.start) * columns <= max(columns, 2**19) for piece in cut)
