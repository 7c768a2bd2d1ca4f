from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vpt.errors import DataError
from vpt.robustness.logit_records import Record, read, resume, write


@pytest.fixture
def record() -> Record:
    generator = np.random.default_rng(0)
    return Record(
        index=np.array([0, 3, 7]),
        label=np.array([1, 0, 1]),
        logits=generator.normal(size=(3, 4)).astype(np.float32),
        protocol={"set": "fog-3", "alpha": 0.25, "seed": None, "delta": {"specs": [{"name": "prompt"}]}},
        complete=True,
    )


def test_a_record_comes_back_bit_for_bit(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.parquet"
    write(path, record)
    again = read(path)
    for name in ("index", "label", "logits"):
        ours, theirs = getattr(record, name), getattr(again, name)
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)
    assert (again.protocol, again.complete) == (record.protocol, True)
    assert [file.name for file in path.parent.iterdir()] == ["r.parquet"]


def test_accuracy_is_computed_from_the_record(record: Record) -> None:
    logits = np.eye(4, dtype=np.float32)[[1, 0, 2]]
    assert replace(record, logits=logits).accuracy == pytest.approx(2 / 3)


def test_records_of_the_same_images_agree_in_index_and_label(record: Record) -> None:
    assert record.same_images(replace(record, logits=-record.logits))
    assert not record.same_images(replace(record, index=np.array([0, 3, 8])))
    assert not record.same_images(replace(record, label=np.array([1, 0, 0])))
    assert not record.same_images(replace(record, index=record.index[:2], label=record.label[:2]))


def test_a_record_of_half_precision_comes_back_as_such(record: Record, tmp_path: Path) -> None:
    half = replace(record, logits=record.logits.astype(np.float16))
    write(tmp_path / "r.parquet", half)
    again = read(tmp_path / "r.parquet")
    assert again.logits.dtype == np.float16
    assert np.array_equal(again.logits, half.logits)


def test_only_an_equal_protocol_is_resumed(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    assert resume(path, record.protocol) is None
    write(path, record)
    assert resume(path, record.protocol) is not None
    assert resume(path, {**record.protocol, "alpha": 0.5}) is None


def test_a_damaged_record_is_refused_by_name_and_never_resumed(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    write(path, record)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"r\.parquet is not a record"):
        read(path)
    assert resume(path, record.protocol) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"label": np.array([1, 0, 4])}, "Label 4 is none of 4 classes"),
        ({"logits": np.full((3, 4), np.nan, np.float32)}, "not finite"),
        ({"index": np.array([0, -3, 7])}, "not a record"),
        ({"protocol": ["fog"]}, "not a record"),
    ],
)
def test_what_no_model_answers_is_no_record(
    record: Record, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    write(tmp_path / "r.parquet", replace(record, **changes))
    with pytest.raises(DataError, match=reason):
        read(tmp_path / "r.parquet")


def test_a_parquet_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"index": [1]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="is not a record"):
        read(tmp_path / "x.parquet")
