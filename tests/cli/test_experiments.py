"""Experiments of many runs, from the command line, on the digits and the shapes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.fakes import make_task
from vpt.cli.commands.experiments import read_plan
from vpt.experiments.sweep import SEEDS

from .conftest import CONFIGS, DEMO, QUICK, SMALL, Run, Vpt

FLAGS = ["--serial", "--out", "out"]
TINY = [*DEMO, *SMALL, *QUICK, "--model.num_tokens", "2"]


@pytest.fixture(autouse=True)
def _nothing_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vpt.models.feature_cache._shared", None)


def test_sweep_prints_the_table_and_refuses_to_write_over_it(vpt: Vpt) -> None:
    Path("grid.yaml").write_text("grid: {model.base_lr: [0.01, 0.04]}\nseeds: [1, 2]\nchoose: {data.train: train800}\n")
    answer = vpt("sweep", *TINY, "--grid", "grid.yaml", *FLAGS)
    assert answer.status == 0, answer.err
    assert "mean ± std over seeds" in answer.out
    assert "images/s per trial" in answer.out
    assert "4/4" not in answer.err
    assert "2/2 test/seed=2,base_lr=0.0" in answer.err
    stored = json.loads(Path("out/sweep.json").read_text())
    assert set(stored["tests"]) == {"1", "2"}
    assert "out is not empty" in vpt("sweep", *TINY, "--grid", "grid.yaml", *FLAGS).sentence
    again = vpt("sweep", *TINY, "--grid", "grid.yaml", *FLAGS, "--resume")
    assert again.status == 0, again.err
    assert again.out.replace(" ", "") == answer.out.replace(" ", "")


def test_trials_train_together_to_the_same_table(vpt: Vpt) -> None:
    Path("grid.yaml").write_text("grid: {model.base_lr: [0.01, 0.04]}\nseeds: [1, 2]\nchoose: {data.train: train800}\n")
    answers = [
        vpt("sweep", *TINY, "--grid", "grid.yaml", "--serial", "--out", f"{number}/out", "--together", number)
        for number in ("1", "2")
    ]
    assert [answer.status for answer in answers] == [0, 0], answers[1].err
    apart, together = ([line.replace(" ", "") for line in answer.out.splitlines() if "│" in line] for answer in answers)
    assert together == apart
    runs = [sorted(str(path.relative_to(out)) for path in Path(out).rglob("*.safetensors")) for out in ("1", "2")]
    assert runs[0] == runs[1]
    assert len(runs[0]) == 4


def test_every_command_trains_what_fit_trains(vpt: Vpt, tmp_path: Path) -> None:
    """The data have another size of their own than the backbone, which nobody names."""
    make_task(tmp_path / "data" / "warm", per_class=(5, 2, 3))
    data = ["--data=VTABDataModule", "--data.task=warm", "--data.root=data", "--data.batch_size=4"]
    both = ["--data.shots=3", "--data.subset_seed=7", "--seed_everything=7", "--trainer.limit_val_batches=0"]
    given = [*DEMO, *data, *QUICK, "--model.dropout=0.1", *both]
    Path("printed.yaml").write_text(vpt("fit", *given, "--print_config").out)
    Path("grid.yaml").write_text("grid: {model.base_lr: [0.04]}\nseeds: 7\n")
    for args in (given, ["-c", "printed.yaml"]):
        assert vpt("fit", *args).status == 0
    runs = sorted(Path("runs/warm/vpt_deep").iterdir())
    for run in runs:
        assert vpt("test", "-c", f"{run}/config.yaml", "--ckpt_path", f"{run}/checkpoints/last.ckpt").status == 0
    assert vpt("rerun", str(runs[0]), "--out", "rerun").status == 0
    for command in (["sweep", "--grid", "grid.yaml"], ["fewshot", "--shots", "3", "--seeds", "7"]):
        answer = vpt(*command, *given, "--serial", "--out", command[0])
        assert answer.status == 0, answer.err
    experiments = (path for out in ("rerun", "sweep", "fewshot") for path in Path(out).rglob("run.json"))
    records = [json.loads(path.read_text()) for path in [*(run / "run.json" for run in runs), *experiments]]
    assert len(records) == 5
    assert records[0]["data"]["image_size"] == 64
    for record in records:
        assert record | {"seconds": 0} == records[0] | {"seconds": 0}


def test_what_a_trial_would_leave_out_is_refused(vpt: Vpt) -> None:
    flags = [*TINY, "--grid", str(CONFIGS / "sweep" / "rates.yaml"), *FLAGS]
    for given in ("--trainer.fast_dev_run=true", "--trainer.logger=false", "--trainer.barebones=true"):
        assert f"{given.partition('=')[0].removeprefix('--')} is of `vpt fit`" in vpt("sweep", *flags, given).sentence
    assert "--ckpt_path is of `vpt fit`" in vpt("sweep", *flags, "--ckpt_path=x.ckpt").sentence
    assert "give --grid FILE" in vpt("fewshot", *TINY, "--shots", "1", "--halving", "2", *FLAGS).sentence


def test_a_grid_is_halved_unless_it_is_to_be_whole(vpt: Vpt, tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"

    def epochs(searched: str, *flags: str) -> list[str]:
        grid.write_text(f"grid: {{{searched}}}\nchoose: {{data.train: train800}}\nseeds: 1\n")
        answer = vpt("sweep", *TINY, "--grid", str(grid), *FLAGS, "--dry-run", *flags)
        if answer.status:
            return [answer.sentence]
        row = next(line for line in answer.out.splitlines() if line.startswith("│"))
        return [cell.strip() for cell in row.split("│")[1:-1]][1:3]

    rates, eight = "model.base_lr: [0.01, 0.02, 0.04, 0.08]", "--trainer.max_epochs=8"
    # 4 for 2 epochs, 2 for 2 more and 1 for the last four
    assert epochs(rates, eight) == ["4", "16"]
    assert epochs(rates, eight, "--halving", "4") == ["4", "14"], "4 for 2 epochs, 1 for the last six"
    assert epochs(rates, eight, "--halving", "4", "--first-rung", "0.3") == ["4", "32"]
    assert epochs(rates, eight, "--halving", "1") == ["4", "32"]
    assert epochs("trainer.max_epochs: [1, 2]") == ["2", "3"]
    steps = ["--trainer.max_epochs=null", "--trainer.max_steps=2"]
    assert "train the whole grid (--halving 1)" in epochs(rates, *steps)[0]
    assert epochs(rates, *steps, "--halving", "1") == ["4", "4"]


def test_values_of_a_grid_are_read_as_flags_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "grid: {model.base_lr: [1e-3, 1, 1.0, 0.001], model.deep: [true, false], model.weights: [random]}\n"
    Path("grid.yaml").write_text(text + "choose: {data.train: train800}\nseeds: 3\n")
    plan = read_plan(Path("grid.yaml"), DEMO)
    assert plan.grid["model.base_lr"] == [0.001, 1.0, 1.0, 0.001]
    assert all(type(value) is float for value in plan.grid["model.base_lr"])
    assert plan.seeds == (3,)
    assert len(plan.points()) == 4
    Path("deltas.yaml").write_text("model: {class_path: DeltaTuning, init_args: {deltas: [{name: bias}]}}\n")
    Path("grid.yaml").write_text("grid: {model.deltas: [[{name: bias}], [{name: lora, rank: 2}]]}\nseeds: [1, 1, 2]\n")
    plan = read_plan(Path("grid.yaml"), [*DEMO, "-c", "deltas.yaml"])
    assert [point["model.deltas"][0]["name"] for point in plan.points()] == ["bias", "lora"]
    assert plan.seeds == (1, 2)


def test_the_published_grid_has_its_240_points_and_five_seeds() -> None:
    plan = read_plan(CONFIGS / "sweep" / "vpt.yaml", DEMO)
    assert len(plan.points()) == 240
    assert plan.seeds == SEEDS == (42, 44, 82, 100, 800)


@pytest.mark.parametrize(
    ("name", "points"), [("full", 16), ("linear", 40), ("none", 1), ("rates", 3), ("vpt_swin", 160)]
)
def test_every_shipped_grid_is_one(name: str, points: int) -> None:
    found = read_plan(CONFIGS / "sweep" / f"{name}.yaml", DEMO, seeds=[7])
    assert (len(found.points()), found.seeds) == (points, (7,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: [1]", "is no grid file"),
        ("lr: {a: [1]}", "is no grid file"),
        ("grid: {model.base_lr: 0.1}", "model.base_lr needs a list of values to try, got 0.1"),
        ("grid: {model.base_lr: []}", "no value of model.base_lr to try"),
        ("grid: {a: [1]}\nepochs: 3", "is no grid file"),
        ("a: [", "is not YAML"),
        ("grid: {model.base_lr: [much]}", "grid.yaml: model.base_lr: "),
        ("grid: {model.deep: [2]}", "grid.yaml: model.deep: "),
        ("grid: {model.base_lrr: [1]}", "'base_lrr' is not"),
        ("grid: {base_lr: [1]}", "'base_lr' is no key of a config"),
        ("grid: {model.class_path: [LinearProbe]}", "'model.class_path' is no key of a config"),
        ("grid: {model.base_lr: [1]}\nchoose: {data.trains: a}", "'trains' is not"),
        ("grid: {model.base_lr: [1]}\nchoose: [a]", "grid, choose and retrain have a line for each key"),
        ("grid: {model.base_lr: [1]}\nseeds: []", "seeds are one or more whole numbers"),
        ("grid: {model.base_lr: [1]}\nseeds: [a]", "seeds are one or more whole numbers"),
        ("grid: {model.base_lr: [1], model.base_lr: [2]}", "The key 'model.base_lr' is given twice"),
    ],
)
def test_a_wrong_grid_file_is_refused(vpt: Vpt, text: str, message: str) -> None:
    Path("grid.yaml").write_text(text)
    assert message in vpt("sweep", *TINY, "--grid", "grid.yaml", *FLAGS).sentence
    assert not Path("out").exists()


def test_a_key_given_twice_is_an_error_wherever_yaml_is_read(vpt: Vpt) -> None:
    Path("twice.yaml").write_text("model: {init_args: {num_tokens: 3, num_tokens: 4}}\n")
    Path("data.yaml").write_text("data: {class_path: DigitsDataModule, class_path: FolderDataModule}\n")
    twice = "The key '{}' is given twice"
    assert twice.format("num_tokens") in vpt("fit", *DEMO, "-c", "twice.yaml").sentence
    assert twice.format("train") in vpt("fit", *DEMO, "--data.init_args={train: val200, train: train800}").sentence
    assert twice.format("class_path") in vpt("pretrain", *TINY, "--tasks", "data.yaml", "data.yaml", *FLAGS).sentence
    assert twice.format("rank") in vpt("combine", *TINY, "--deltas", "{name: lora, rank: 1, rank: 2}", *FLAGS).sentence


def test_a_wrong_config_is_refused_before_anything_runs(vpt: Vpt) -> None:
    Path("grid.yaml").write_text("grid: {model.base_lr: [0.01, 0.04]}\n")
    assert "num_classes is 3" in vpt("sweep", *TINY, "--model.num_classes", "3", "--grid", "grid.yaml", *FLAGS).sentence
    assert "--grid FILE" in vpt("sweep", *TINY, *FLAGS).sentence
    grid = str(CONFIGS / "sweep" / "rates.yaml")
    sentence = vpt("sweep", *TINY, "--model.warmup", "2", "--grid", grid, "--serial", "--out", "bad").sentence
    assert sentence.startswith("No trial gave a validation score: warmup and momentum lie in [0, 1)")
    assert not Path("out").exists()


def test_few_shots_combinations_and_backbones(vpt: Vpt) -> None:
    answer = vpt("fewshot", *TINY, "--shots", "1", "2", "--seeds", "1", *FLAGS)
    assert answer.status == 0, answer.err
    assert "shots=2" in answer.out
    answer = vpt(
        "combine",
        *TINY,
        "--deltas",
        "bias",
        "{name: prompt, num_tokens: 2}",
        "--seeds",
        "1",
        "--serial",
        "--out",
        "all",
    )
    assert answer.status == 0, answer.err
    assert all(name in answer.out for name in ("none", "bias", "prompt", "bias+prompt"))
    names = ["vit_nano_patch8_64", "swin_nano_patch4_window8_64"]
    answer = vpt("scale", *TINY, "--backbones", *names, "--seeds", "1", "--serial", "--out", "scale")
    assert answer.status == 0, answer.err
    assert all(name in answer.out for name in names)
    assert "needs --deltas" in vpt("combine", *TINY, "--serial", "--out", "none").sentence


def test_shared_pretraining_and_transfer(vpt: Vpt) -> None:
    for seed, name in enumerate(("warm", "cold")):
        make_task(Path("data") / name, per_class=(4, 2, 11), seed=seed)
        data = f"data: {{class_path: VTABDataModule, init_args: {{task: {name}, root: data, batch_size: 3}}}}\n"
        Path(f"{name}.yaml").write_text(data + "model: {init_args: {num_tokens: 50}}\n")  # its model does not count
    given = ["--data.batch_size=8", "--data.image_size=64", "--seeds", "1"]
    answer = vpt("pretrain", *TINY, *given, "--tasks", "warm.yaml", "cold.yaml", *FLAGS)
    assert answer.status == 0, answer.err
    assert "cold/shared" in answer.out
    for name in ("warm", "cold"):
        (file,) = Path("out", name, "shared", "test").glob("seed=1-*/config.yaml")
        config = yaml.safe_load(file.read_text())
        assert config["model"]["init_args"]["num_tokens"] == 2
        assert config["data"]["init_args"]["batch_size"] == 8  # the flag
    Path("other").mkdir()
    Path("other/warm.yaml").write_text("data: {class_path: DigitsDataModule}\n")
    same = vpt("pretrain", *TINY, "--tasks", "warm.yaml", "other/warm.yaml", *FLAGS, "--out", "twice").sentence
    assert "one file name" in same
    runs = [str(path) for name in ("warm", "cold") for path in Path("out", name, "alone", "test").iterdir()]
    sentence = vpt("transfer", *runs, "--serial", "--out", "transfer").sentence
    assert "was tested on 16 of 33 images: test it on all of them" in sentence  # SMALL has two batches
    assert "unrecognized arguments: --model.x" in vpt("transfer", *runs, "--serial", "--out", "t", "--model.x").sentence


def test_report_of_two_runs(vpt: Vpt, trained: Run) -> None:
    answer = vpt("test", *trained.config, "--ckpt_path", trained.checkpoint, *SMALL)
    assert answer.status == 0, answer.err
    answer = vpt("report", str(trained.folder), "--out", "report")
    assert answer.status == 0, answer.err
    assert {path.name for path in Path("report").iterdir()} == {
        f"report.{kind}" for kind in ("json", "md", "csv", "tex", "html")
    }
    page = Path("report/report.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    values = json.loads(Path("report/report.json").read_text())
    shown = f"{100 * values['methods'][0]['numbers']['digits']['mean']:.1f}"
    assert f">{shown}<" in page
    assert shown in answer.out


def test_profile_of_a_config_and_of_a_run(vpt: Vpt, trained: Run) -> None:
    answer = vpt("profile", *DEMO, "--batch", "2", "--rounds", "1", "--json")
    assert answer.status == 0, answer.err
    values = json.loads(answer.out)
    assert values["trainable"] == values["formula"] == 13_450
    task = [*DEMO[:1], str(CONFIGS / "vtab" / "caltech101.yaml")]  # neither its data nor its weights are here
    answer = vpt("profile", *task, "--classes", "102", "--batch", "1", "--rounds", "1")
    assert answer.status == 0, answer.err
    assert "42,726 of" in answer.out
    assert "has no val/acc" in vpt("profile", "--run", str(trained.folder)).sentence  # it trained on val200
    assert vpt("fit", *DEMO, *SMALL, *QUICK, "--data.train=train800").status == 0
    answer = vpt("profile", "--run", "runs/digits/vpt_deep/version_0")
    assert answer.status == 0, answer.err
    assert "95 % of best val" in answer.out
    assert "needs a config" in vpt("profile").sentence


def test_a_run_repeats_bit_for_bit_and_says_when_it_does_not(vpt: Vpt, trained: Run, tmp_path: Path) -> None:
    answer = vpt("rerun", str(trained.folder))
    assert answer.status == 0, answer.err
    assert "equal, bit for bit" in answer.out
    assert all(re.search(f"^{key} +[0-9.]+ +[0-9.]+ +equal$", answer.out, re.M) for key in ("train/loss",))
    other = tmp_path / "other"
    other.mkdir()
    config = yaml.safe_load((trained.folder / "config.yaml").read_text())
    (other / "config.yaml").write_text(yaml.safe_dump(config | {"seed_everything": 5}))
    (other / "run.json").write_text((trained.folder / "run.json").read_text())
    answer = vpt("rerun", str(other))
    assert "did not come out equal (seed: 0 then, 5 now; data seed: 0 then, 5 now)" in answer.sentence
    record = json.loads((trained.folder / "run.json").read_text())
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    (other / "run.json").write_text(json.dumps(record | {"metrics": record["metrics"] | {"val/other": 0.5}}))
    assert "val/other             of one of them only" in vpt("rerun", str(other)).out
    (other / "run.json").write_text(json.dumps(record | {"metrics": {"val/other": 0.5}}))
    assert "have no metric in common: there is nothing to compare" in vpt("rerun", str(other)).sentence
    assert "is no run: it has no config.yaml" in vpt("rerun", str(tmp_path)).sentence
