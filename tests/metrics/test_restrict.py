from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes_suites import make_imagenet
from vpt.data import ImageNetDataModule
from vpt.data.catalog.classes import objectnet_folders, subset_ids
from vpt.metrics.class_masks import mean_probability, restrict
from vpt.tasks import LinearProbe

GROUPS = ((0,), (2, 5), (3, 1))


def test_only_the_classes_of_the_set_are_left_and_of_several_positions_the_largest_counts() -> None:
    logits = torch.tensor([[1.0, 7.0, 2.0, 4.0, 9.0, 3.0], [0.0, 0.0, 5.0, 1.0, 9.0, -1.0]])
    none = -torch.inf
    expected = torch.tensor([[1.0, none, 3.0, 7.0, none, none], [0.0, none, 5.0, 1.0, none, none]])
    assert torch.equal(restrict(logits, GROUPS), expected)


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


def test_coarse_classes_have_the_mean_probability_of_their_members() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.15, 0.05, 0.2]]))
    torch.testing.assert_close(mean_probability(logits, GROUPS), torch.tensor([[0.1, 0.25, 0.175]]))


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
