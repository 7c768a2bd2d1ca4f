"""What successive halving loses: rules for choosing in a grid of prompts, replayed from trials trained in full.

    python -m benchmarks.halving [--tasks digits shapes] [--seeds 42 44 82] [--schedules 1 2 4 8 16 32] [--threads 1]
    python -m benchmarks.halving --print

Every point of a grid of 24 (rate x tokens x decay) is trained on train800, at 32 pixels with the ViT that ships with
the package, and measured on val200 after every epoch, and on the test split at its end. Stopping a trial does not
change the epochs before, so that any rule can be replayed from these curves: what it would have trained, and the test
accuracy of what it would have chosen. ASHA's answers are those of Ray Tune's scheduler, for the curves in random orders
of arrival. ``--schedules`` also trains every point with the learning rate scheduled to the end of shorter
trainings, for rules that train a survivor anew. A finished trial is a line of OUT/halving.jsonl, and an interrupted run
continues.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from scipy.stats import t as student

from benchmarks.records import RESULTS, Records, Row, markdown
from vpt.cli.commands.lightning_cli import resolve
from vpt.experiments.profile import scalars
from vpt.experiments.sweep import rungs
from vpt.experiments.trial import Trial, merged, run_trial
from vpt.run_record import score

CONFIGS = Path(__file__).parents[1] / "configs"
TASKS = {"digits": "demo", "shapes": "local/shapes"}
SEEDS = (42, 44, 82)
EPOCHS, BATCH, SIZE = 32, 64, 32
GRID = {
    "model.base_lr": (0.005, 0.01, 0.02, 0.04, 0.08, 0.16),
    "model.num_tokens": (5, 20),
    "model.weight_decay": (1e-4, 1e-1),
}
ORDERS = 20
"""Orders of arrival that ASHA is asked with."""
Curves = Mapping[int, Sequence[Row]]
"""By how long the schedule is, the trials of all points of one task and seed, in the order of the grid."""


@dataclass(frozen=True)
class Answer:
    """What a rule would have done: the epochs of training, of one grid, and the point that it chooses."""

    epochs: float
    point: int


def run_trials(out: Path, build: Path, tasks: Sequence[str], seeds: Sequence[int], schedules: Sequence[int]) -> None:
    """Makes what is missing."""
    kept = Records(out / "halving.jsonl", "task", "seed", "epochs", "point")
    points = list(itertools.product(*GRID.values()))
    for epochs, seed, task in itertools.product(schedules, seeds, tasks):
        for point, values in enumerate(points):
            if kept.find(task, seed, epochs, point) is not None:
                continue
            folder = build / "halving" / task
            given = dict(zip(GRID, values, strict=True))
            own = given | {"seed_everything": seed, "trainer.max_epochs": epochs, "data.train": "train800"}
            trial = Trial(f"{epochs}/{seed}-{point}", merged(resolve(_arguments(task)), own), test=epochs == EPOCHS)
            record = run_trial(trial, folder)
            row: Row = {"task": task, "seed": seed, "epochs": epochs, "point": point, "values": given}
            for name, tag in (("val", "val/acc"), ("loss", "val/loss")):
                row[name] = [round(value, 5) for _, value in scalars(folder / trial.name, tag)]
            kept.put(row | {"test": score(record, "test"), "seconds": record["seconds"]})
            shutil.rmtree(folder / trial.name)


def _arguments(task: str) -> list[str]:
    """Those of `vpt fit`."""
    configs = ["-c", str(CONFIGS / f"{TASKS[task]}.yaml"), "-c", str(CONFIGS / "method/vpt_deep.yaml")]
    trainer = ["--trainer.precision=bf16-mixed", "--trainer.num_sanity_val_steps=0"]
    return [*configs, *trainer, f"--data.batch_size={BATCH}", f"--data.image_size={SIZE}"]


def whole(curves: Curves) -> Answer:
    """The grid in full; ties go to the earlier point, whose rate is not larger."""
    return Answer(EPOCHS * len(curves[EPOCHS]), _best(curves[EPOCHS], "val", EPOCHS, range(len(curves[EPOCHS]))))


def halve(curves: Curves, stops: Sequence[int], keep: float, by: str, anew: bool = False) -> Answer:
    """Rungs after `stops` epochs: the best 1/`keep` by val ``val`` or ``loss`` go on, the last of them to the end.

    With `anew`, each rung is a training of its own whose schedule ends there.
    """
    alive = list(range(len(curves[EPOCHS])))
    spent, before = 0.0, 0
    for stop in stops:
        rows = curves[stop if anew else EPOCHS]
        spent += len(alive) * (stop if anew else stop - before)
        before = stop
        ranked = sorted(alive, key=lambda point: _order(rows[point], by, stop))
        alive = sorted(ranked[: max(1, math.ceil(len(alive) / keep))])
    spent += len(alive) * (EPOCHS if anew else EPOCHS - before)
    return Answer(spent, _best(curves[EPOCHS], "val", EPOCHS, alive))


def asha(curves: Curves, keep: int, grace: int, order: Sequence[int]) -> Answer:
    """Asynchronous halving as Ray Tune's scheduler does it.

    Trials report in an order, all one epoch further at a time. At each rung one stops that is below the quantile
    1 - 1/`keep` of what has been reported there before.
    """
    stops = {grace * keep**power for power in range(EPOCHS)} & set(range(EPOCHS))
    reported: dict[int, list[float]] = {stop: [] for stop in stops}
    alive, spent = list(order), 0
    for epoch in range(1, EPOCHS + 1):
        spent += len(alive)
        for point in list(alive) if epoch in stops else ():
            value, before = float(curves[EPOCHS][point]["val"][epoch - 1]), reported[epoch]
            if before and value < np.percentile(before, 100 * (1 - 1 / keep)):
                alive.remove(point)
            before.append(value)
    return Answer(spent, _best(curves[EPOCHS], "val", EPOCHS, sorted(alive)))


def _order(row: Row, by: str, epochs: int) -> float:
    value = float(row[by][epochs - 1])
    return math.inf if math.isnan(value) else value if by == "loss" else -value


def _best(rows: Sequence[Row], by: str, epochs: int, points: Sequence[int]) -> int:
    return min(points, key=lambda point: _order(rows[point], by, epochs))


def rules() -> dict[str, Callable[[Curves, random.Random], Answer]]:
    """By name; each is asked with the curves of a task and seed."""
    points = math.prod(len(values) for values in GRID.values())
    made: dict[str, Callable[[Curves, random.Random], Answer]] = {"the whole grid": lambda curves, _: whole(curves)}

    def add(name: str, stops: Sequence[int], keep: int, by: str, anew: bool = False) -> None:
        made[name] = lambda curves, _: halve(curves, stops, keep, by, anew)

    for keep, first in ((2, 8), (2, 16), (2, 32), (3, 9), (4, 16)):
        stops = rungs(EPOCHS, points, keep, 1 / first)
        for by, told in (("val", ""), ("loss", ", by loss")):
            add(f"halving {keep}, rungs {_told(stops)}{told}", stops, keep, by)
    for keep, stops in ((4, [4, 16]), (4, [1, 4, 16]), (8, [4]), (8, [1, 8])):
        add(f"keeps 1/{keep} at {_told(stops)}", stops, keep, "val")
    for keep, stops in ((2, [4, 8, 16]), (4, [2, 8])):
        add(f"trained anew, 1/{keep} at {_told(stops)}", stops, keep, "val", anew=True)
    for keep, grace in ((2, 1), (4, 1), (2, 4), (4, 4)):

        def ask(curves: Curves, source: random.Random, keep: int = keep, grace: int = grace) -> Answer:
            return asha(curves, keep, grace, source.sample(range(points), points))

        made[f"ASHA {keep}, from epoch {grace}"] = ask
    return made


def _told(stops: Sequence[int]) -> str:
    return ", ".join(map(str, stops))


def grids(rows: Sequence[Row]) -> dict[tuple[str, int], Curves]:
    """The curves of each task and seed whose grid is complete, by length of the schedule where that is, too."""
    points = math.prod(len(values) for values in GRID.values())
    found: dict[tuple[str, int], dict[int, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: int(row["point"])):
        found.setdefault((row["task"], row["seed"]), {}).setdefault(row["epochs"], []).append(row)
    complete = {key: {n: each for n, each in own.items() if len(each) == points} for key, own in found.items()}
    return {key: own for key, own in complete.items() if EPOCHS in own}


def blocks(out: Path = RESULTS) -> dict[str, str]:
    """What is there, as Markdown."""
    found = grids(Records(out / "halving.jsonl", "task", "seed", "epochs", "point").rows())
    if not found:
        return {}
    lines = []
    for name, rule in rules().items():
        asked: dict[str, list[float]] = {task: [] for task in TASKS}
        shares: list[float] = []
        for (task, seed), curves in found.items():
            source = random.Random(seed)  # noqa: S311
            try:
                answers = [rule(curves, source) for _ in range(ORDERS if name.startswith("ASHA") else 1)]
            except KeyError:
                continue  # a schedule that was not trained
            rows = curves[EPOCHS]
            best = float(rows[whole(curves).point]["test"])
            asked[task].append(100 * (best - mean(float(rows[each.point]["test"]) for each in answers)))
            shares.append(mean(each.epochs for each in answers) / (EPOCHS * len(rows)))
        all_of_it = [value for own in asked.values() for value in own]
        if all_of_it:
            by_task = [f"{mean(own):.2f}" if own else "–" for own in asked.values()]
            lines.append([name, str(len(all_of_it)), f"{100 * mean(shares):.1f}", *by_task, _interval(all_of_it)])
    regret = [f"lost on {task}" for task in TASKS]
    return {"halving": markdown(["rule", "grids", "epochs (% of the grid's)", *regret, "lost, 95 % interval"], lines)}


def _interval(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}"
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return f"{mean(values):.2f} ({mean(values) - half:.2f} to {mean(values) + half:.2f})"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--build", type=Path, default=Path("build"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--schedules", nargs="+", type=int, default=[EPOCHS], metavar="EPOCHS")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--print", action="store_true", help="run nothing, print what is there")
    args = parser.parse_args(argv)
    if not args.print:
        torch.set_num_threads(args.threads)
        run_trials(args.out, args.build, args.tasks, args.seeds, args.schedules)
    print(*blocks(args.out).values(), sep="\n\n")


if __name__ == "__main__":
    main()
