from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.robustness import fakes
from tests.robustness.fakes import PROMPTS, kept, split, task
from vpt.data import ImageDataModule
from vpt.data.corruptions import BASIC, CORRUPTIONS, SEVERITIES
from vpt.data.splits import Split
from vpt.errors import ConfigError, DataError
from vpt.models.delta_format import read_delta, write_delta
from vpt.robustness import RobustnessResult, Row, run
from vpt.robustness.evaluation_result import between, choose_alpha, shown_alphas
from vpt.robustness.evaluation_sets import VAL
from vpt.robustness.logit_records import Record, read


def row(alpha: float, top1: float, kind: str = VAL) -> Row:
    return Row(kind, kind, None, 10, alpha, top1, top1, top1, top1, None)


def record(seed: int, **changes: Any) -> Record:
    logits = np.random.default_rng(seed).normal(size=(20, 4)).astype(np.float32)
    values: dict[str, Any] = {"index": np.arange(20), "label": np.arange(20) % 4, "logits": logits, "complete": True}
    return Record(**values | {"protocol": {"set": "clean", "alpha": float(seed), "groups": None}} | changes)


def test_alpha_is_chosen_by_validation_rows_alone() -> None:
    rows = [row(0.0, 0.7), row(0.25, 0.8), row(0.5, 0.6), row(1.0, 0.9, "clean")]
    assert choose_alpha(rows) == 0.25


@pytest.mark.parametrize(
    ("best", "chosen"), [((0.0, 0.4, 1.0), 0.4), ((0.25, 0.75), 0.25), ((0.0, 1.0), 0.0), ((0.9,), 0.9)]
)
def test_of_equal_alphas_the_one_nearest_to_a_half_is_chosen(best: tuple[float, ...], chosen: float) -> None:
    assert choose_alpha([row(alpha, 0.5) for alpha in best] + [row(0.6, 0.4)]) == chosen


def test_alpha_is_chosen_by_the_likelihood_under_corruptions_where_it_was_measured() -> None:
    plain = [row(0.0, 0.9), row(1.0, 0.8)]
    corrupted = [
        replace(row(alpha, 0.5, "val-corrupted"), nll=nll) for alpha, nll in ((0.0, 1.5), (0.75, 1.2), (1.0, 1.2))
    ]
    assert choose_alpha([*plain, *corrupted, replace(row(0.5, 1.0, "clean"), nll=0.1)]) == 0.75
    assert choose_alpha([*plain, *(replace(each, nll=None) for each in corrupted)]) == 0.0


def test_without_validation_rows_nothing_is_chosen() -> None:
    with pytest.raises(ConfigError, match=r"use the fixed α = 0\.5"):
        choose_alpha([row(0.5, 0.9, "clean")])


def test_logits_between_two_records_are_their_mixture() -> None:
    start, end = record(0), record(1)
    middle = between(start, end, 0.3)
    np.testing.assert_allclose(middle.logits, 0.7 * start.logits + 0.3 * end.logits, rtol=1e-6, atol=1e-7)
    assert middle.protocol["alpha"] == 0.3
    assert np.array_equal(between(start, end, 0.0).logits, start.logits)
    assert np.array_equal(between(start, end, 1.0).logits, end.logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": np.zeros((20, 4), dtype=np.float16)}, "without --half"),
        ({"complete": False}, "complete records"),
        ({"index": np.arange(1, 21)}, "different images"),
        ({"label": np.zeros(20, dtype=np.int64)}, "different images"),
    ],
)
def test_records_that_cannot_be_mixed_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        between(record(0), record(1, **change), 0.5)


def labels(kinds: Sequence[str], severities: Sequence[int], **protocol: str) -> list[str]:
    rows = [Row(f"{k}-{s}", k, s, 10, 1.0, s / 10, 0.0, 1.0, 0.5, None) for k in kinds for s in severities]
    return [label for label, _, _ in RobustnessResult(rows, protocol, Path("out")).groups()]


def test_a_mean_says_which_kinds_and_severities_it_is_of_and_frost_is_marked() -> None:
    new = {"corruptions": "imagenet-c"}
    assert labels(("fog",), (3,), **new) == ["fog (severity 3)"]
    assert labels(("pixelate", "contrast"), (1, 3), **new)[1:] == [
        "contrast (mean of severities 1, 3)",
        "mean of contrast, pixelate (severities 1, 3)",
    ]
    assert labels(BASIC, (5,), **new)[-1] == "mean of the basic 5 (severity 5)"
    *_, fifteen, nineteen = labels(CORRUPTIONS, SEVERITIES, **new)
    assert fifteen == "mean of ImageNet-C's 15 with frost (procedural) (severities 1-5)"
    assert nineteen == "mean of all 19 with frost (procedural) (severities 1-5)"
    assert labels(CORRUPTIONS[:15], SEVERITIES, **new)[-1] == fifteen
    marked = labels(("fog", "frost"), (1,), **new)
    assert marked[1:] == ["frost (procedural) (severity 1)", "mean of frost (procedural), fog (severity 1)"]


def test_the_mean_of_the_fifteen_leaves_the_others_out() -> None:
    top1 = {kind: place / 100 for place, kind in enumerate(CORRUPTIONS)}
    rows = [Row(f"{kind}-1", kind, 1, 10, 1.0, top1[kind], 0.0, 1.0, 0.5, None) for kind in CORRUPTIONS]
    *_, (_, fifteen, _), (_, nineteen, _) = RobustnessResult(rows, {}, Path("out")).groups()
    assert sum(row.top1 for row in fifteen) / len(fifteen) == pytest.approx(0.07)
    assert sum(row.top1 for row in nineteen) / len(nineteen) == pytest.approx(0.09)


def test_corruptions_of_version_0_1_have_another_name() -> None:
    assert labels(("fog",), (3,)) == ["fog (severity 3, parameters of vpt 0.1)"]


def test_a_table_has_room_for_five_alphas() -> None:
    assert shown_alphas([0.0, 0.1, 0.2, 0.3, 0.4]) == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert shown_alphas([step / 10 for step in range(11)]) == [0.0, 0.5, 1.0]


def measure(delta: Path, out: Path, data: ImageDataModule | None = None, **changes: Any) -> RobustnessResult:
    arguments: dict[str, Any] = {"alphas": (0.0, 0.5, 1.0), "severities": (), "batch_size": 4} | changes
    return run(delta, data or task(), out=out, **arguments)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakes.write_delta(tmp_path_factory.mktemp("result") / "prompts.safetensors", PROMPTS)


@pytest.fixture(scope="session")
def whole(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> RobustnessResult:
    """An evaluation in full precision that tests read and leave as it is."""
    return measure(prompts, tmp_path_factory.mktemp("whole"))


def test_the_chosen_alpha_is_written_beside_the_fixed_one(whole: RobustnessResult) -> None:
    stored = json.loads((whole.out / "robustness.json").read_text())["alpha"]
    assert stored == {"fixed": 0.5, "chosen_on_val": whole.chosen_alpha, "why_not": None}


def test_validation_images_that_were_trained_on_choose_nothing(prompts: Path, tmp_path: Path) -> None:
    splits = {"train": split("val", 6, 2), "val": split("val", 6, 2), "test": split("test", 10, 3)}
    data = ImageDataModule("fake", task().class_names, splits, "square", 64, 4, 0, 0, "none", None)
    result = measure(prompts, tmp_path, data)
    assert result.chosen_alpha is None
    assert "6 of its 6 images were trained on" in str(result.table().caption)
    assert not [row for row in result.rows if row.set == VAL]


def test_what_the_delta_was_trained_on_counts_not_what_the_data_say_now(prompts: Path, tmp_path: Path) -> None:
    header, tensors = read_delta(prompts)
    header["info"] = {"data": {"shared_with_train": {"val": 2}}}
    delta = write_delta(tmp_path / "delta.safetensors", header, tensors)
    assert "2 of its 6 images were trained on" in str(measure(delta, tmp_path).not_chosen)


def test_an_anchor_that_was_trained_on_validation_images_chooses_nothing_on_them(prompts: Path, tmp_path: Path) -> None:
    anchor = fakes.write_delta(tmp_path / "anchor.safetensors", ())
    header, tensors = read_delta(anchor)
    header["info"] = {"data": {"shared_with_train": {"val": 6}}}
    write_delta(anchor, header, tensors)
    assert "6 of its 6 images were trained on" in str(measure(prompts, tmp_path / "out", anchor=anchor).not_chosen)


def test_a_model_that_had_other_validation_images_may_have_been_trained_on_these(prompts: Path, tmp_path: Path) -> None:
    anchor = fakes.write_delta(tmp_path / "anchor.safetensors", ())
    header, tensors = read_delta(anchor)
    for val, message in (("f" * 64, "other validation images"), (task().describe()["fingerprints"]["val"], None)):
        header["info"] = {"data": {"shared_with_train": {"val": 0}, "fingerprints": {"val": val}}}
        write_delta(anchor, header, tensors)
        why = measure(prompts, tmp_path / val[:4], anchor=anchor).not_chosen
        assert (why is None) if message is None else (message in str(why))


def test_repeated_images_choose_nothing_and_the_others_do(prompts: Path, tmp_path: Path) -> None:
    pixels = {name: fakes.images(n, seed) for name, n, seed in (("train", 6, 1), ("val", 6, 2), ("test", 5, 3))}
    pixels["val"][:2] = pixels["train"][:2]  # as in a dataset that repeats itself
    splits = {
        name: Split(name, [f"{name}/{i}" for i in range(len(each))], np.arange(len(each)) % 3, partial(np.array, each))
        for name, each in pixels.items()
    }
    data = ImageDataModule("fake", fakes.CLASSES, splits, "square", fakes.SIZE, 4, 0, 0, "none", None)
    result = measure(prompts, tmp_path, data=data)
    assert result.not_chosen is None
    assert {row.n for row in result.rows if row.set == VAL} == {4}


def test_half_precision_is_marked_and_only_on_request(prompts: Path, whole: RobustnessResult, tmp_path: Path) -> None:
    measure(prompts, tmp_path, half=True)
    full, half = (read(kept(out, "clean-alpha-0.5")) for out in (whole.out, tmp_path))
    assert (str(full.logits.dtype), full.protocol["logits"]) == ("float32", "float32")
    assert (str(half.logits.dtype), half.protocol["logits"]) == ("float16", "float16")
    np.testing.assert_array_equal(half.logits, full.logits.astype(np.float16))


def test_bfloat16_is_marked_and_only_on_request(prompts: Path, whole: RobustnessResult, tmp_path: Path) -> None:
    measure(prompts, tmp_path, alphas=(0.5,), bf16=True)
    full, half = (read(kept(out, "clean-alpha-0.5")) for out in (whole.out, tmp_path))
    assert (full.protocol["precision"], half.protocol["precision"]) == ("fp32", "bf16")
    assert half.logits.dtype == np.float32
    assert 1e-5 < np.abs(half.logits - full.logits).max() / np.abs(full.logits).max() < 0.05


class Masked(ImageDataModule):
    """Data whose test split has two of the three classes."""

    def groups(self, name: str) -> list[tuple[int, ...]] | None:
        known: dict[str, list[tuple[int, ...]]] = {"test": [(0,), (1, 2)], "art": [(0,), (1,)]}
        return known.get(name)


def masked(classes: int, shift: bool) -> Masked:
    part = split("test", 12, 3)
    test = split("test", 12, 3)
    object.__setattr__(test, "labels", part.labels % classes)
    splits = {"train": split("train", 6, 1), "val": split("val", 6, 2), "test": test}
    if shift:
        splits["art"] = split("shift_art", 6, 4)
    return Masked("fake", task().class_names, splits, "square", 64, 4, 0, 0, "none", None)


def test_the_mask_of_a_set_is_kept_and_obeyed(prompts: Path, tmp_path: Path) -> None:
    result = measure(prompts, tmp_path, masked(2, shift=False))
    record = read(kept(tmp_path, "clean-alpha-0.5"))
    assert record.protocol["groups"] == [[0], [1, 2]]
    answers = np.where(record.logits[:, 0] >= record.logits[:, 1:].max(axis=1), 0, 1)
    expected = (answers == record.label).mean()
    assert next(row.top1 for row in result.rows if (row.set, row.alpha) == ("clean", 0.5)) == pytest.approx(expected)


def test_an_image_outside_its_mask_is_refused(prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs full precision"):
        measure(prompts, tmp_path, masked(2, shift=False), half=True)
    with pytest.raises(ConfigError, match="Class 2 occurs in 'art' of fake, but its class mask leaves it out"):
        measure(prompts, tmp_path, masked(2, shift=True))
