"""The published procedure: choose by validation after training on a part, train anew on all, test once for each seed.

VTAB-1k as in Jia et al. (ECCV 2022): every point of a grid is trained on train800; the best top-1 on val200 after the
last epoch wins, of equals the smaller learning rate; then train800val200 is trained on with several seeds, and each
reads the test split once.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from vpt.errors import ConfigError, VPTError
from vpt.experiments.engine import Engine
from vpt.experiments.trial import Config, Failure, Record, Trial, merged

SEEDS = (42, 44, 82, 100, 800)
"""Those of the reference's script."""
RATE = "model.base_lr"
SWEEP_FILE = "sweep.json"


@dataclass(frozen=True)
class Plan:
    """What is searched, and what is done with the winner.

    Attributes:
        grid: Values to try by dotted key; all combinations.
        choose: Values of the trials that choose, e.g. ``{"data.train": "train800"}``.
        retrain: Values of the trials that are tested, e.g. ``{"data.train": "train800val200"}``.
        seeds: Of the trials that are tested; the first is also that of those that choose.
        halving: Successive halving (Jamieson & Talwalkar, AISTATS 2016; ASHA's rungs): only the best 1/halving of the
            grid trains on at each rung; None for none.
    """

    grid: dict[str, list[Any]]
    choose: dict[str, Any] = field(default_factory=dict)
    retrain: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = SEEDS
    halving: int | None = None

    def points(self) -> list[dict[str, Any]]:
        """All combinations of the grid, the smallest learning rate first."""
        values = [list(dict.fromkeys(each)) for each in self.grid.values()]
        points = [dict(zip(self.grid, point, strict=True)) for point in itertools.product(*values)]
        return sorted(points, key=lambda point: point.get(RATE, 0.0))


def read_plan(path: Path, seeds: Sequence[int] | None = None, halving: int | None = None) -> Plan:
    """Reads a grid file.

    Args:
        path: YAML with ``grid`` and, if they are not empty, ``choose`` and ``retrain``, by dotted keys; ``seeds``.
        seeds: Instead of those of the file.
        halving: As in `Plan`.

    Returns:
        The plan.

    Raises:
        ConfigError: The file is none, or a list is empty.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is no grid file ({' '.join(str(error).split())}).") from error
    known = {"grid", "choose", "retrain", "seeds"}
    if not isinstance(content, dict) or not isinstance(content.get("grid"), dict) or content.keys() - known:
        raise ConfigError(f"{path} is no grid file: it has grid, and may have choose, retrain and seeds.")
    grid = content["grid"]
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{path}: {key} needs a list of values to try, got {values!r}.")
    wanted = tuple(seeds or content.get("seeds", SEEDS))
    if halving is not None and halving < 2:
        raise ConfigError(f"Halving keeps one of 2 or more, got {halving}.")
    return Plan(grid, dict(content.get("choose") or {}), dict(content.get("retrain") or {}), wanted, halving)


@dataclass(frozen=True)
class Outcome:
    """What a search found.

    Attributes:
        chosen: The values of the best point.
        val: Its validation accuracy in [0, 1]; None if there was nothing to choose.
        tests: Test accuracy in [0, 1] by seed.
        tried: A row for each point: its values and ``val``, or ``failed`` and why.
        failed: Seeds that gave no result, and why.
        epochs: Trained while choosing, and how many the whole grid would have taken.
        seconds: Of all trials together.
        images: Passed forward and backward in all trials.
    """

    chosen: dict[str, Any]
    val: float | None
    tests: dict[int, float]
    tried: list[dict[str, Any]]
    failed: dict[int, str]
    epochs: tuple[int, int]
    seconds: float
    images: int

    @property
    def mean(self) -> float:
        """Mean test accuracy over seeds, in [0, 1]."""
        return mean(self.tests.values())

    @property
    def std(self) -> float:
        """Standard deviation over seeds (n - 1); 0 for a single seed."""
        return stdev(self.tests.values()) if len(self.tests) > 1 else 0.0


def sweep(config: Config, plan: Plan, root: Path, engine: Engine, prefix: str = "") -> Outcome:
    """Searches, retrains and tests; what is finished under `root` is not repeated.

    Args:
        config: What a single run would be, as `Trial.config`.
        plan: The search.
        root: Folder of the experiment.
        engine: Runs the trials.
        prefix: Folder of this search below `root`.

    Returns:
        The outcome, also written to ``sweep.json`` in its folder.

    Raises:
        VPTError: No trial gave a result.
    """
    points = [
        Trial(_name(prefix, "choose", point), _choosing(config, plan, point), values=point) for point in plan.points()
    ]
    if len(points) == 1:
        found: dict[str, Record | Failure] = {}
        best, val = points[0], None
    else:
        found = _search(points, plan, root, engine)
        best, val = _best(points, found)
    finals = [
        Trial(_name(prefix, "test", {"seed": seed}), _final(config, plan, best.values, seed), test=True)
        for seed in plan.seeds
    ]
    tested = engine(finals, root)
    outcome = _outcome(plan, best, val, points, found, finals, tested)
    if not outcome.tests:
        raise VPTError(f"No seed gave a result: {next(iter(outcome.failed.values()))}")
    write_json(root / prefix / SWEEP_FILE, _plain(config, plan, outcome))
    return outcome


def _choosing(config: Config, plan: Plan, point: Mapping[str, Any]) -> Config:
    return merged(config, {**plan.choose, **point, "seed_everything": plan.seeds[0]})


def _final(config: Config, plan: Plan, point: Mapping[str, Any], seed: int) -> Config:
    # After training on them, validation images say nothing; leaving them out saves their forward passes.
    return merged(config, {"trainer.limit_val_batches": 0, **plan.retrain, **point, "seed_everything": seed})


def _search(points: list[Trial], plan: Plan, root: Path, engine: Engine) -> dict[str, Record | Failure]:
    if plan.halving is None:
        return engine(points, root)
    found: dict[str, Record | Failure] = {}
    alive = points
    for stop in rungs(points[0].config["trainer"]["max_epochs"], len(points), plan.halving):
        paused = [Trial(trial.name, trial.config, stop=stop, values=trial.values) for trial in alive]
        found |= engine(paused, root)
        ranked = sorted((trial for trial in alive if _val(found[trial.name]) >= 0), key=lambda t: -_val(found[t.name]))
        alive = ranked[: max(1, math.ceil(len(alive) / plan.halving))]
    return found | engine(alive, root)


def rungs(epochs: int, points: int, halving: int) -> list[int]:
    """Epochs at which only the best 1/halving go on.

    Args:
        epochs: Of a whole training.
        points: How many trials begin.
        halving: At least 2.

    Returns:
        Ascending, all below `epochs`; the last few trials train to the end.
    """
    count = math.floor(math.log(max(points, 1), halving) + 1e-9)
    found = {math.ceil(epochs / halving**power) for power in range(count, 0, -1)}
    return sorted(each for each in found if each < epochs)


def _best(points: Sequence[Trial], found: Mapping[str, Record | Failure]) -> tuple[Trial, float]:
    """The best validation accuracy among those that trained longest; of equals the first, whose rate is smallest."""
    good = [(trial, record) for trial in points if isinstance(record := found.get(trial.name), dict)]
    good = [(trial, record) for trial, record in good if _val(record) >= 0]
    if not good:
        reasons = [result.reason for result in found.values() if isinstance(result, Failure)]
        raise VPTError(f"No trial gave a validation accuracy: {reasons[0] if reasons else 'there are no val images'}")
    longest = max(record["epochs"] for _, record in good)
    trial, record = max(((t, r) for t, r in good if r["epochs"] == longest), key=lambda pair: _val(pair[1]))
    return trial, _val(record)


def _outcome(
    plan: Plan,
    best: Trial,
    val: float | None,
    points: Sequence[Trial],
    found: Mapping[str, Record | Failure],
    finals: Sequence[Trial],
    tested: Mapping[str, Record | Failure],
) -> Outcome:
    tried = []
    for trial in points if found else ():
        result = found[trial.name]
        row = dict(trial.values)
        tried.append(
            row
            | (
                {"val": _val(result), "epochs": result["epochs"]}
                if isinstance(result, dict)
                else {"failed": result.reason}
            )
        )
    by_seed = {seed: tested[trial.name] for seed, trial in zip(plan.seeds, finals, strict=True)}
    records = [record for record in [*found.values(), *tested.values()] if isinstance(record, dict)]
    return Outcome(
        chosen=best.values,
        val=val,
        tests={seed: r["metrics"]["test/acc"] for seed, r in by_seed.items() if isinstance(r, dict)},
        tried=tried,
        failed={seed: r.reason for seed, r in by_seed.items() if isinstance(r, Failure)},
        epochs=(sum(row.get("epochs", 0) for row in tried), len(tried) * best.config["trainer"]["max_epochs"]),
        seconds=sum(record.get("seconds", 0.0) for record in records),
        images=sum(record["data"]["counts"]["train"] * record.get("epochs", 0) for record in records),
    )


def _val(result: Record | Failure) -> float:
    return float(result["metrics"].get("val/acc", -1.0)) if isinstance(result, dict) else -1.0


def _name(prefix: str, stage: str, values: Mapping[str, Any]) -> str:
    text = ",".join(f"{key.rpartition('.')[2]}={_short(value)}" for key, value in values.items()) or "only"
    return "/".join(part for part in (prefix, stage, text) if part)


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(letter if letter.isalnum() or letter in ".-_+" else "_" for letter in text)[:60]


def _plain(config: Config, plan: Plan, outcome: Outcome) -> dict[str, Any]:
    return {
        "written": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "config": config,
        "grid": plan.grid,
        "choose": plan.choose,
        "retrain": plan.retrain,
        "chosen": outcome.chosen,
        "val": outcome.val,
        "tests": {str(seed): value for seed, value in outcome.tests.items()},
        "mean": outcome.mean,
        "std": outcome.std,
        "tried": outcome.tried,
        "failed": {str(seed): reason for seed, reason in outcome.failed.items()},
        "epochs_trained": outcome.epochs[0],
        "epochs_of_the_grid": outcome.epochs[1],
        "seconds": round(outcome.seconds, 1),
        "images": outcome.images,
    }


def write_json(path: Path, content: Any) -> None:
    """Writes a file as a whole or not at all.

    Args:
        path: The file.
        content: Plain values.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)
