"""The published procedure: choose by validation after training on a part, train anew on all, test once for each seed.

VTAB-1k as in Jia et al. (ECCV 2022): every point of a grid is trained on train800; the best top-1 on val200 after the
last epoch wins, ties go to the smaller learning rate; then train800val200 is trained on with several seeds, and each
reads the test split once. Likewise for each of several variants (`vpt.experiments.variants`), of which one that gives
no result does not keep the others from theirs.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeVar, cast

from vpt.atomic_write import write_json
from vpt.errors import ConfigError, VPTError
from vpt.experiments.executors import Engine
from vpt.experiments.trial import Config, Failure, Record, Trial, merged, val_score
from vpt.run_record import ENDED, identity, score, score_names

SEEDS = (42, 44, 82, 100, 800)
"""Those of the reference's script."""
RATE = "model.base_lr"
FIRST_RUNG = 1 / 8
"""Before this share of a training, chance has too much of a say in what is best (`benchmarks.halving`)."""
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
        first_rung: The share of the training before which no rung lies, in [0, 1).
        by_seed: Other keys that take the value of the seed, e.g. ``data.subset_seed``.
        widen: How many rounds a search goes on beyond an end of the grid that is its best value (`beyond`).

    Raises:
        ConfigError: Nothing is to be tried or tested, or one value would take the place of another.
    """

    grid: dict[str, list[Any]]
    choose: dict[str, Any] = field(default_factory=dict)
    retrain: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = SEEDS
    halving: int | None = None
    first_rung: float = FIRST_RUNG
    by_seed: tuple[str, ...] = ()
    widen: int = 0

    def __post_init__(self) -> None:
        for key, values in self.grid.items():
            if not values:
                raise ConfigError(f"The grid has no value of {key} to try.")
        if not self.seeds or not all(type(seed) is int and 0 <= seed < 2**32 for seed in self.seeds):
            raise ConfigError(f"seeds are one or more whole numbers from 0 to 2^32 - 1, got {list(self.seeds)}.")
        if self.halving is not None and self.halving < 2:
            raise ConfigError(f"Halving keeps one of 2 or more, got {self.halving}.")
        if not 0 <= self.first_rung < 1:
            raise ConfigError(
                f"The first rung lies at a share of the training from 0 to below 1, got {self.first_rung}."
            )
        seeded = self.seeded(0).keys()
        for key in self.grid.keys() & (self.choose.keys() | self.retrain.keys()):
            raise ConfigError(f"{key} is in the grid, which searches it: leave it out of choose and retrain.")
        for key in seeded & (self.grid.keys() | self.choose.keys() | self.retrain.keys()):
            raise ConfigError(f"{key} follows the seeds: leave it out of grid, choose and retrain.")

    def seeded(self, seed: int) -> dict[str, Any]:
        """The values that a seed gives."""
        return dict.fromkeys(("seed_everything", *self.by_seed), seed)

    def points(self) -> list[dict[str, Any]]:
        """All combinations of the grid, the smallest learning rate first."""
        values = [list({identity(value): value for value in each}.values()) for each in self.grid.values()]
        points = [dict(zip(self.grid, point, strict=True)) for point in itertools.product(*values)]
        return sorted(points, key=lambda point: point.get(RATE, 0.0))


@dataclass(frozen=True)
class Outcome:
    """What a search found, by a score of `vpt.run_record.SCORES`; accuracies lie in [0, 1].

    Attributes:
        chosen: The values of the best point.
        val: Its validation score; None if there was nothing to choose.
        tests: Test score by seed.
        runs: Folder below that of the experiment by seed.
        tried: A row for each point: its values and ``val``, or ``failed`` and why.
        failed: Seeds that gave no result, and why.
        epochs: Trained while choosing, and how many the whole grid would have taken.
        seconds: Of all trials together.
        images: Passed forward and backward in all trials.
        score: What is measured, as in tables.
        members: Of a hyperparameter ensemble, by seed how many points' answers are averaged.
    """

    chosen: dict[str, Any]
    val: float | None
    tests: dict[int, float]
    runs: dict[int, str]
    tried: list[dict[str, Any]]
    failed: dict[int, str]
    epochs: tuple[int, int]
    seconds: float
    images: int
    score: str
    members: dict[int, int] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean test score over seeds."""
        return mean(self.tests.values())

    @property
    def std(self) -> float:
        """Standard deviation over seeds (n - 1); 0 for a single seed."""
        return stdev(self.tests.values()) if len(self.tests) > 1 else 0.0


def sweep(config: Config, plan: Plan, root: Path, engine: Engine) -> Outcome:
    """Searches, retrains and tests by `sweeps` a single config, which is as `Trial.config`.

    A VPTError where it gave no result.
    """
    found = sweeps({"": config}, plan, root, engine)[""]
    if isinstance(found, Failure):
        raise VPTError(found.reason)
    return found


def sweeps(
    configs: Mapping[str, Config], plan: Plan | Mapping[str, Plan], root: Path, engine: Engine
) -> dict[str, Outcome | Failure]:
    """Searches, retrains and tests several configs at once, so that the trials of all fill the machine together.

    Configs are by the folder of each search below `root`, where what is finished is not repeated; perhaps each has a
    plan of its own, by the same names. Each outcome is also written to ``sweep.json`` in its folder; where a search or
    all of its seeds gave no result there is the reason instead.
    """
    plans = dict.fromkeys(configs, plan) if isinstance(plan, Plan) else plan
    points = {
        prefix: search_trials(prefix, config, plans[prefix], plans[prefix].points())
        for prefix, config in configs.items()
    }
    searched = {prefix: trials for prefix, trials in points.items() if len(trials) > 1}
    found = _search(searched, plans, root, engine) if searched else {}
    best: dict[str, tuple[Trial, float | None]] = {prefix: (trials[0], None) for prefix, trials in points.items()}
    chosen, failed = results(searched, lambda prefix: _best(searched[prefix], found))
    best |= chosen
    going = {prefix: searched[prefix] for prefix in chosen}
    for done in range(max((each.widen for each in plans.values()), default=0)):
        going = {p: trials for p, trials in going.items() if done < plans[p].widen}
        more = {p: _farther(p, configs[p], plans[p], best[p][0], points[p], found) for p in going}
        going = {p: trials for p, trials in more.items() if trials}
        found |= engine([trial for trials in going.values() for trial in trials], root) if going else {}
        points |= {p: _ordered([*points[p], *trials]) for p, trials in going.items()}
        going = {p: trials for p, trials in going.items() if _top(trials, found) > cast("float", best[p][1])}
        best |= {p: _best(trials, found) for p, trials in going.items()}
    finals = {
        p: [tested_trial(p, configs[p], plans[p], best[p][0].values, seed) for seed in plans[p].seeds]
        for p in configs
        if p not in failed
    }
    tested = engine([trial for trials in finals.values() for trial in trials], root)

    def outcome(prefix: str) -> Outcome:
        tried = {trial.name: found[trial.name] for trial in points[prefix] if prefix in searched}
        last = {trial.name: tested[trial.name] for trial in finals[prefix]}
        return _outcome(plans[prefix], best[prefix], points[prefix], tried, last)

    outcomes, untested = results(finals, outcome)
    for prefix, each in outcomes.items():
        write_json(root / prefix / SWEEP_FILE, plain(configs[prefix], plans[prefix], each))
    return {prefix: (outcomes | failed | untested)[prefix] for prefix in configs}


T = TypeVar("T")


def results(prefixes: Iterable[str], result: Callable[[str], T]) -> tuple[dict[str, T], dict[str, Failure]]:
    """The result of each, and the reason of each that gave none."""
    found, failed = {}, {}
    for prefix in prefixes:
        try:
            found[prefix] = result(prefix)
        except VPTError as error:
            failed[prefix] = Failure(str(error))
    return found, failed


def search_trials(prefix: str, config: Config, plan: Plan, points: Sequence[dict[str, Any]]) -> list[Trial]:
    """The trials of some points of a search."""
    fixed = plan.choose | plan.seeded(plan.seeds[0])
    return [
        Trial(_name(prefix, "choose", point, fixed | point), merged(config, fixed | point), values=point)
        for point in points
    ]


def _farther(
    prefix: str,
    config: Config,
    plan: Plan,
    best: Trial,
    trials: Sequence[Trial],
    found: Mapping[str, Record | Failure],
) -> list[Trial]:
    rows = [trial.values | _row(found[trial.name]) for trial in trials]
    return search_trials(prefix, config, plan, beyond(best.values, rows))


def _top(trials: Sequence[Trial], found: Mapping[str, Record | Failure]) -> float:
    return max(val_score(found[trial.name]) for trial in trials)


def beyond(best: Mapping[str, Any], tried: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Points that a search goes on with where its best one has the smallest or the largest value of all tried.

    For each key of positive numbers that are not all whole, zeros aside: the next value beyond that end, in the ratio
    of the last two; all other keys as in the best point. Empty where the best point lies at no end, or its neighbour is
    as good: there is nothing to gain in that direction. `tried` are rows of `Outcome.tried`.
    """
    found = []
    score_of = {identity({key: row[key] for key in best}): _val(row) for row in tried}
    for key, value in best.items():
        values = sorted({row[key] for row in tried if isinstance(row[key], float | int) and row[key] != 0})
        usable = len(values) > 1 and values[0] > 0 and not all(isinstance(each, int) for each in values)
        if usable and value in (values[0], values[-1]):
            neighbour = values[1] if value == values[0] else values[-2]
            beside = score_of.get(identity({**best, key: neighbour}), -math.inf)
            if beside < score_of[identity(dict(best))]:
                found.append({**best, key: float(f"{value * value / neighbour:.3g}")})
    return found


def _val(row: Mapping[str, Any]) -> float:
    found = row.get("val")
    return -math.inf if found is None else float(found)


def _ordered(trials: Sequence[Trial]) -> list[Trial]:
    """The smallest learning rate first, each once."""
    return sorted({trial.name: trial for trial in trials}.values(), key=lambda trial: trial.values.get(RATE, 0.0))


def tested_trial(prefix: str, config: Config, plan: Plan, point: Mapping[str, Any], seed: int) -> Trial:
    """The trial of a point that is retrained with a seed and tested."""
    # After training on them, validation images say nothing; leaving them out saves their forward passes.
    own = {"trainer.limit_val_batches": 0, **plan.retrain, **point, **plan.seeded(seed)}
    name = _name(prefix, "test", {"seed": seed, **point}, own)
    return Trial(name, merged(config, own), test=True, values=dict(point))


def _search(
    groups: Mapping[str, list[Trial]], plans: Mapping[str, Plan], root: Path, engine: Engine
) -> dict[str, Record | Failure]:
    """Trains what is tried, of each group that is halved to its own rungs, all groups side by side."""
    left, stops = dict(groups), {prefix: stops_of(trials, plans[prefix]) for prefix, trials in groups.items()}
    found: dict[str, Record | Failure] = {}
    while any(stops.values()):
        now = {prefix: rest.pop(0) for prefix, rest in stops.items() if rest}
        found |= engine([replace(trial, stop=stop) for prefix, stop in now.items() for trial in left[prefix]], root)
        left |= {prefix: _survivors(left[prefix], found, cast("int", plans[prefix].halving)) for prefix in now}
    return found | engine([trial for trials in left.values() for trial in trials], root)


def stops_of(trials: Sequence[Trial], plan: Plan) -> list[int]:
    """The epochs after which only the best of a search go on; none without halving."""
    return [] if plan.halving is None else rungs(_epochs(trials[0].config), len(trials), plan.halving, plan.first_rung)


def _epochs(config: Config) -> int:
    epochs = config["trainer"].get("max_epochs")
    if epochs is None or epochs < 1:
        raise ConfigError(
            "Halving stops trials after whole epochs: give trainer.max_epochs, or train the whole grid (--halving 1)."
        )
    return int(epochs)


def _survivors(group: list[Trial], found: Mapping[str, Record | Failure], halving: int) -> list[Trial]:
    measured = [trial for trial in group if val_score(found[trial.name]) > -math.inf]
    ranked = sorted(measured, key=lambda trial: -val_score(found[trial.name]))
    return ranked[: kept(len(group), halving)]


def kept(trials: int, halving: int) -> int:
    """How many of some trials go on at a rung."""
    return max(1, math.ceil(trials / halving))


def rungs(epochs: int, points: int, halving: int, first: float = FIRST_RUNG) -> list[int]:
    """Epochs below `epochs`, ascending, at which only the best 1/halving of so many trials, at least 2, go on.

    They grow by `halving`, and none lies before the share `first` of the training.

    Ray Tune's ASHA and optuna's SuccessiveHalvingPruner stop trials in the order in which they report, so what survives
    depends on the machine; these rungs wait for all trials, so that every engine finds the same.
    """
    count = math.floor(math.log(max(points, 1), halving) + 1e-9)
    found = {math.ceil(epochs / halving**power) for power in range(count, 0, -1) if halving**-power >= first}
    return sorted(each for each in found if each < epochs)


def _best(points: Sequence[Trial], found: Mapping[str, Record | Failure]) -> tuple[Trial, float]:
    """The best validation score of those that were trained to their end; ties go to the smallest learning rate."""
    good = [(trial, record) for trial in points if isinstance(record := found.get(trial.name), dict)]
    good = [(trial, record) for trial, record in good if val_score(record) > -math.inf]
    if not good:
        own = (found.get(trial.name) for trial in points)
        reasons = [result.reason for result in own if isinstance(result, Failure)]
        raise VPTError(
            f"No trial gave a validation score: {reasons[0] if reasons else 'there are no val images, or too few'}"
        )
    whole = [(trial, record) for trial, record in good if record.get("status") in ENDED] or good
    trial, record = max(whole, key=lambda pair: val_score(pair[1]))
    return trial, val_score(record)


def _outcome(
    plan: Plan,
    best: tuple[Trial, float | None],
    points: Sequence[Trial],
    found: Mapping[str, Record | Failure],
    tested: Mapping[str, Record | Failure],
) -> Outcome:
    tried = [trial.values | _row(found[trial.name]) for trial in points if trial.name in found]
    records = [record for record in {**found, **tested}.values() if isinstance(record, dict)]
    by_seed = dict(zip(plan.seeds, tested.values(), strict=True))
    trained = sum(row.get("epochs", 0) for row in tried)
    scores = {seed: score(r, "test") for seed, r in by_seed.items() if isinstance(r, dict)}
    failed = {seed: result.reason for seed, result in by_seed.items() if isinstance(result, Failure)}
    failed |= {seed: "its test gave no score" for seed, found in scores.items() if found is None}
    if len(failed) == len(by_seed):
        raise VPTError(f"No seed gave a result: {next(iter(failed.values()))}")
    return Outcome(
        chosen=best[0].values,
        val=best[1],
        tests={seed: found for seed, found in scores.items() if found is not None},
        runs=dict(zip(plan.seeds, tested, strict=True)),
        tried=tried,
        failed=failed,
        epochs=(trained, trained if plan.halving is None else len(tried) * _epochs(best[0].config)),
        seconds=sum(record.get("seconds", 0.0) for record in records),
        images=sum(record["images"] for record in records),
        score=score_names(records),
    )


def _row(result: Record | Failure) -> dict[str, Any]:
    if isinstance(result, Failure):
        return {"failed": result.reason}
    return {"val": score(result, "val"), "epochs": result["epochs"]}


def _name(prefix: str, stage: str, shown: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """Of a trial: the hash of all that it sets decides, what stands before it is for people."""
    text = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in shown.items())
    readable = "".join(letter if letter.isalnum() or letter in ".,=+_" else "_" for letter in text)[:60]
    return "/".join(part for part in (prefix, stage, f"{readable}-{identity(values)[:12]}".strip("-")) if part)


def plain(config: Config, plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """What ``sweep.json`` holds."""
    found = asdict(outcome)
    trained, whole = found.pop("epochs")
    return {
        "written": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "config": config,
        "grid": plan.grid,
        "widen": plan.widen,
        "choose": plan.choose,
        "retrain": plan.retrain,
        **found,
        "mean": outcome.mean,
        "std": outcome.std,
        "epochs_trained": trained,
        "epochs_of_the_grid": whole,
        "seconds": round(outcome.seconds, 1),
    }
