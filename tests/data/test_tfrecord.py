"""Against writers that are not ours: tensorboard's TFRecords and protobuf's messages."""

from __future__ import annotations

import struct
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import (  # type: ignore[import-untyped]
    descriptor_pb2,
    descriptor_pool,
    message_factory,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.summary.writer.record_writer import RecordWriter

from tests.data.originals import example
from vpt.data.prepare.tfrecord import masked_crc32c, parse_example, read, scan
from vpt.errors import DataError

SCHEMA: dict[str, list[tuple[str, int, str | None, str | None]]] = {
    "BytesList": [("value", 1, "BYTES", None)],
    "FloatList": [("value", 1, "FLOAT", None)],
    "Int64List": [("value", 1, "INT64", None)],
    "Feature": [
        ("bytes_list", 1, None, "BytesList"),
        ("float_list", 2, None, "FloatList"),
        ("int64_list", 3, None, "Int64List"),
    ],
    "Entry": [("key", 1, "STRING", None), ("value", 2, None, "Feature")],
    "Features": [("feature", 1, None, "Entry")],
    "Example": [("features", 1, None, "Features")],
}  # fmt: skip


def messages() -> dict[str, Any]:
    """Classes with the wire format of tf.train.Example, made by protobuf itself."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    for name, fields in SCHEMA.items():
        described = file.message_type.add(name=name)
        for field, number, kind, reference in fields:
            repeated = name.endswith("List") or name == "Features"
            added = described.field.add(name=field, number=number, label=3 if repeated else 1)
            added.type = getattr(descriptor_pb2.FieldDescriptorProto, f"TYPE_{kind or 'MESSAGE'}")
            if reference:
                added.type_name = f".t.{reference}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"t.{name}")) for name in SCHEMA}


EXAMPLE = messages()


@pytest.fixture
def records(tmp_path: Path) -> Path:
    stream = BytesIO()
    writer = RecordWriter(stream)
    for data in (b"first", b"", b"x" * 1000):
        writer.write(data)
    file = tmp_path / "a.tfrecord"
    file.write_bytes(stream.getvalue())
    return file


def test_records_of_another_writer_are_read(records: Path) -> None:
    found = list(scan(records))
    assert [data for _, data in found] == [b"first", b"", b"x" * 1000]
    assert [read(records, offset) for offset, _ in found] == [data for _, data in found]


@pytest.mark.parametrize(("data", "crc"), [(b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA)])  # RFC 3720, B.4
def test_checksum_is_the_masked_castagnoli(data: bytes, crc: int) -> None:
    assert masked_crc32c(data) == ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF


@settings(max_examples=30)
@given(image=st.binary(max_size=300), label=st.integers(-(2**63), 2**63 - 1), name=st.text("aß鳥🙂 =\0", max_size=200))
def test_examples_of_protobuf_are_read(image: bytes, label: int, name: str) -> None:
    features: dict[str, dict[str, Any]] = {
        "image": {"bytes_list": {"value": [image]}},
        "scores": {"float_list": {"value": [0.5, 2.0]}},
        "label": {"int64_list": {"value": [label, 3]}},
        f"={name}": {"bytes_list": {"value": [b"a"]}},
    }
    made = EXAMPLE["Example"]()
    for key, value in features.items():
        made.features.feature.append(EXAMPLE["Entry"](key=key, value=EXAMPLE["Feature"](**value)))
    assert parse_example(made.SerializeToString()) == {"image": image, "label": label, f"={name}": b"a"}


def test_integers_may_be_unpacked() -> None:
    entry = b"\x0a\x05label\x12\x05\x1a\x03\x08\xac\x02"  # 300, as field 1 of kind 0
    features = bytes([0x0A, len(entry)]) + entry
    assert parse_example(bytes([0x0A, len(features)]) + features) == {"label": 300}


@given(st.binary(max_size=60))
def test_other_bytes_are_refused_or_empty(data: bytes) -> None:
    try:
        parsed = parse_example(data)
    except ValueError:
        return
    assert all(isinstance(value, int | bytes) for value in parsed.values())


def test_a_cut_example_is_refused() -> None:
    whole = example({"image": b"abc" * 100, "label": 4})
    with pytest.raises(ValueError, match="longer than its message"):
        parse_example(whole[:-5])


@pytest.mark.parametrize("lost", [1, 4, 500, 1003, 1015])
def test_a_truncated_file_is_named(records: Path, lost: int) -> None:
    records.write_bytes(records.read_bytes()[:-lost])
    with pytest.raises(DataError, match=r"a\.tfrecord is not whole \(it ends within the record at byte 37\)"):
        list(scan(records))


def test_a_damaged_length_is_named(records: Path) -> None:
    content = bytearray(records.read_bytes())
    content[21] ^= 1
    records.write_bytes(content)
    with pytest.raises(DataError, match="the length of the record at byte 21 does not match its checksum"):
        list(scan(records))


def test_damaged_data_are_named_when_they_are_used(records: Path) -> None:
    content = bytearray(records.read_bytes())
    content[12] ^= 1
    records.write_bytes(content)
    assert len(list(scan(records))) == 3
    with pytest.raises(DataError, match="the data of the record at byte 0 do not match their checksum"):
        read(records, 0)


def test_a_length_beyond_reason_is_damage(records: Path) -> None:
    length = struct.pack("<Q", 1 << 40)
    records.write_bytes(length + struct.pack("<I", masked_crc32c(length)))
    with pytest.raises(DataError, match="the length of the record at byte 0"):
        list(scan(records))
