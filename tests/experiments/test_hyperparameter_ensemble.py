"""Few shots without a choice: the mean answers of a grid."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax

from vpt.errors import ConfigError
from vpt.experiments.hyperparameter_ensemble import ensemble_variants
from vpt.experiments.sweep import Plan
from vpt.experiments.trial import ANSWERS_FILE, Config, Failure, Record, Trial, merged
from vpt.experiments.variants import by_shots, few_shot_plan
from vpt.robustness import logit_records

from .conftest import whole

PLAN = few_shot_plan(Plan({"model.base_lr": [0.1, 0.2, 0.4]}, retrain={"data.train": "train800"}, seeds=(1, 2)))
LABELS = np.arange(40) % 4


def logits(rate: float, seed: int) -> Any:
    drawn = np.random.default_rng([int(100 * rate), seed]).normal(size=(40, 4))
    return (drawn + np.eye(4)[LABELS]).astype(np.float32)


class Answering:
    """An engine that trains nothing: answers follow from rate and seed."""

    def __init__(self, fail: tuple[float, int] | None = None, answers: bool = True) -> None:
        self.fail, self.answers, self.trials = fail, answers, list[Trial]()

    def __call__(self, trials: Sequence[Trial], root: Path) -> dict[str, Record | Failure]:
        self.trials += trials
        return {trial.name: self._result(trial, root) for trial in trials}

    def _result(self, trial: Trial, root: Path) -> Record | Failure:
        rate, seed = trial.config["model"]["init_args"]["base_lr"], trial.config["seed_everything"]
        if (rate, seed) == self.fail:
            return Failure("the loss is not finite")
        found = logits(rate, seed)
        if self.answers:
            record = logit_records.Record(np.arange(40), LABELS, found, {"set": "test"}, True)
            logit_records.write(root / trial.name / ANSWERS_FILE, record)
        accuracy = float((found.argmax(axis=1) == LABELS).mean())
        return {"metrics": {"test/acc": accuracy}, "epochs": 1, "seconds": 1.0, "images": 4}


def test_the_mean_probabilities_of_all_rates_are_scored_seed_by_seed(config: Config, root: Path) -> None:
    engine = Answering()
    found = whole(ensemble_variants(by_shots(config, [1, 2]), PLAN, root, engine))
    assert list(found) == ["shots=1", "shots=2"]
    assert len(engine.trials) == 2 * 3 * 2
    assert all(trial.test and trial.config["trainer"]["limit_val_batches"] == 0 for trial in engine.trials)
    assert {trial.config["data"]["init_args"]["subset_seed"] for trial in engine.trials} == {1, 2}
    for seed in (1, 2):
        mean = np.mean([softmax(logits(rate, seed), axis=1) for rate in (0.1, 0.2, 0.4)], axis=0)
        assert found["shots=1"].tests[seed] == pytest.approx((mean.argmax(axis=1) == LABELS).mean())
    alone = [np.mean([(logits(rate, seed).argmax(axis=1) == LABELS).mean() for seed in (1, 2)]) for rate in (0.1, 0.2)]
    assert [row["test"] for row in found["shots=2"].tried][:2] == pytest.approx(alone)
    assert (found["shots=1"].chosen, found["shots=1"].val) == ({}, None)
    stored = json.loads((root / "series.json").read_text())
    assert [row["variant"] for row in stored] == ["shots=1", "shots=2"]


def test_a_rate_that_diverged_has_no_answer_and_is_named(config: Config, root: Path) -> None:
    found = whole(ensemble_variants({"": config}, PLAN, root, Answering(fail=(0.2, 1))))[""]
    mean = np.mean([softmax(logits(rate, 1), axis=1) for rate in (0.1, 0.4)], axis=0)
    assert found.tests[1] == pytest.approx((mean.argmax(axis=1) == LABELS).mean())
    alone = (logits(0.2, 2).argmax(axis=1) == LABELS).mean()
    assert found.tried[1] == {"model.base_lr": 0.2, "test": alone, "failed": "seed 1: the loss is not finite"}
    assert found.members == {1: 2, 2: 3}
    assert json.loads((root / "sweep.json").read_text())["members"] == {"1": 2, "2": 3}


def test_what_has_nothing_to_average_is_refused(config: Config, root: Path) -> None:
    for plan, message in (
        (Plan({}), "at least two points"),
        (replace(PLAN, halving=2), "leave out halving"),
        (replace(PLAN, widen=1), "leave out halving and widen"),
    ):
        with pytest.raises(ConfigError, match=message):
            ensemble_variants({"": config}, plan, root, Answering())
    for values, message in (
        ({"data.targets": "multilabel"}, "one class each, not of multilabel targets"),
        ({"trainer.devices": 2}, "needs trainer.devices 1"),
    ):
        engine = Answering()
        with pytest.raises(ConfigError, match=message):
            ensemble_variants({"": merged(config, values)}, PLAN, root, engine)
        assert not engine.trials
    alone = ensemble_variants({"": config}, PLAN, root, Answering(answers=False))[""]
    assert isinstance(alone, Failure)
    assert re.search(r"no .*test\.parquet", alone.reason)
