"""Every method on every task as one experiment: what it takes is known before, and a cell that fails is alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import make_task
from vpt.cli.commands import experiments
from vpt.data.catalog.cards import card_names, load_card
from vpt.experiments.executors import serially
from vpt.experiments.forecast import ROUNDS, Forecaster, Part
from vpt.experiments.sweep import Plan, sweep
from vpt.experiments.trial import Config, Failure, merged
from vpt.run_record import read_record

from .conftest import CONFIGS, QUICK, Vpt

TASKS = {"warm": (5, 2, 3), "cold": (4, 2, 2)}
METHODS = {
    "bias": "model: {class_path: DeltaTuning, init_args: {deltas: [{name: bias}]}}\n",
    "prompt": "model: {class_path: PromptTuning, init_args: {num_tokens: 2}}\n",
}
BASE = ["--model.backbone=vit_nano_patch8_64", "--data.image_size=64", "--trainer.num_sanity_val_steps=0"]
ROW = re.compile(r"│ +(\S+) +│" + 8 * r" +([\d.,e-]+) +│")


@pytest.fixture(autouse=True)
def _nothing_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vpt.models.feature_cache._shared", None)


@pytest.fixture
def suite(vpt: Vpt) -> list[str]:
    """Two tasks of 21 and 18 images in train800val200, two methods, and a grid for each: three rates, and one."""
    for seed, (name, images) in enumerate(TASKS.items()):
        make_task(Path("data") / name, per_class=images, seed=seed)
        data = f"{{task: {name}, root: data, batch_size: 4}}"
        Path(f"{name}.yaml").write_text(f"data: {{class_path: VTABDataModule, init_args: {data}}}\n")
    for name, text in METHODS.items():
        Path(f"{name}.yaml").write_text(text)
    split = "choose: {data.train: train800}\nretrain: {data.train: train800val200}\nseeds: [1, 2]\n"
    Path("rates.yaml").write_text("grid: {model.base_lr: [0.01, 0.1, 0.3]}\n" + split)
    Path("none.yaml").write_text("grid: {}\n" + split)
    given = ["--tasks", "warm.yaml", "cold.yaml", "--methods", "bias.yaml", "prompt.yaml", "--serial", "--out", "out"]
    grids = ["--grid", "rates.yaml", "--grid-of", "prompt=none.yaml", "--halving", "2"]
    return ["sweep", *given, *grids, *BASE, *QUICK, "--trainer.max_epochs=4"]


def rows(out: str) -> dict[str, list[int]]:
    """Trials, epochs and images of the search and of the tested runs, and images forward only, by method."""
    found = (match for line in out.splitlines() if (match := ROW.match(line)))
    return {match[1]: [int(match[at].replace(",", "")) for at in range(2, 9)] for match in found}


def measured(folder: Path, stage: str) -> list[int]:
    """Trials, epochs and images that the runs of a stage below a folder took."""
    records = [read_record(path.parent) for path in folder.rglob(f"{stage}/*/run.json")]
    return [len(records), *(sum(record[key] for record in records) for key in ("epochs", "images"))]


def test_a_dry_run_says_exactly_what_the_suite_then_takes(
    vpt: Vpt, suite: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    dry = vpt(*suite, "--dry-run")
    assert dry.status == 0, dry.err
    assert not Path("out").exists()
    assert "hours of trials, 1 at once" in dry.out
    assert "measured on " in dry.out
    assert dry.out.splitlines()[-1] == "nothing was trained"
    told = rows(dry.out)
    # bias: 3 rates on 2 tasks, of which halving leaves 2 after 2 of 4 epochs; 2 seeds on 2 tasks
    assert told["bias"][:6] == [6, 20, 20 // 2 * (15 + 12), 4, 16, 8 * (21 + 18)]
    assert told["prompt"][:6] == [0, 0, 0, 4, 16, 8 * (21 + 18)]
    answer = vpt(*suite)
    assert answer.status == 0, answer.err
    for method in METHODS:
        out = Path("out") / method
        assert [*measured(out, "choose"), *measured(out, "test")] == told[method][:6]
    assert [sum(told[name][at] for name in METHODS) for at in range(7)] == told["all"]
    # Validation after every epoch of the search, 6 images each; a test of 9 and of 6 images for each seed.
    assert told["bias"][6] == 20 * 6 + 2 * (9 + 6)
    series = {row["variant"]: row for row in json.loads(Path("out/series.json").read_text())}
    assert list(series) == ["bias/warm", "bias/cold", "prompt/warm", "prompt/cold"]
    table = {line.split("│")[1].strip(): line for line in answer.out.splitlines() if line.count("│") == 4}
    for task in TASKS:
        for method in METHODS:
            assert f"{100 * series[f'{method}/{task}']['mean']:.1f} ± " in table[task]
    mean = sum(series[f"bias/{task}"]["mean"] for task in TASKS) / 2
    assert f" {100 * mean:.1f} " in table["mean of 2 tasks"]
    assert "mean rank on 2 tasks" in table
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("run.json")}
    again = vpt(*suite, "--resume")
    assert again.out == answer.out
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("run.json")} == before


def test_a_cell_that_fails_keeps_no_other_from_its_result(vpt: Vpt, suite: list[str]) -> None:
    Path("bias.yaml").write_text(METHODS["bias"].replace("deltas:", "warmup: 2.0, deltas:"))
    assert "bias/warm: warmup and momentum lie in [0, 1)" in vpt(*suite, "--dry-run").sentence
    answer = vpt(*suite)
    assert answer.sentence.startswith("2 of 4 variants gave no result, bias/warm since: No trial gave a validation")
    assert answer.out.count("failed: bias/") == 2
    series = {row["variant"]: row for row in json.loads(Path("out/series.json").read_text())}
    assert "warmup" in series["bias/cold"]["failed"]
    assert len(series["prompt/cold"]["tests"]) == 2
    assert f"{100 * series['prompt/cold']['mean']:.1f} ± " in answer.out
    Path("bias.yaml").write_text(METHODS["bias"])
    mended = vpt(*suite, "--resume")
    assert mended.status == 0, mended.err
    assert not [line for line in mended.err.splitlines() if "prompt/" in line], "what was finished is read"


def test_means_are_left_out_of_tasks_that_differ(vpt: Vpt, suite: list[str]) -> None:
    text = Path("cold.yaml").read_text().replace("batch_size: 4", "batch_size: 3")
    Path("cold.yaml").write_text(text)
    said = (
        "no means over tasks, which differ in data.batch_size (4, 3): flags such as --data.batch_size make them alike"
    )
    assert said in vpt(*suite, "--dry-run").out
    assert said not in vpt(*suite, "--dry-run", "--data.batch_size=4").out
    one = [arg for arg in suite if arg not in ("--halving", "2", "bias.yaml")]
    answer = vpt(*one, "--seeds", "1", "--trainer.max_epochs=1")
    assert answer.status == 0, answer.err
    assert said in answer.out
    assert "mean of 2 tasks" not in answer.out


def test_data_and_weights_that_are_missing_are_named_and_counted_by_the_card(
    vpt: Vpt, suite: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("vpt.backbones.checkpoints.at_hand", lambda name, weights: False)
    vtab = [str(CONFIGS / "vtab" / f"{name}.yaml") for name in ("cifar", "dmlab")]
    missing = [*suite, "--dry-run", "--tasks", *vtab, "--data.root=nowhere", "--data.batch_size=64"]
    answer = vpt(*missing, "--data.preset=vpt")
    assert answer.status == 0, answer.err
    assert "missing data, counted by the card: nowhere/cifar does not exist" in answer.out
    assert "missing weights of vit_nano_patch8_64" in answer.out
    assert rows(answer.out)["prompt"][:6] == [0, 0, 0, 4, 16, 16 * 1000]
    assert rows(answer.out)["prompt"][6] == 2 * (10_000 + 22_735)
    assert "nowhere/cifar does not exist" in vpt(*[arg for arg in missing if arg != "--dry-run"]).err


def test_a_dry_run_says_how_far_it_is_and_reads_a_grid_once_for_each_method(
    vpt: Vpt, suite: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vpt.screen.LINE_EVERY", 0.0)
    grids: list[str] = []
    read = experiments.read_plan

    def noted(path: Path, *args: Any) -> Plan:
        grids.append(path.stem)
        return read(path, *args)

    monkeypatch.setattr(experiments, "read_plan", noted)
    dry = vpt(*suite, "--dry-run")
    assert dry.status == 0, dry.err
    for doing in ("Reading the configs", "Measuring steps"):
        told = [line.partition(",")[0] for line in dry.err.splitlines() if line.startswith(doing)]
        assert told == [f"{doing}: {done} of 4" for done in range(1, 5)]
    assert grids == ["rates", "none"]


def test_fewer_images_are_measured_where_any_pass_is_slow(suite: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A head alone on kept features is fast, and what makes them is not."""
    measured: list[int] = []

    def slow(runs: list[Any], rounds: int) -> list[float]:
        for run in runs:
            run()
        measured.append(rounds)
        return [0.001, 0.2, 0.2]

    monkeypatch.setattr("vpt.experiments.forecast.interleaved", slow)
    model = {"class_path": "vpt.tasks.LinearProbe", "init_args": {"backbone": "vit_nano_patch8_64"}}
    data = {"task": "warm", "root": "data", "train": "train800", "image_size": 64, "batch_size": 64}
    section = {"class_path": "vpt.data.VTABDataModule", "init_args": data}
    config: Config = {"seed_everything": 0, "trainer": {"max_epochs": 5}, "model": model, "data": section}
    forecaster = Forecaster()
    step = forecaster.step(config, forecaster.lists(config))
    assert (step.images, step.batch) == (64, 64)
    assert step.first > 0
    monkeypatch.setattr("vpt.experiments.forecast.SECONDS", 0.5)
    step = Forecaster().step(config, forecaster.lists(config))
    assert (step.images, step.batch) == (1, 64)
    assert measured[-2:] == [1, ROUNDS]


def test_a_dry_run_of_one_config_and_of_variants(vpt: Vpt, suite: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    one = ["-c", "warm.yaml", "-c", "prompt.yaml", *BASE, *QUICK, "--serial", "--out", "out", "--dry-run"]
    answer = vpt("sweep", *one, "--grid", "rates.yaml", "--widen", "2")
    assert answer.status == 0, answer.err
    assert rows(answer.out)["–"] == [3, 3, 45, 2, 2, 42, 3 * 6 + 2 * 9]
    assert "not counted: what --widen 2 adds" in answer.out
    shots = vpt("fewshot", *one, "--shots", "1", "2", "--seeds", "1")
    assert shots.status == 0, shots.err
    assert [rows(shots.out)[f"shots={n}"][3:6] for n in (1, 2)] == [[1, 1, 3], [1, 1, 6]]


def test_the_published_search_on_all_of_vtab_is_counted_without_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of docs/scale.md."""
    monkeypatch.setattr(Forecaster, "step", lambda *_: _Free)
    vtab = [name for name in card_names() if (card := load_card(name)) is not None and card.suite == "vtab"]
    grid: dict[str, list[Any]] = {"model.base_lr": [0.1 * n for n in range(1, 41)], "model.num_tokens": [*range(6)]}
    plan = Plan(grid, {"data.train": "train800"}, {"data.train": "train800val200"})
    search, final = Part(), Part()
    for name in vtab:
        model = {"class_path": "vpt.tasks.PromptTuning", "init_args": {"backbone": "vit_nano_patch8_64"}}
        data = {"task": name, "root": "nowhere", "train": "train800", "val": "val200", "test": "test"}
        section = {"class_path": "vpt.data.VTABDataModule", "init_args": data | {"batch_size": 64}}
        config = {"seed_everything": 0, "trainer": {"max_epochs": 100}, "model": model, "data": section}
        first, last = Forecaster()(name, config, plan)
        search, final = search + first, final + last
    assert search.images == 19 * 240 * 100 * 800
    assert final.images == 19 * 5 * 100 * 1000
    assert final.tested == 5 * 387_904
    assert (search.trials, final.trials) == (4560, 95)
    halved, _ = Forecaster()(name, config, Plan(grid, plan.choose, plan.retrain, halving=2))
    assert halved.epochs == 7560


class _Free:
    train = forward = first = 0.0


def test_limits_and_steps_are_counted_as_lightning_does(vpt: Vpt, suite: list[str], tmp_path: Path) -> None:
    model = {"class_path": "vpt.tasks.LinearProbe", "init_args": {"backbone": "vit_nano_patch8_64"}}
    data = {"task": "warm", "root": "data", "train": "train800", "image_size": 64, "batch_size": 4}
    trainer = {"max_epochs": 5, "limit_val_batches": 0, "accelerator": "cpu", "num_sanity_val_steps": 0}
    section = {"class_path": "vpt.data.VTABDataModule", "init_args": data}
    config: Config = {"seed_everything": 0, "trainer": trainer, "model": model, "data": section}
    for place, (name, limit) in enumerate([("limit_train_batches", 0.5), ("limit_train_batches", 3), ("max_steps", 6)]):
        limited = merged(config, {f"trainer.{name}": limit})
        _, final = Forecaster()("", limited, Plan({}, seeds=(1,)))
        found = sweep(limited, Plan({}, seeds=(1,)), tmp_path / str(place), serially)
        record = read_record(tmp_path / str(place) / found.runs[1])
        assert (record["epochs"], record["images"]) == (final.epochs, final.images)
        assert final.seconds > 0


def test_failures_are_of_their_own_cell(tmp_path: Path) -> None:
    from vpt.experiments.sweep import sweeps

    def engine(trials: Any, root: Path) -> Any:
        good = {"metrics": {"val/acc": 0.5, "test/acc": 0.5}, "epochs": 1, "seconds": 1.0, "images": 1}
        return {t.name: Failure(f"of {t.name[0]}") if t.name[0] in "ab" else good for t in trials}

    config = {"trainer": {"max_epochs": 9}, "model": {}, "data": {}}
    plans = {name: Plan({"model.x": [1, 2, 3]}, seeds=(1,), halving=2, widen=1) for name in "abc"}
    found = sweeps(dict.fromkeys("abc", config), plans, tmp_path, engine)
    assert [each.reason[-4:] for each in (found["a"], found["b"]) if isinstance(each, Failure)] == ["of a", "of b"]
    assert not isinstance(found["c"], Failure)
    assert found["c"].mean == 0.5
