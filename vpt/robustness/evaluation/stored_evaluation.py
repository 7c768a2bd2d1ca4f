"""The records of one finished evaluation, each checked before it is believed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vpt.errors import DataError
from vpt.metrics.class_masks import group_max
from vpt.metrics.logits import Logits
from vpt.robustness.evaluation import records
from vpt.robustness.evaluation.records import Record
from vpt.robustness.evaluation.result import RobustnessResult, Row, between


class Answers:
    """What one model answered, read set by set so that only a record or two are in memory.

    Attributes:
        result: Its rows and protocol.
    """

    def __init__(self, folder: Path) -> None:
        """Opens an evaluation.

        Args:
            folder: Of one `vpt.robustness.evaluation.evaluate`.

        Raises:
            DataError: There is no evaluation.
        """
        self.result = RobustnessResult.read(folder)

    def record(self, row: Row) -> Record:
        """Reads the answers that a row was made of.

        Args:
            row: Of `result`.

        Returns:
            The record; where a row has no file, the logits of α = 0 and α = 1, interpolated.

        Raises:
            DataError: A record is missing, damaged, unfinished, or of another evaluation.
        """
        if row.record is not None:
            return self._read(row, row.alpha, row.record)
        return between(*self.ends(row), row.alpha)

    def ends(self, row: Row) -> tuple[Record, Record]:
        """Reads the records at both ends of a set's curve.

        Args:
            row: Any row of the set.

        Returns:
            At α = 0 and α = 1.

        Raises:
            DataError: As `record`.
        """
        start, end = (self._read(row, alpha, f"{row.set}-alpha-{alpha}.parquet") for alpha in (0.0, 1.0))
        return start, end

    def _read(self, row: Row, alpha: float, name: str) -> Record:
        folder = self.result.out
        path = folder / "records" / Path(name).name
        again = f"`vpt robustness run` with the same options and --out {folder} completes it."
        if not path.is_file():
            raise DataError(f"{folder} lacks records/{path.name}: {again}")
        record = records.read(path)
        if not record.complete or len(record.label) != row.n:
            raise DataError(f"{path} is unfinished, {len(record.label)} of {row.n} images: {again}")
        protocol, ours = record.protocol, self.result.protocol
        same = all(protocol.get(key) == ours.get(key) for key in ("backbone", "delta", "data", "logits"))
        if not same or (protocol["set"], protocol["alpha"]) != (row.set, alpha):
            raise DataError(f"{path} belongs to another evaluation than robustness.json beside it: run it again.")
        return record


def among(record: Record) -> tuple[Logits, NDArray[np.int64]]:
    """Takes the logits and labels that count on a record's set.

    Args:
        record: Complete.

    Returns:
        (N, classes of the set), and (N,) its columns.
    """
    groups = record.protocol["groups"]
    if groups is None:
        return record.logits, record.label
    return group_max(record.logits, groups), places(record.label, groups)


def places(labels: NDArray[np.int64], groups: list[list[int]]) -> NDArray[np.int64]:
    """Finds the class of each label.

    Args:
        labels: (N,), columns of the head.
        groups: The columns of each class.

    Returns:
        (N,), positions in `groups`; -1 where a label is in none.
    """
    place = np.full(1 + max(int(labels.max()), *(max(group) for group in groups)), -1, dtype=np.int64)
    for position, group in enumerate(groups):
        place[group] = position
    return place[labels]
