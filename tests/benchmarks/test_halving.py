"""Rules are replayed from curves as `vpt sweep` would have acted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.halving import EPOCHS, GRID, Answer, Curves, asha, halve, whole
from vpt.experiments.sweep import Plan, rungs, sweep
from vpt.experiments.trial import Failure, Record, Trial

POINTS = math.prod(len(values) for values in GRID.values())
CONFIG: dict[str, Any] = {
    "seed_everything": 0,
    "trainer": {"max_epochs": EPOCHS},
    "model": {"class_path": "vpt.tasks.PromptTuning", "init_args": {}},
    "data": {"class_path": "vpt.data.DigitsDataModule", "init_args": {}},
}


def curves(seed: int) -> Curves:
    """Noisy accuracies of 200 images, many of which are equal, that rise at paces of their own."""
    source = np.random.default_rng(seed)
    tops, paces = source.uniform(0.6, 0.99, (2, POINTS, 1))
    rising = tops * (1 - np.exp(-paces * np.arange(1, EPOCHS + 1) / 4))
    found = np.round(200 * (rising + source.normal(0, 0.02, rising.shape))) / 200
    return {EPOCHS: [{"val": row.tolist(), "loss": (1 - row).tolist(), "test": row[-1]} for row in found]}


class Replayed:
    """An engine whose trials have the accuracies of the curves."""

    def __init__(self, found: Curves) -> None:
        self.rows, self.spent = found[EPOCHS], dict[str, int]()
        self.points = Plan({key: list(values) for key, values in GRID.items()}).points()

    def __call__(self, trials: Sequence[Trial], root: Path) -> dict[str, Record | Failure]:
        return {trial.name: self._record(trial) for trial in trials}

    def _record(self, trial: Trial) -> Record:
        epochs = trial.stop or EPOCHS
        if not trial.test:
            self.spent[trial.name] = epochs
        val = self.rows[self.points.index(trial.values)]["val"][epochs - 1]
        status = "finished" if epochs == EPOCHS else "paused"
        metrics = {"val/acc": val, "test/acc": val}
        return {"metrics": metrics, "epochs": epochs, "seconds": 1.0, "images": 1, "status": status}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("keep", [2, 3, 4, None])
def test_the_replay_is_what_a_sweep_does(tmp_path: Path, seed: int, keep: int | None) -> None:
    found = curves(seed)
    engine = Replayed(found)
    plan = Plan({key: list(values) for key, values in GRID.items()}, seeds=(1,), halving=keep)
    outcome = sweep(CONFIG, plan, tmp_path, engine)
    told = whole(found) if keep is None else halve(found, rungs(EPOCHS, POINTS, keep), keep, "val")
    assert told == Answer(sum(engine.spent.values()), engine.points.index(outcome.chosen))


def test_a_rung_that_nobody_survives_alone_costs_what_it_trains() -> None:
    found = curves(0)
    assert halve(found, [], 2, "val") == whole(found)
    # 24 points for 2 epochs, 12 for 2 more, 6 for 4, 3 for 8, and 2 to the end.
    assert halve(found, [2, 4, 8, 16], 2, "val").epochs == 24 * 2 + 12 * 2 + 6 * 4 + 3 * 8 + 2 * 16
    # Trained anew, each pays for all of its epochs.
    anew = dict.fromkeys((2, 8), found[EPOCHS]) | dict(found)
    assert halve(anew, [2, 8], 4, "val", anew=True).epochs == 24 * 2 + 6 * 8 + 2 * EPOCHS


def test_loss_and_accuracy_rank_alike_where_one_is_what_the_other_lacks() -> None:
    for seed in range(3):
        found = curves(seed)
        assert halve(found, [1, 4], 4, "loss") == halve(found, [1, 4], 4, "val")


@pytest.mark.parametrize(("keep", "grace"), [(2, 1), (3, 1), (4, 2)])
def test_asha_is_ray_tunes(keep: int, grace: int) -> None:
    schedulers = pytest.importorskip("ray.tune.schedulers", reason="needs ray, of the sweep extra")
    trials = pytest.importorskip("ray.tune.experiment")
    found = curves(keep)
    order = np.random.default_rng(0).permutation(POINTS).tolist()
    theirs = schedulers.AsyncHyperBandScheduler("epoch", "val", "max", EPOCHS, grace, keep)
    known = {point: trials.Trial("replayed", stub=True) for point in order}
    for trial in known.values():
        theirs.on_trial_add(None, trial)
    alive, spent = list(order), 0
    for epoch in range(1, EPOCHS + 1):
        for point in list(alive):
            spent += 1
            told = {"epoch": epoch, "val": found[EPOCHS][point]["val"][epoch - 1]}
            if theirs.on_trial_result(None, known[point], told) != "CONTINUE" and epoch < EPOCHS:
                alive.remove(point)
    best = max(sorted(alive), key=lambda point: found[EPOCHS][point]["val"][-1])
    assert asha(found, keep, grace, order) == Answer(spent, best)


def test_asha_never_stops_the_best_that_comes_first() -> None:
    found = curves(1)
    rows = found[EPOCHS]
    always = {EPOCHS: [{**row, "val": [point / POINTS] * EPOCHS} for point, row in enumerate(rows)]}
    falling = asha(always, 2, 1, range(POINTS - 1, -1, -1))
    assert falling.point == POINTS - 1
    rising = asha(always, 2, 1, range(POINTS))
    assert rising == Answer(POINTS * EPOCHS, POINTS - 1), "each is the best when it comes"
    assert falling.epochs < rising.epochs
