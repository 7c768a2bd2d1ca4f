"""`vpt report`: what runs measured, in plain values that tables and figures are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from scipy.special import softmax
from scipy.stats import rankdata

from vpt.data.catalog.cards import load_card
from vpt.errors import DataError
from vpt.experiments.profile import scalars
from vpt.experiments.trial import ANSWERS_FILE
from vpt.metrics.accuracy import bootstrap, wilson
from vpt.reports.page import Values
from vpt.reports.read_runs import Cell, Row, cells, differing, group_of, plain, read_runs
from vpt.robustness import logit_records
from vpt.robustness.logit_records import Record

GROUPS = {"natural": 7, "specialized": 4, "structured": 8}
"""Tasks of VTAB-1k."""
_CURVES = {"val/acc": "validation top-1", "train/loss": "training loss"}


def report(folders: Sequence[Path], mixed: bool = False) -> Values:
    """Reads the tested runs below folders, and averages what may be averaged; plain values for JSON.

    They are ``tasks``, ``methods`` (rows with a number for each task, and means), ``published``, ``agreement``,
    ``curves``, ``ranks``, ``untested`` (folders) and ``damaged`` (a sentence a file). With `mixed` tasks are averaged
    across presets, image sizes, partial data, epoch rules and training sets, too. Raises a ConfigError if there is no
    tested run, or two are the same.
    """
    read = read_runs(folders)
    found, damaged = cells(read.rows), [*read.damaged]
    tasks = list(dict.fromkeys(cell.first.task for cell in found))
    by_method: dict[tuple[str, str], list[Cell]] = {}
    for cell in found:
        by_method.setdefault((cell.first.backbone, cell.label), []).append(cell)
    return {
        "tasks": [_task(name, [cell.first for cell in found if cell.first.task == name]) for name in tasks],
        "methods": [_method(*key, own, mixed) for key, own in by_method.items()],
        "published": [row for name in tasks for row in _published(name, found)],
        "agreement": [row for name in tasks for row in _agreement(name, found, damaged)],
        "curves": [row for cell in found for row in _curves(cell)],
        "ranks": _ranks(found),
        "untested": [str(folder) for folder in read.untested],
        "damaged": list(dict.fromkeys(damaged)),
    }


def _task(name: str, rows: Sequence[Row]) -> Values:
    return {"task": name, "group": rows[0].group, "n": sorted({row.n for row in rows})}


def _method(backbone: str, label: str, own: Sequence[Cell], mixed: bool) -> Values:
    differs = [plain(key) for key in differing([cell.first.across for cell in own])]
    refused = None if mixed or not differs else f"its tasks differ in {', '.join(differs)}"
    speeds = [speed for cell in own for row in cell.rows if (speed := row.images_per_second)]
    return {
        "backbone": backbone,
        "method": label,
        "trainable": sorted({cell.first.record["parameters"]["trainable"] for cell in own}),
        "epochs": sorted({cell.first.record["max_epochs"] for cell in own}),
        "seeds": sorted({len(cell.rows) for cell in own}),
        "numbers": {cell.first.task: _number(cell) for cell in own},
        "means": {} if refused else _means(own),
        "no_means": refused,
        "mixed": differs if mixed else [],
        "images_per_second": mean(speeds) if speeds else None,
    }


def _number(cell: Cell) -> Values:
    shares = [row.accuracy for row in cell.rows]
    low, high = wilson(round(mean(shares) * cell.first.n), cell.first.n)
    return {
        "mean": mean(shares),
        "std": stdev(shares) if len(shares) > 1 else None,
        "seeds": [row.seed for row in cell.rows],
        "n": cell.first.n,
        "low": low,
        "high": high,
        "protocol": cell.first.protocol,
        "options": cell.first.options,
    }


def _means(own: Sequence[Cell]) -> Values:
    return means_of({cell.first.task: mean(row.accuracy for row in cell.rows) for cell in own})


def means_of(shares: Mapping[str, float]) -> dict[str, float]:
    """Means of a method's results by task, each under its own name.

    Both means of VTAB-1k where all of its tasks are there; else the mean of those that are.
    """
    groups: dict[str, list[float]] = {}
    for task, value in shares.items():
        if (group := group_of(task)) in GROUPS:
            groups.setdefault(group, []).append(value)
    means = {f"mean of {len(shares)} tasks": mean(shares.values())} if len(shares) > 1 else {}
    whole = {name: values for name, values in groups.items() if len(values) == GROUPS[name]}
    means |= {name: mean(values) for name, values in whole.items()}
    if len(whole) == len(GROUPS):
        means["mean of 19 tasks"] = mean(value for values in whole.values() for value in values)
        means["mean of 3 groups"] = mean(mean(values) for values in whole.values())
    return means


def _agreement(name: str, found: Sequence[Cell], damaged: list[str]) -> Iterator[Values]:
    """How often two methods predict alike, and the accuracy of the mean of their probabilities; of a seed both have.

    Sentences on answers that cannot be read are appended to `damaged`.
    """
    for one, other in combinations([cell for cell in found if cell.first.task == name], 2):
        try:
            pair = _same_images(one, other)
        except DataError as error:
            damaged.append(str(error))
            continue
        if pair is None:
            continue
        seed, first, second = pair
        ours, theirs = (softmax(record.logits, axis=1) for record in (first, second))
        right = [np.mean(p.argmax(1) == first.label) for p in (ours, theirs, (ours + theirs) / 2)]
        yield {
            "task": name,
            "first": one.label,
            "second": other.label,
            "seed": seed,
            "n": len(first.label),
            "agreement": float(np.mean(ours.argmax(1) == theirs.argmax(1))),
            "accuracies": [float(each) for each in right[:2]],
            "ensemble": float(right[2]),
        }


def _same_images(one: Cell, other: Cell) -> tuple[int | None, Record, Record] | None:
    theirs = {row.seed: row for row in other.rows}
    for row in one.rows:
        rival = theirs.get(row.seed)
        files = [each.folder / ANSWERS_FILE for each in (row, rival) if each is not None]
        if rival is None or not all(file.is_file() for file in files):
            continue
        one_test, other_test = (each.record["data"].get("fingerprints", {}).get("test") for each in (row, rival))
        if one_test != other_test or row.record["data"]["lists"]["test"] != rival.record["data"]["lists"]["test"]:
            continue
        first, second = (logit_records.read(file) for file in files)
        if first.same_images(second):
            return row.seed, first, second
    return None


def _curves(cell: Cell) -> Iterator[Values]:
    for tag, title in _CURVES.items():
        points = scalars(cell.first.folder, tag)
        if len(points) > 1:
            steps, values = zip(*points, strict=True)
            own: Values = {"task": cell.first.task, "method": cell.label, "curve": title, "seed": cell.first.seed}
            yield own | {"steps": list(steps), "values": list(values)}


def _ranks(found: Sequence[Cell]) -> list[Values]:
    table: dict[str, Mapping[str, float]] = {}
    several = len({cell.first.backbone for cell in found}) > 1
    for cell in found:
        key = f"{cell.label}, {cell.first.backbone}" if several else cell.label
        table[key] = {**table.get(key, {}), cell.first.task: mean(row.accuracy for row in cell.rows)}
    return ranks_of(table)


def ranks_of(table: Mapping[str, Mapping[str, float]]) -> list[Values]:
    """Rank of every method on the tasks that all of them have, the best mean rank first; ties share the mean rank.

    `table` has results by method and task. ``low`` and ``high`` are the ends of the 95 % bootstrap interval of the mean
    rank over these tasks (`vpt.metrics.accuracy.bootstrap`), None of a single one.
    """
    shared = set.intersection(*(set(numbers) for numbers in table.values())) if table else set()
    if len(table) < 2 or not shared:
        return []
    ranks: dict[str, list[float]] = {key: [] for key in table}
    for task in sorted(shared):
        for own, rank in zip(ranks.values(), rankdata([-numbers[task] for numbers in table.values()]), strict=True):
            own.append(float(rank))
    rows: list[Values] = [
        {"method": key, "ranks": values, "mean": mean(values)} | _interval(values) for key, values in ranks.items()
    ]
    return sorted(rows, key=lambda row: float(row["mean"]))


def _interval(ranks: Sequence[float]) -> Values:
    if len(ranks) < 2:
        return {"low": None, "high": None}
    _, low, high = bootstrap(lambda weights: float(np.average(ranks, weights=weights)), len(ranks))
    return {"low": low, "high": high}


def _published(name: str, found: Sequence[Cell]) -> Iterator[Values]:
    """The published numbers of a task, each beside every cell of the same method that was run here."""
    card = load_card(name)
    for row in card.published if card is not None else []:
        own = [cell for cell in found if (cell.first.task, cell.first.method) == (name, row["method"])]
        for cell in own:
            place = {
                "label": cell.label,
                "backbone_here": cell.first.backbone,
                "preset_here": cell.first.record["data"]["preset"],
            }
            yield {"task": name, **row, "here": mean(each.accuracy for each in cell.rows), **place}
        if not own:
            yield {"task": name, **row, "here": None}
