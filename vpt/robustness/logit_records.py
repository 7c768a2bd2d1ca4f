"""Records: the logits of every image of one test set at one strength, kept once with their protocol.

Every later question (accuracy, calibration, class masks, curves over α) is answered from records, without another
forward pass.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from vpt.atomic_write import atomic_write
from vpt.errors import DataError
from vpt.metrics import accuracy
from vpt.metrics.logits import Logits, check_table, matched, restrict

FORMAT = "vpt-record/1"
_KEY = b"vpt"


@dataclass(frozen=True)
class Record:
    """What a model answered.

    Attributes:
        index: int64 (N,), position of each image in its list.
        label: int64 (N,).
        logits: (N, classes), float32, or float16 where an evaluation was asked for half the size.
        protocol: How the logits were computed, plain JSON values.
        complete: False if the evaluation was interrupted and images are missing at the end.
    """

    index: NDArray[np.int64]
    label: NDArray[np.int64]
    logits: NDArray[np.floating[Any]]
    protocol: Mapping[str, Any]
    complete: bool

    @property
    def scored(self) -> NDArray[np.float32]:
        """The logits that count, (N, classes): minus infinity where the protocol's ``groups`` leave a class out."""
        groups = self.protocol.get("groups")
        return self.logits if groups is None else restrict(torch.tensor(self.logits), groups).numpy()

    @property
    def matched(self) -> tuple[Logits, NDArray[np.int64]]:
        """Logits and labels of the classes that count alone, (N, classes of the test set) and (N,) their columns."""
        logits, labels = matched(self.logits, self.label, self.protocol.get("groups"))
        if len(labels) != len(self.label):
            raise DataError(
                f"{len(self.label) - len(labels)} images of a record have a label that its groups leave out."
            )
        return logits, labels

    @property
    def accuracy(self) -> float:
        """Top-1 in [0, 1], among the classes of the test set."""
        return accuracy.top1(self.scored, self.label)

    def same_images(self, other: Record) -> bool:
        """Whether another record is of the same images with the same labels."""
        return np.array_equal(self.index, other.index) and np.array_equal(self.label, other.label)


def write(path: Path, record: Record) -> None:
    """Writes a record as Parquet, in place of an older one; no reader ever meets half a file, and folders are made."""
    classes, kind = record.logits.shape[1], pa.from_numpy_dtype(record.logits.dtype)
    table = pa.table(
        {
            "index": pa.array(record.index, pa.int64()),
            "label": pa.array(record.label, pa.int64()),
            "logits": pa.FixedSizeListArray.from_arrays(pa.array(record.logits.ravel(), kind), classes),
        }
    )
    header = {"format": FORMAT, "complete": record.complete, "protocol": record.protocol}
    table = table.replace_schema_metadata({_KEY: json.dumps(header, sort_keys=True)})
    with atomic_write(path) as partial:
        pq.write_table(table, partial)


def read(path: Path) -> Record:
    """Reads a record, bit for bit; a DataError if it is missing, damaged, or not a record of this format."""
    try:
        table = pq.read_table(path)
        header = json.loads((table.schema.metadata or {})[_KEY])
        if header["format"] != FORMAT:
            raise DataError(f"its format is {header['format']!r}, this version reads {FORMAT!r}")
        logits = table["logits"].combine_chunks()
        record = Record(
            index=table["index"].to_numpy(),
            label=table["label"].to_numpy(),
            logits=logits.flatten().to_numpy().reshape(len(table), logits.type.list_size),
            protocol=header["protocol"],
            complete=header["complete"],
        )
        if not isinstance(record.protocol, dict) or record.index.dtype != np.int64 or record.index.min(initial=0) < 0:
            raise ValueError("not what was written")
        check_table(record.logits, record.label)
    except (OSError, AttributeError, KeyError, TypeError, ValueError, DataError, pa.ArrowException) as error:
        reason = f" ({error})" if isinstance(error, DataError) else ": `vpt robustness run` writes them."
        raise DataError(f"{path} is not a record{reason}") from error
    return record


def resume(path: Path, protocol: Mapping[str, Any]) -> Record | None:
    """Finds what an earlier evaluation left, whole or interrupted; None if damaged or of another protocol."""
    try:
        record = read(path)
    except DataError:
        return None
    return record if record.protocol == json.loads(json.dumps(protocol)) else None
