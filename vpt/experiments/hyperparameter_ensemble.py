"""Few-shot results without validation images: nothing is chosen, the answers of a whole grid are averaged.

The hyperparameter ensemble of FewTrans (Luo et al., "Benchmarking Few-shot Transferability of Pre-trained Models with
Improved Evaluation Protocols", 2026), with the mean of probabilities where its released code takes a majority vote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from scipy.special import softmax

from vpt.atomic_write import write_json
from vpt.errors import ConfigError, VPTError
from vpt.experiments.executors import Engine
from vpt.experiments.sweep import SWEEP_FILE, Outcome, Plan, plain, results, tested_trial
from vpt.experiments.trial import ANSWERS_FILE, Config, Failure, Record, Trial
from vpt.experiments.variants import SERIES_FILE, rows_of
from vpt.metrics.accuracy import top1
from vpt.robustness import logit_records
from vpt.run_record import SCORES, score


def ensemble_variants(
    variants: Mapping[str, Config], plan: Plan, root: Path, engine: Engine
) -> dict[str, Outcome | Failure]:
    """Trains every variant with every point of the grid and every seed, and scores the mean answers of the points.

    An answer is the probability of each class for a test image; a point that diverged gives none, and is reported. The
    outcomes are written as by `sweep_variants`: ``chosen`` is empty, ``tried`` has the mean ``test`` score of each
    point alone over the seeds that have one, and ``members`` how many points each seed's mean is of; of a variant of
    which no seed gave a result there is the reason. ``choose`` of the plan is not used.

    Raises:
        ConfigError: The grid has fewer than two points, the plan stops or widens a search that there is none of, or the
            answers of a trial are not kept: of several devices, or where images do not have one class each.
    """
    points = plan.points()
    if len(points) < 2:
        raise ConfigError("A hyperparameter ensemble averages over a grid: give one of at least two points.")
    if plan.halving is not None or plan.widen:
        raise ConfigError("A hyperparameter ensemble trains the whole grid: leave out halving and widen.")
    for config in variants.values():
        _check(config)
    trials = {
        name: {seed: [tested_trial(name, config, plan, point, seed) for point in points] for seed in plan.seeds}
        for name, config in variants.items()
    }
    found = engine([each for of_seed in trials.values() for group in of_seed.values() for each in group], root)
    each, failed = results(variants, lambda name: _outcome(trials[name], found, root))
    for name, outcome in each.items():
        write_json(root / name / SWEEP_FILE, plain(variants[name], plan, outcome))
    outcomes = {name: (each | failed)[name] for name in variants}
    write_json(root / SERIES_FILE, rows_of(outcomes))
    return outcomes


def _check(config: Config) -> None:
    targets = config["data"].get("init_args", {}).get("targets", "multiclass")
    if targets != "multiclass":
        raise ConfigError(f"A hyperparameter ensemble is of images with one class each, not of {targets} targets.")
    devices, nodes = (config["trainer"].get(key) for key in ("devices", "num_nodes"))
    named = devices.strip(",").split(",") if isinstance(devices, str) else devices
    if (isinstance(named, list) and len(named) > 1) or (isinstance(devices, int) and devices > 1) or (nodes or 1) > 1:
        raise ConfigError("A hyperparameter ensemble needs trainer.devices 1: several keep no answers of their test.")


def _outcome(
    trials: Mapping[int, Sequence[Trial]],
    found: Mapping[str, Record | Failure],
    root: Path,
) -> Outcome:
    tests, failed, members = {}, {}, {}
    for seed, group in trials.items():
        trained = [trial for trial in group if isinstance(found[trial.name], dict)]
        if trained:
            tests[seed], members[seed] = _mean_answers(root, trained), len(trained)
        else:
            reasons = (result.reason for each in group if isinstance(result := found[each.name], Failure))
            failed[seed] = next(reasons)
    if not tests:
        raise VPTError(f"No seed gave a result: {next(iter(failed.values()))}")
    every = [found[trial.name] for group in trials.values() for trial in group]
    records = [record for record in every if isinstance(record, dict)]
    return Outcome(
        chosen={},
        val=None,
        tests=tests,
        runs={},
        tried=[_alone(dict(zip(trials, column, strict=True)), found) for column in zip(*trials.values(), strict=True)],
        failed=failed,
        epochs=(sum(record.get("epochs", 0) for record in records),) * 2,
        seconds=sum(record.get("seconds", 0.0) for record in records),
        images=sum(record["images"] for record in records),
        score=SCORES["acc"],
        members=members,
    )


def _mean_answers(root: Path, trials: Sequence[Trial]) -> float:
    """Top-1 of the mean probabilities of some trials on the same test images."""
    files = [root / trial.name / ANSWERS_FILE for trial in trials]
    if lacking := [file for file in files if not file.is_file()]:
        raise VPTError(f"There is no {lacking[0]} with the answers of the test: the trial ran on several devices.")
    records = [logit_records.read(file) for file in files]
    if not all(record.same_images(records[0]) for record in records):
        raise VPTError(f"The trials beside {files[0].parent} were tested on different images: name another --out.")
    answers = np.mean([softmax(record.scored.astype(np.float64), axis=1) for record in records], axis=0)
    return top1(answers, records[0].label)


def _alone(trials: Mapping[int, Trial], found: Mapping[str, Record | Failure]) -> dict[str, Any]:
    """The row of a point: its values, its own mean score, and why it has none with some seed."""
    results = {seed: found[trial.name] for seed, trial in trials.items()}
    scores = [score(result, "test") for result in results.values() if isinstance(result, dict)]
    measured = [each for each in scores if each is not None]
    reasons = [f"seed {seed}: {result.reason}" for seed, result in results.items() if isinstance(result, Failure)]
    row = dict(next(iter(trials.values())).values)
    return row | ({"test": mean(measured)} if measured else {}) | ({"failed": "; ".join(reasons)} if reasons else {})
