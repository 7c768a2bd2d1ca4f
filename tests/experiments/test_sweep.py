from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import make_folder
from vpt.errors import ConfigError, VPTError
from vpt.experiments.executors import serially
from vpt.experiments.sweep import Plan, beyond, rungs, sweep, sweeps
from vpt.experiments.trial import Config, Failure, Record, Trial, finished, merged
from vpt.experiments.variants import by_backbone, by_shots, combinations, few_shot_plan, sweep_variants
from vpt.run_record import read_record

from .conftest import whole


class Pretend:
    """An engine that trains nothing: accuracy is a function of the config."""

    def __init__(self, val: Any, fail: Sequence[str] = ()) -> None:
        self.val, self.fail, self.trials = val, fail, list[Trial]()

    def __call__(self, trials: Sequence[Trial], root: Path) -> dict[str, Record | Failure]:
        self.trials += trials
        return {trial.name: self._result(trial) for trial in trials}

    def _result(self, trial: Trial) -> Record | Failure:
        if any(part in trial.name for part in self.fail):
            return Failure("out of luck")
        args = trial.config["model"]["init_args"]
        epochs = trial.stop or trial.config["trainer"]["max_epochs"]
        metrics = {"val/acc": self.val(args, epochs), "test/acc": trial.config["seed_everything"] / 100}
        return {"metrics": metrics, "epochs": epochs, "seconds": 1.0, "images": 10 * epochs}


PLAN = Plan(
    {"model.base_lr": [0.5, 0.1, 0.2], "model.num_tokens": [1, 5]},
    choose={"data.train": "train800"},
    retrain={"data.train": "train800val200"},
    seeds=(42, 44),
)


def test_validation_chooses_and_the_test_split_is_read_once_a_seed(config: Config, root: Path) -> None:
    engine = Pretend(lambda args, epochs: args["base_lr"] + args["num_tokens"] / 100)
    found = sweep(config, PLAN, root, engine)
    assert found.chosen == {"model.base_lr": 0.5, "model.num_tokens": 5}
    assert found.val == 0.55
    assert found.tests == {42: 0.42, 44: 0.44}
    choosing, last = engine.trials[:6], engine.trials[6:]
    assert not any(trial.test for trial in choosing)
    assert {trial.config["data"]["init_args"]["train"] for trial in choosing} == {"train800"}
    assert {trial.config["seed_everything"] for trial in choosing} == {42}
    assert [trial.test for trial in last] == [True, True]
    assert {trial.config["data"]["init_args"]["train"] for trial in last} == {"train800val200"}
    assert {trial.config["trainer"]["limit_val_batches"] for trial in last} == {0}
    assert json.loads((root / "sweep.json").read_text())["mean"] == pytest.approx(0.43)


def test_a_search_goes_on_beyond_an_end_until_the_best_lies_within(config: Config, root: Path) -> None:
    engine = Pretend(lambda args, epochs: -abs(args["base_lr"] - 1.9))
    plan = replace(PLAN, grid={"model.base_lr": [0.5, 0.1, 0.2]}, widen=4)
    found = sweep(config, plan, root, engine)
    # 0.5 is the best of 0.1, 0.2, 0.5; the ratio of the last two is 2.5
    assert [row["model.base_lr"] for row in found.tried] == [0.1, 0.2, 0.5, 1.25, 3.12]
    assert found.chosen == {"model.base_lr": 1.25}
    assert len([trial for trial in engine.trials if not trial.test]) == 5, "nothing is trained twice"
    assert beyond(found.chosen, found.tried) == []
    again = Pretend(engine.val)
    assert sweep(config, plan, root, again).tried == found.tried
    once = sweep(config, replace(plan, widen=1), root / "once", engine)
    assert once.chosen == {"model.base_lr": 1.25}
    assert beyond(once.chosen, once.tried) == [{"model.base_lr": 3.12}]


def test_only_positive_numbers_that_are_not_whole_have_something_beyond() -> None:
    tried = [{"a": a, "b": b, "c": c, "val": a} for a in (0.0, 0.1) for b in (1, 5) for c in ("x", "y")]
    assert beyond({"a": 0.1, "b": 5, "c": "y"}, tried) == []
    rates = [{"model.base_lr": a, "n": n, "val": -a} for a in (1, 0.1, 0.0) for n in (2, 4)]
    assert beyond({"model.base_lr": 0.1, "n": 4}, rates) == [{"model.base_lr": 0.01, "n": 4}]


def test_an_end_stays_one_where_another_key_has_moved_on() -> None:
    tried = [{"a": a, "b": b, "val": a + b} for a in (0.1, 0.3) for b in (0.01, 0.03)]
    assert beyond({"a": 0.3, "b": 0.03}, tried) == [{"a": 0.9, "b": 0.03}, {"a": 0.3, "b": 0.09}]
    tried.append({"a": 0.9, "b": 0.03, "val": 2.0})
    assert beyond({"a": 0.9, "b": 0.03}, tried) == [{"a": 2.7, "b": 0.03}, {"a": 0.9, "b": 0.09}]


@pytest.mark.parametrize("best", [0.03, 0.3])
def test_a_search_does_not_follow_equals(best: float, config: Config, root: Path) -> None:
    def val(args: Any, epochs: int) -> float:
        return 0.99 if args["base_lr"] <= best else 0.9

    engine = Pretend(val)
    plan = replace(PLAN, grid={"model.base_lr": [0.03, 0.1, 0.3]}, widen=3)
    found = sweep(config, plan, root, engine)
    assert found.chosen == {"model.base_lr": 0.03}
    # 0.1 is worse than 0.03 in one case, so that 0.009 is tried, which is not better
    assert len(found.tried) == (4 if best == 0.03 else 3)


def test_a_search_with_halving_is_widened_by_whole_trainings(config: Config, root: Path) -> None:
    engine = Pretend(lambda args, epochs: args["base_lr"] + epochs / 1000, fail=("base_lr=8.0",))
    plan = replace(PLAN, grid={"model.base_lr": [0.5, 1.0, 2.0]}, halving=3, widen=3)
    found = sweep(config, plan, root, engine)
    whole = config["trainer"]["max_epochs"]
    assert [(row["model.base_lr"], row.get("epochs")) for row in found.tried][-2:] == [(4.0, whole), (8.0, None)]
    assert found.chosen == {"model.base_lr": 4.0}
    assert found.tried[-1]["failed"] == "out of luck"


def test_each_variant_is_widened_by_its_own_best(config: Config, root: Path) -> None:
    configs = {"low": merged(config, {"model.num_tokens": 1}), "high": merged(config, {"model.num_tokens": 9})}
    engine = Pretend(lambda args, epochs: args["base_lr"] * (-1 if args["num_tokens"] == 1 else 1))
    plan = replace(PLAN, grid={"model.base_lr": [0.1, 0.2]}, widen=2)
    found = whole(sweeps(configs, plan, root, engine))
    assert [row["model.base_lr"] for row in found["low"].tried] == [0.025, 0.05, 0.1, 0.2]
    assert [row["model.base_lr"] for row in found["high"].tried] == [0.1, 0.2, 0.4, 0.8]


def test_of_equals_the_smaller_rate_is_taken(config: Config, root: Path) -> None:
    found = sweep(config, PLAN, root, Pretend(lambda args, epochs: 0.5))
    assert found.chosen["model.base_lr"] == 0.1


def test_a_trial_that_fails_is_reported_and_sinks_nothing(config: Config, root: Path) -> None:
    engine = Pretend(lambda args, epochs: args["base_lr"], fail=("base_lr=0.5", "seed=44"))
    found = sweep(config, PLAN, root, engine)
    assert found.chosen["model.base_lr"] == 0.2
    assert [row.get("failed") for row in found.tried].count("out of luck") == 2
    assert found.failed == {44: "out of luck"}
    assert found.tests == {42: 0.42}


def test_a_search_without_any_result_says_why(config: Config, root: Path) -> None:
    with pytest.raises(VPTError, match="No trial gave a validation score: out of luck"):
        sweep(config, PLAN, root, Pretend(lambda args, epochs: 0.5, fail=("choose",)))
    with pytest.raises(VPTError, match="No seed gave a result: out of luck"):
        sweep(config, PLAN, root, Pretend(lambda args, epochs: 0.5, fail=("test",)))


def test_halving_trains_the_best_to_the_end_and_says_what_it_saved(config: Config, root: Path) -> None:
    config["trainer"]["max_epochs"] = 8
    plan = Plan({"model.base_lr": [0.1 * step for step in range(1, 9)]}, seeds=(1,), halving=2)
    engine = Pretend(lambda args, epochs: args["base_lr"] / 10 + epochs / 100)
    found = sweep(config, plan, root, engine)
    assert found.chosen == {"model.base_lr": 0.8}
    stops = [trial.stop for trial in engine.trials]
    assert [stops.count(stop) for stop in (1, 2, 4, None)] == [8, 4, 2, 2]  # the last: one of the grid and the test
    assert [row["epochs"] for row in found.tried] == [1, 1, 1, 1, 2, 2, 4, 8]
    assert found.epochs == (20, 64)


@pytest.mark.parametrize(
    ("epochs", "points", "halving", "expected"),
    [
        (8, 8, 2, [1, 2, 4]),
        (100, 240, 3, [34]),
        (100, 240, 2, [13, 25, 50]),
        (2, 4, 2, [1]),
        (10, 1, 2, []),
        (1, 9, 3, []),
    ],
)
def test_rungs(epochs: int, points: int, halving: int, expected: list[int]) -> None:
    assert rungs(epochs, points, halving) == [each for each in expected if each < epochs]


def test_a_first_rung_may_lie_earlier() -> None:
    assert rungs(100, 240, 3, first=0.0) == [2, 4, 12, 34]
    assert rungs(100, 240, 2, first=1 / 16) == [7, 13, 25, 50]


def test_several_searches_share_their_engine(config: Config, root: Path) -> None:
    engine = Pretend(lambda args, epochs: args["base_lr"])
    found = whole(sweeps({"a": config, "b": config}, PLAN, root, engine))
    assert found["a"].tests == found["b"].tests
    assert len({trial.name for trial in engine.trials}) == len(engine.trials) == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"halving": 1}, "keeps one of 2 or more, got 1"),
        ({"first_rung": 1.0}, "from 0 to below 1, got 1.0"),
        ({"seeds": ()}, "seeds are one or more whole numbers"),
        ({"seeds": (True,)}, "seeds are one or more whole numbers"),
        ({"seeds": (-1,)}, "seeds are one or more whole numbers"),
        ({"grid": {"model.base_lr": []}}, "no value of model.base_lr to try"),
        ({"choose": {"model.base_lr": 0.1}}, "model.base_lr is in the grid"),
        ({"grid": {"seed_everything": [1, 2]}}, "seed_everything follows the seeds"),
        ({"retrain": {"data.subset_seed": 1}, "by_seed": ("data.subset_seed",)}, "data.subset_seed follows the seeds"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(PLAN, **change)


def test_every_trial_has_a_name_of_its_own(config: Config, root: Path) -> None:
    values = [0.1, 0.1 + 1e-9, 1, 1.0, True, [1], ["a/b"], ["a_b"], "x" * 80 + "1", "x" * 80 + "2"]
    engine = Pretend(lambda args, epochs: 0.5)
    sweep(config, Plan({"model.weight_decay": values, "model.x": values}, seeds=(1, 2)), root, engine)
    assert len({trial.name for trial in engine.trials}) == len(engine.trials) == 102
    assert engine.trials[0].name.startswith("choose/weight_decay=0.1,x=0.1-")


def test_another_winner_is_tested_beside_the_first(config: Config, root: Path) -> None:
    plan = Plan({"model.base_lr": [0.1, 0.2]}, seeds=(1,))
    one, other = (Pretend(lambda args, epochs, best=best: float(args["base_lr"] == best)) for best in (0.1, 0.2))
    runs = [sweep(config, plan, root, engine).runs[1] for engine in (one, other, one)]
    assert runs[0] == runs[2] != runs[1]


def test_a_rate_that_diverges_does_not_win(config: Config, root: Path, tmp_path: Path) -> None:
    """Answers that are no numbers would count as the first class, which most of the validation images have."""
    make_folder(tmp_path / "images", {"train": 4, "val": 1, "test": 1})
    first = sorted((tmp_path / "images" / "val").iterdir())[0]
    image = next(first.iterdir())
    for number in range(9):
        (first / f"again{number}.jpg").write_bytes(image.read_bytes() + bytes([number]))
    data = {"root": str(tmp_path / "images"), "image_size": 64, "batch_size": 12}
    unbalanced = config | {"data": {"class_path": "vpt.data.FolderDataModule", "init_args": data}}
    unbalanced = merged(unbalanced, {"trainer.max_epochs": 1, "trainer.limit_train_batches": 1, "model.warmup": 0.0})
    plan = Plan({"model.base_lr": [1e-6, 1e38]}, seeds=(1,))
    found = sweep(unbalanced, plan, root, serially)
    assert found.chosen == {"model.base_lr": 1e-6}
    assert "not finite" in found.tried[1]["failed"]


def test_few_shots_draw_a_nested_subset_for_each_seed(config: Config, root: Path) -> None:
    plan = few_shot_plan(Plan({}, seeds=(3, 4)))
    found = whole(sweep_variants(by_shots(config, [1, 2]), plan, root, serially))
    assert list(found) == ["shots=1", "shots=2"]
    counts = {}
    for shots in (1, 2):
        for seed in (3, 4):
            record = read_record(root / found[f"shots={shots}"].runs[seed])
            counts[shots, seed] = record["data"]["counts"]["train"]
            assert record["data"]["subset"]["seed"] == seed
    assert counts == {(1, 3): 10, (1, 4): 10, (2, 3): 20, (2, 4): 20}
    rows = json.loads((root / "series.json").read_text())
    assert [row["variant"] for row in rows] == ["shots=1", "shots=2"]


def test_all_combinations_of_deltas_are_built_and_none_is_the_probe(config: Config, root: Path) -> None:
    deltas: list[dict[str, Any]] = [
        {"name": "prompt", "num_tokens": 2},
        {"name": "lora", "rank": 2, "targets": ["q"]},
        {"name": "bias"},
    ]
    variants = combinations(config, deltas)
    assert list(variants) == [
        "none",
        "prompt",
        "lora",
        "bias",
        "prompt+lora",
        "prompt+bias",
        "lora+bias",
        "prompt+lora+bias",
    ]
    chosen = {name: variants[name] for name in ("none", "prompt+lora")}
    found = whole(sweep_variants(chosen, Plan({}, seeds=(1,)), root, serially))
    assert all(0 <= each.mean <= 1 for each in found.values())
    record = read_record(root / found["prompt+lora"].runs[1])
    assert [delta["name"] for delta in record["hyperparameters"]["deltas"]] == ["prompt", "lora"]
    for wrong in ([{"name": "bias"}, {"name": "bias"}], [{"rank": 4}]):
        with pytest.raises(ConfigError, match="deltas with different names"):
            combinations(config, wrong)


def test_one_recipe_on_several_backbones(config: Config, root: Path) -> None:
    variants = by_backbone(config, ["vit_nano_patch8_64", "swin_nano_patch4_window7_64", "swin_nano_patch4_window8_64"])
    del variants["swin_nano_patch4_window7_64"]  # there is none
    found = whole(sweep_variants(variants, Plan({}, seeds=(1,)), root, serially))
    assert set(found) == {"vit_nano_patch8_64", "swin_nano_patch4_window8_64"}


def test_a_real_sweep_resumes_with_nothing_left_to_do(config: Config, root: Path) -> None:
    plan = Plan({"model.base_lr": [0.1, 0.2]}, {"data.train": "train800"}, {"data.train": "train800val200"}, (1, 2))
    found = sweep(config, plan, root, serially)
    assert len(found.tried) == 2
    assert set(found.tests) == {1, 2}
    assert found.images > 0
    engine = Pretend(lambda args, epochs: 0.0)

    def only_left(trials: Sequence[Trial], root: Path) -> dict[str, Record | Failure]:
        left = [trial for trial in trials if finished(trial, root) is None]
        engine(left, root)
        return serially(trials, root)

    assert sweep(config, plan, root, only_left) == found
    assert not engine.trials
