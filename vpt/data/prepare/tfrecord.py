"""TFRecord files of ``tf.train.Example``, read without TensorFlow, and DMLab, whose original comes as such.

A record is, little-endian: length (uint64), masked CRC-32C of the length, data, masked CRC-32C of the data.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vpt.data.catalog.cards import Card
from vpt.data.datasets.published_files import damaged
from vpt.data.prepare.originals import MissingOriginalError, Part, home

Value = int | bytes
_LARGEST = 1 << 28  # bytes; a length beyond it is damage and not a picture


def read_dmlab(source: Path, card: Card) -> dict[str, Part]:
    """``dmlab-{train,validation,test}.tfrecord*`` with the features image, label and filename."""
    return {name: _dmlab_part(source, name) for name in ("train", "validation", "test")}


def _dmlab_part(source: Path, name: str) -> Part:
    files = sorted(home(source).rglob(f"dmlab-{name}.tfrecord*"))
    if not files:
        raise MissingOriginalError(f"{source} holds no dmlab-{name}.tfrecord*")
    places: list[tuple[Path, int]] = []
    names: list[str] = []
    labels: list[int] = []
    for file in files:
        for offset, data in scan(file):
            image, label = _dmlab_record(file, data)
            kind = "png" if image.startswith(b"\x89PNG") else "jpg"
            names.append(f"{name}/{len(names):06d}.{kind}")
            places.append((file, offset))
            labels.append(label)

    def picture(position: int) -> bytes:
        file, offset = places[position]
        return _dmlab_record(file, read(file, offset))[0]

    return Part(names, np.array(labels, dtype=np.int64), picture)


def _dmlab_record(file: Path, data: bytes) -> tuple[bytes, int]:
    try:
        example = parse_example(data)
    except ValueError as error:
        raise damaged(file, "a file of tf.train.Example", error) from error
    image, label = example.get("image"), example.get("label")
    if not isinstance(image, bytes) or not isinstance(label, int):
        raise damaged(file, "a file of images with labels", f"a record has {sorted(example)}")
    return image, label


def scan(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yields offset and data of each record. Checks the lengths only: checking gigabytes of data takes minutes.

    A DataError where the file is truncated or a length is damaged.
    """
    with file.open("rb") as stream:
        while (offset := stream.tell()) < file.stat().st_size:
            yield offset, _next(stream, file)[0]


def read(file: Path, offset: int) -> bytes:
    """Returns the data of the record at an offset in bytes, checked; a DataError where it is damaged."""
    with file.open("rb") as stream:
        stream.seek(offset)
        data, checksum = _next(stream, file)
    if masked_crc32c(data) != checksum:
        raise damaged(file, "intact", f"the data of the record at byte {offset} do not match their checksum")
    return data


def _next(stream: BinaryIO, file: Path) -> tuple[bytes, int]:
    """Reads one record: its data and their stated checksum."""
    offset = stream.tell()
    header = stream.read(12)
    if len(header) == 12:
        length, checksum = struct.unpack("<QI", header)
        if masked_crc32c(header[:8]) != checksum or length > _LARGEST:
            raise damaged(file, "intact", f"the length of the record at byte {offset} does not match its checksum")
        body = stream.read(length + 4)
        if len(body) == length + 4:
            return body[:-4], int.from_bytes(body[-4:], "little")
    raise damaged(file, "whole", f"it ends within the record at byte {offset}")


def parse_example(data: bytes) -> dict[str, Value]:
    """Reads a serialised ``tf.train.Example``: the first value of each feature of bytes or integers.

    A protocol buffer: field 1 features, therein field 1 a map entry of name (1) and feature (2), therein bytes (1) or
    integers (3) as a list in field 1. A ValueError where it is not one.
    """
    example: dict[str, Value] = {}
    for features in _messages(data, 1):
        for entry in _messages(features, 1):
            name = b"".join(_messages(entry, 1)).decode()
            for feature in _messages(entry, 2):
                values: list[Value] = [value for listed in _messages(feature, 1) for value in _messages(listed, 1)]
                values += [number for listed in _messages(feature, 3) for number in _integers(listed)]
                if values:
                    example[name] = values[0]
    return example


def _messages(data: bytes, field: int) -> Iterator[bytes]:
    return (value for number, value in _fields(data) if number == field and isinstance(value, bytes))


def _integers(data: bytes) -> Iterator[int]:
    """Integers of a list in field 1, one by one or packed; negative ones are two's complement of 64 bits."""
    for number, value in _fields(data):
        packed = value if isinstance(value, bytes) else b""
        values = [] if packed or number != 1 or isinstance(value, bytes) else [value]
        position = 0
        while position < len(packed):
            one, position = _varint(packed, position)
            values.append(one)
        yield from (one - (1 << 64) if one >> 63 else one for one in values)


def _fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """Yields number and value of the fields of a message; those of fixed width are skipped."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if kind == 2:
            width, position = _varint(data, position)
        elif kind in (1, 5):
            width = 8 if kind == 1 else 4
        else:
            raise ValueError(f"it has a field of the unknown kind {kind}")
        position += width
        if position > len(data):
            raise ValueError("a field is longer than its message")
        if kind == 2:
            yield key >> 3, data[position - width : position]


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Reads seven bits a byte, the lowest first; the last byte has no high bit. Returns value and next position."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number is cut off")


def masked_crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), rotated and shifted by a constant as TFRecord has it: 0..2³²-1."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _table_entry(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value


_TABLE = [_table_entry(value) for value in range(256)]
