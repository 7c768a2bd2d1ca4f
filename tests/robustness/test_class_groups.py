"""Test sets with some of the head's classes are scored among these, from records that keep all logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.fakes_suites import make_imagenet
from tests.robustness.fakes import write_delta
from vpt.data import ImageNetDataModule
from vpt.data.catalog.classes import imagenet_names, objectnet_folders, subset_ids
from vpt.robustness import run
from vpt.robustness.logit_records import Record, read


def test_accuracy_is_taken_among_the_groups_of_the_protocol() -> None:
    logits = np.array([[9, 1, 5, 4], [9, 1, 2, 3]], dtype=np.float32)
    label = np.array([2, 1])
    assert Record(np.arange(2), label, logits, {}, complete=True).accuracy == 0.0
    assert Record(np.arange(2), label, logits, {"groups": [[2], [1]]}, complete=True).accuracy == 0.5
    assert Record(np.arange(2), label, logits, {"groups": [[2], [1, 3]]}, complete=True).accuracy == 1.0


def test_an_evaluation_scores_each_imagenet_set_among_its_classes(tmp_path: Path) -> None:
    for card in ("imagenet_sketch", "imagenet_r", "objectnet"):
        make_imagenet(tmp_path / "data", card, classes=8)
    shifts = ["imagenet_r", "objectnet"]
    data = ImageNetDataModule(
        "imagenet_sketch", tmp_path / "data", shifts, preset="square", image_size=64, allow_partial=True
    )
    delta = write_delta(tmp_path / "linear.safetensors", (), class_names=imagenet_names())
    result = run(delta, data, (1.0,), tmp_path / "out", severities=())
    assert [row.set for row in result.rows] == ["clean", *shifts]
    for row, columns in zip(result.rows[1:], (subset_ids("imagenet_r"), sorted(sum(objectnet_folders().values(), ()))),
                            strict=True):  # fmt: skip
        record = read(tmp_path / "out" / "records" / str(row.record))
        assert np.isfinite(record.logits).all()
        assert np.isfinite(record.scored).sum(axis=1).tolist() == [113 if row.set == "objectnet" else 200] * row.n
        best = np.array(columns)[record.logits[:, columns].argmax(axis=1)]
        label = {each: group[0] for group in record.protocol["groups"] for each in group}
        assert record.scored.argmax(axis=1).tolist() == [label[each] for each in best]
    clean = read(tmp_path / "out" / "records" / str(result.rows[0].record))
    assert clean.protocol["groups"] is None
    assert clean.protocol["data"]["complete"] is False
