from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from tests.fakes_suites import make_imagenet
from vpt.data import ImageNetDataModule
from vpt.data.catalog.classes import objectnet_folders, subset_ids
from vpt.errors import ConfigError, DataError
from vpt.metrics.accuracy import top1
from vpt.metrics.logits import blocks, check_table, group_max, group_mean, matched, positions, restrict
from vpt.tasks import LinearProbe

LOGITS = np.array([[9, 1, 2, 0], [0, 3, 1, 8], [5, 0, 4, 4]], dtype=np.float32)
LABELS = np.array([2, 1, 0])


def test_a_record_is_matched_to_classes_by_rows_and_columns() -> None:
    logits, labels = matched(LOGITS, LABELS, [[2], [0]])
    assert logits.tolist() == [[2, 9], [4, 5]]
    assert logits.dtype == np.float32
    assert labels.tolist() == [0, 1]
    assert matched(LOGITS, LABELS, None) == (LOGITS, LABELS)


@pytest.mark.parametrize(("groups", "accuracy"), [(None, 1 / 4), ([[0], [1]], 1 / 3), ([[0, 2], [1]], 3 / 4)])
def test_accuracy_is_taken_among_the_matched_classes(groups: list[list[int]] | None, accuracy: float) -> None:
    logits = np.array([[3, 0, 9], [0, 1, 9], [0, 0, 9], [1, 0, 0]], dtype=np.float32)
    assert top1(*matched(logits, np.array([0, 0, 2, 1]), groups)) == accuracy


def test_a_mask_takes_its_columns_before_the_argmax() -> None:
    assert (top1(LOGITS[:2], LABELS[:2]), top1(*matched(LOGITS[:2], LABELS[:2], [[1], [2]]))) == (0, 1)


def test_a_class_of_several_columns_has_the_largest_logit() -> None:
    assert group_max(torch.from_numpy(LOGITS), [[3, 0], [1]]).tolist() == [[9, 1], [8, 3], [5, 0]]


def test_labels_in_no_group_have_no_position() -> None:
    assert positions(np.array([0, 3, 5, 1, 9]), [(3, 0), (1,)]).tolist() == [0, 0, -1, 1, -1]


@settings(max_examples=20)
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
    ("groups", "message"),
    [([[1], [4]], "names column 4, the logits have columns 0 to 3"), ([[0], [-1]], "names column -1"),
     ([], "is empty"), ([[0], []], "is empty")],
)  # fmt: skip
def test_groups_that_do_not_fit_are_refused(groups: list[list[int]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        group_max(torch.from_numpy(LOGITS), groups)
    with pytest.raises(ConfigError, match=message):
        group_mean(LOGITS, groups)


def test_classes_without_images_cannot_be_matched() -> None:
    with pytest.raises(ConfigError, match="None of 3 images has one of the 1 classes"):
        matched(LOGITS, LABELS, [[3]])


def test_reduced_records_are_not_masked() -> None:
    with pytest.raises(DataError, match="float16, a reduced record"):
        matched(LOGITS.astype(np.float16), LABELS, [[0], [1]])
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


def test_only_the_classes_of_the_set_are_left_and_of_several_positions_the_largest_counts() -> None:
    logits = torch.tensor([[1.0, 7.0, 2.0, 4.0, 9.0, 3.0], [0.0, 0.0, 5.0, 1.0, 9.0, -1.0]])
    none = -torch.inf
    expected = torch.tensor([[1.0, none, 3.0, 7.0, none, none], [0.0, none, 5.0, 1.0, none, none]])
    assert torch.equal(restrict(logits, ((0,), (2, 5), (3, 1))), expected)


@given(st.integers(0, 2**31 - 1))
def test_it_is_argmax_over_the_columns_of_the_subset(seed: int) -> None:
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(seed))
    ids = torch.tensor(subset_ids("imagenet_r"))
    restricted = restrict(logits, [(int(each),) for each in ids])
    assert torch.equal(restricted.argmax(1), ids[logits[:, ids].argmax(1)])
    torch.testing.assert_close(restricted.softmax(1)[:, ids], logits[:, ids].softmax(1))


@given(st.integers(0, 2**31 - 1))
def test_for_objectnet_it_is_argmax_over_125_columns_of_which_any_member_counts(seed: int) -> None:
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(seed))
    groups = list(objectnet_folders().values())
    columns = torch.tensor(sorted(each for group in groups for each in group))
    best = columns[logits[:, columns].argmax(1)].tolist()
    label = {each: group[0] for group in groups for each in group}
    assert restrict(logits, groups).argmax(1).tolist() == [label[each] for each in best]


def test_a_task_counts_among_the_classes_of_its_test_set(tmp_path: Path) -> None:
    make_imagenet(tmp_path, "imagenet_r", classes=1)
    make_imagenet(tmp_path, "imagenet_sketch", classes=1)
    task = LinearProbe(backbone="vit_nano_patch8_64", num_classes=1000)
    with torch.no_grad():
        task.model.head.weight.zero_()
        task.model.head.bias[:2] = torch.tensor([9.0, 5.0])  # 0 is no class of ImageNet-R, 1 is its first
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    for variant, accuracy in (("imagenet_r", 1.0), ("imagenet_sketch", 1.0)):
        data = ImageNetDataModule(variant, tmp_path, image_size=64, allow_partial=True)
        (metrics,) = trainer.test(task, data, verbose=False)
        assert metrics["test/acc"] == accuracy
    data = ImageNetDataModule("imagenet_r", tmp_path, image_size=64, allow_partial=True)
    answers: Any = trainer.predict(task, data)
    assert answers[0]["logits"].argmax(1).tolist() == [1, 1]
