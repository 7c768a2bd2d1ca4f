"""What runs left behind, read for tables: one `Row` a tested run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vpt.data.catalog.cards import load_card
from vpt.errors import ConfigError
from vpt.run_record import RUN_FILE, images_read, method_name, read_record, subset_name

Record = dict[str, Any]
# Of a run, not of its method: files lie elsewhere on another machine, the rest comes from the data.
_NOT_METHOD = {
    "weights",
    "num_classes",
    "image_size",
    "normalization",
    "pool",
    "backbone",
    "init_head",
    "init_delta",
    "micro_batch",
}


@dataclass(frozen=True)
class Row:
    """A tested run.

    Attributes:
        folder: Where it is.
        record: Its ``run.json``.
    """

    folder: Path
    record: Record

    @property
    def task(self) -> str:
        """Name of the data."""
        return str(self.record["data"]["name"])

    @cached_property
    def group(self) -> str:
        """Of VTAB-1k: natural, specialized or structured; else the suite, or ``other``."""
        card = load_card(self.task)
        if card is None:
            return "other"
        return card.group if card.suite == "vtab" and card.group else card.suite

    @cached_property
    def method(self) -> str:
        """Its name in the tables of the field."""
        name = method_name(self.record["task"], self.record["hyperparameters"])
        starts = [key for key in ("init_head", "init_delta") if self.record["hyperparameters"].get(key)]
        return " from ".join([name, *(key.removeprefix("init_") for key in starts)])

    @property
    def backbone(self) -> str:
        """Which weights were adapted, and by which pool they were read if not by their own."""
        told = self.record["backbone"]
        return str(told["weights_id"]) + (f", pool {told['pool']}" if "pool" in told else "")

    @property
    def accuracy(self) -> float:
        """Test top-1 in [0, 1]."""
        return float(self.record["metrics"]["test/acc"])

    @property
    def n(self) -> int:
        """Test images."""
        return images_read(self.record)["test"]

    @property
    def seed(self) -> int | None:
        """Of the run."""
        return self.record["seed"]  # type: ignore[no-any-return]

    @property
    def options(self) -> dict[str, Any]:
        """The hyperparameters of its method, and how long it was trained."""
        given = self.record["hyperparameters"].items()
        own = {key: value for key, value in given if key not in _NOT_METHOD and not key.startswith("_")}
        return own | {"max_epochs": self.record["max_epochs"]}

    @property
    def protocol(self) -> dict[str, Any]:
        """What a number must share with others to be averaged with them."""
        data = self.record["data"]
        return {
            "preset": data["preset"],
            "image size": data["image_size"],
            "partial data": data["complete"] is False or images_read(self.record) != data["counts"],
            "epoch rule": self.record["epoch_rule"],
            "trained on": f"{data['counts']['train']} images"
            if data["subset"] is None
            else subset_name(data["subset"]),
        }

    @property
    def images_per_second(self) -> float | None:
        """Passed forward and backward in training, validation included in the time."""
        seconds = self.record.get("seconds")
        return images_read(self.record)["train"] * self.record["epochs"] / seconds if seconds else None


def read_runs(folders: Sequence[Path]) -> list[Row]:
    """Reads all tested runs below some folders.

    Args:
        folders: Searched for ``run.json``.

    Returns:
        By folder.

    Raises:
        ConfigError: A file is damaged, or there is no tested run.
    """
    rows = []
    for path in sorted({path for folder in folders for path in folder.rglob(RUN_FILE)}):
        record = read_record(path.parent)
        if "test/acc" in record.get("metrics", {}):
            rows.append(Row(path.parent, record))
    if not rows:
        names = ", ".join(map(str, folders))
        raise ConfigError(f"No tested run below {names}: vpt test writes its numbers into the run.json of the run.")
    return rows


@dataclass(frozen=True)
class Cell:
    """The runs of one method on one task that differ in nothing but the seed.

    Attributes:
        rows: At least one.
        label: The method, with what sets it apart from others of that name.
    """

    rows: tuple[Row, ...]
    label: str

    @property
    def first(self) -> Row:
        """Any of them, where they agree."""
        return self.rows[0]


def cells(rows: Sequence[Row]) -> list[Cell]:
    """Groups runs that differ in the seed only.

    Args:
        rows: Tested runs.

    Returns:
        One for each task, method, options and protocol, in the order of the runs. Where a task has several of one
        method, their labels say what differs.

    Raises:
        ConfigError: A seed occurs twice among runs that should differ in it.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        parts = (row.task, row.backbone, row.method, row.options, row.protocol)
        groups.setdefault(json.dumps(parts, sort_keys=True), []).append(row)
    for same in groups.values():
        seeds = [row.seed for row in same]
        if len(set(seeds)) < len(seeds):
            both = [str(row.folder) for row in same if seeds.count(row.seed) > 1]
            raise ConfigError(f"{both[0]} and {both[1]} are the same run with the same seed: name one of them only.")
    return [Cell(tuple(same), _label(same[0], [each[0] for each in groups.values()])) for same in groups.values()]


def _label(row: Row, others: Sequence[Row]) -> str:
    """The method; with the options that differ among runs of that method on that task."""
    rivals = [o for o in others if (o.task, o.method, o.backbone) == (row.task, row.method, row.backbone)]
    if len(rivals) == 1:
        return row.method
    mine = row.options | row.protocol
    theirs = [rival.options | rival.protocol for rival in rivals]
    keys = [key for key, value in mine.items() if any(other.get(key) != value for other in theirs)]
    return f"{row.method} ({', '.join(f'{key} {mine[key]}' for key in keys)})"
