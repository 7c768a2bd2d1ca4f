"""What runs left behind, read for tables: one `Row` a tested run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vpt.data.catalog.cards import load_card
from vpt.errors import ConfigError, RecordError
from vpt.image_size import size_text
from vpt.run_record import (
    CHANNELS,
    RUN_FILE,
    below,
    cell_protocol,
    find_records,
    identity,
    images_read,
    lacking,
    method_name,
    subset_name,
)

Record = dict[str, Any]
_SEARCHED = ("base_lr", "weight_decay", "num_tokens", "dropout", "l2")
"""Options that validation may choose for each task apart."""
_OF_TASK = (
    *("data.name", "data.counts", "data.official_counts", "data.complete", "data.num_classes", "data.lists", "read"),
    *(
        "data.fingerprint",
        "data.fingerprints",
        "data.partial",
        "data.crop_border",
        "data.held_out",
        "hyperparameters.num_classes",
        "starts",
        *CHANNELS,
    ),
    *(f"hyperparameters.{name}" for name in _SEARCHED),
)
_NEEDED = (
    *("task", "seed", "epochs", "max_epochs", "hyperparameters", "backbone.weights_id", "parameters.trainable"),
    *(f"data.{key}" for key in ("name", "preset", "image_size", "complete", "subset", "lists")),
    *("data.counts.train", "data.counts.test"),
)
_FOLLOWS = (
    *("data.counts", "data.official_counts", "data.fingerprints", "data.complete", "read", "data.fingerprint"),
    "data.transforms",  # from data.augment and data.image_size, but for lists of one's own
)
"""Differs because something else does."""


def group_of(task: str) -> str:
    """A task's group of VTAB-1k: natural, specialized or structured; else its suite, or ``other``."""
    card = load_card(task)
    if card is None:
        return "other"
    return card.group if card.suite == "vtab" and card.group else card.suite


@dataclass(frozen=True)
class Row:
    """A tested run: its folder, its ``run.json``, and seeds of its data that set it apart from its cell."""

    folder: Path
    record: Record
    apart: tuple[tuple[str, Any], ...] = ()

    @property
    def task(self) -> str:
        """Name of the data."""
        return str(self.record["data"]["name"])

    @cached_property
    def group(self) -> str:
        """See `group_of`."""
        return group_of(self.task)

    @cached_property
    def method(self) -> str:
        """Its name in the tables of the field."""
        name = method_name(self.record["task"], self.record["hyperparameters"])
        starts = [key for key in ("init_head", "init_delta") if self.record["hyperparameters"].get(key)]
        return " from ".join([name, *(key.removeprefix("init_") for key in starts)])

    @property
    def backbone(self) -> str:
        """Which weights were adapted, and by which pool they were read if not by their own, and kept in which dtype."""
        told = self.record["backbone"]
        pool = f", pool {told['pool']}" if "pool" in told else ""
        return (
            str(told["weights_id"]) + pool + (f", frozen in {told['frozen_dtype']}" if "frozen_dtype" in told else "")
        )

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
        own = {key.partition(".")[2]: v for key, v in self.key.items() if key.startswith("hyperparameters.")}
        return own | {"max_epochs": self.record["max_epochs"]}

    @cached_property
    def key(self) -> dict[str, Any]:
        """What a run shares with those of its cell (:func:`vpt.run_record.cell_protocol`)."""
        return cell_protocol(self.record) | dict(self.apart)

    @cached_property
    def across(self) -> dict[str, Any]:
        """What the runs of one method must share to be averaged over tasks; a list is told without its folder."""
        told = {key: value for key, value in self.key.items() if not below(key, _OF_TASK)}
        named = self.record["data"]["lists"]
        lists = {
            f"data.lists.{name}": str(named.get(name, "")).rpartition("/")[2].removesuffix(".txt")
            for name in ("train", "test")
        }
        return told | lists | {"partial data": self.partial}

    @property
    def partial(self) -> bool:
        """Whether images are missing, or batches were limited in training or test."""
        data, read = self.record["data"], images_read(self.record)
        return data["complete"] is False or any(read.get(k) != data["counts"].get(k) for k in ("train", "test"))

    @property
    def protocol(self) -> dict[str, Any]:
        """What a reader of a table wants to know; all of it is in `key`."""
        data = self.record["data"]
        return {
            "preset": data["preset"],
            "image size": size_text(data["image_size"]),
            "partial data": self.partial,
            "epoch rule": self.key["epoch rule"],
            "trained on": f"{data['counts']['train']} images"
            if data["subset"] is None
            else subset_name(data["subset"]),
        }

    @property
    def images_per_second(self) -> float | None:
        """Passed forward and backward in training, validation included in the time."""
        seconds = self.record.get("seconds")
        images = self.record.get("images", images_read(self.record)["train"] * self.record["epochs"])
        return images / seconds if seconds else None


@dataclass(frozen=True)
class Runs:
    """Tested runs, by folder; folders of runs that were not tested; and a sentence for each record that is damaged."""

    rows: list[Row]
    untested: list[Path]
    damaged: list[str]


def read_runs(folders: Sequence[Path]) -> Runs:
    """Reads all runs below some folders; a ConfigError if none of them is a tested one."""
    records, damaged = find_records(folders)
    rows, untested = [], []
    for folder, record in records.items():
        path = folder / RUN_FILE
        if kind := (record.get("data") or {}).get("targets"):
            damaged.append(f"{path} is of {kind} targets; reports are of images with one class each.")
        elif lacking(record, ["metrics.test/acc"]):
            untested.append(folder)
        elif lacks := lacking(record, _NEEDED):
            damaged.append(f"{path} is not the record of a tested run: it has no {', '.join(lacks)}.")
        else:
            try:
                method_name(record["task"], record["hyperparameters"])
                rows.append(Row(folder, record))
            except RecordError as error:
                damaged.append(f"{path}: {error}")
    if not rows:
        reason = damaged[0] if damaged else "vpt test writes its numbers into the run.json of the run."
        raise ConfigError(f"No tested run below {', '.join(map(str, folders))}: {reason}")
    return Runs(rows, untested, damaged)


@dataclass(frozen=True)
class Cell:
    """The runs, at least one, of one method on one task that differ in nothing but the seed.

    The label is the method, with what sets it apart from others of that name.
    """

    rows: tuple[Row, ...]
    label: str

    @property
    def first(self) -> Row:
        """Any of them, where they agree."""
        return self.rows[0]


def cells(rows: Sequence[Row]) -> list[Cell]:
    """Groups runs that differ in the seed only: a cell for each task, method, options and protocol, in their order.

    Where a task has several of one method, their labels say what differs. Raises a ConfigError if a seed occurs twice
    among runs that should differ in it.
    """
    groups: dict[str, list[Row]] = {}
    for row in _with_seeds_apart(rows):
        groups.setdefault(identity([row.task, row.method, row.key]), []).append(row)
    for same in groups.values():
        seeds = [row.seed for row in same]
        if len(set(seeds)) < len(seeds):
            both = [str(row.folder) for row in same if seeds.count(row.seed) > 1]
            raise ConfigError(f"{both[0]} and {both[1]} are the same run with the same seed: name one of them only.")
    return [Cell(tuple(same), _label(same, list(groups.values()))) for same in groups.values()]


def _with_seeds_apart(rows: Sequence[Row]) -> Iterator[Row]:
    """Tells the data's seed where runs that agree in all else differ in where it comes from: the run, or a value."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(identity([row.task, row.method, row.key]), []).append(row)
    for same in groups.values():
        apart: list[list[tuple[str, Any]]] = [[] for _ in same]
        for name, found in {
            "data.seed": [row.record["data"].get("seed") for row in same],
            "subset seed": [(row.record["data"].get("subset") or {}).get("seed") for row in same],
        }.items():
            own = [value == row.seed for value, row in zip(found, same, strict=True)]
            if not all(own) and len(set(found)) > 1:
                for told, value, its in zip(apart, found, own, strict=True):
                    told.append((name, "of the run" if its else value))
        yield from (replace(row, apart=tuple(told)) for row, told in zip(same, apart, strict=True))


def _label(cell: Sequence[Row], cells: Sequence[Sequence[Row]]) -> str:
    """The method; with what differs among its cells on that task, unless this is the one that belongs to other tasks.

    That is the one that agrees in it with most other tasks, and of several the one of most seeds.
    """
    row = cell[0]
    same = [other for other in cells if (other[0].method, other[0].backbone) == (row.method, row.backbone)]
    rivals = [other for other in same if other[0].task == row.task]
    elsewhere = [other for other in same if other[0].task != row.task]
    keys = differing([other[0].key for other in rivals])
    told = [identity([other[0].key.get(key) for key in keys]) for other in rivals]
    if len(set(told)) < len(told):
        keys = differing([other[0].key for other in rivals], every=True)
    if not keys:
        return row.method

    def rank(rival: Sequence[Row]) -> tuple[int, int]:
        mine = [rival[0].key.get(key) for key in keys]
        return sum(mine == [other[0].key.get(key) for key in keys] for other in elsewhere), len(rival)

    if elsewhere and all(rank(cell) > rank(rival) for rival in rivals if rival is not cell):
        return row.method
    return f"{row.method} ({', '.join(f'{plain(key)} {row.key.get(key)}' for key in keys)})"


def differing(protocols: Sequence[Mapping[str, Any]], every: bool = False) -> list[str]:
    """The keys in which protocols differ; unless `every`, without those that differ because others do."""
    keys = dict.fromkeys(key for protocol in protocols for key in protocol)
    found = [key for key in keys if any(other.get(key) != protocols[0].get(key) for other in protocols)]
    return found if every else [key for key in found if not below(key, _FOLLOWS)] or found


def plain(key: str) -> str:
    """A dotted key as a reader knows it, e.g. ``base_lr``, ``image size``, ``train list``."""
    section, _, name = key.rpartition(".")
    words = f"{name} list" if section == "data.lists" else f"{section} {name}" if section == "training" else name
    return words if section == "hyperparameters" else words.replace("_", " ")
