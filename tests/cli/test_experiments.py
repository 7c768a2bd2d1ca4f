"""Experiments of many runs, from the command line, on the digits and the shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.fakes import make_task

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
    assert "images/s a trial" in answer.out
    assert "4/4" not in answer.err
    assert "2/2 test/seed=2" in answer.err
    stored = json.loads(Path("out/sweep.json").read_text())
    assert set(stored["tests"]) == {"1", "2"}
    assert "out is not empty" in vpt("sweep", *TINY, "--grid", "grid.yaml", *FLAGS).sentence
    again = vpt("sweep", *TINY, "--grid", "grid.yaml", *FLAGS, "--resume")
    assert again.status == 0, again.err
    assert again.out.replace(" ", "") == answer.out.replace(" ", "")


def test_a_wrong_config_is_refused_before_anything_runs(vpt: Vpt) -> None:
    Path("grid.yaml").write_text("grid: {model.base_lr: [0.01, 0.04]}\n")
    assert "num_classes is 3" in vpt("sweep", *TINY, "--model.num_classes", "3", "--grid", "grid.yaml", *FLAGS).sentence
    assert "--grid FILE" in vpt("sweep", *TINY, *FLAGS).sentence
    grid = str(CONFIGS / "sweep" / "rates.yaml")
    sentence = vpt("sweep", *TINY, "--model.warmup", "2", "--grid", grid, "--serial", "--out", "bad").sentence
    assert sentence.startswith("No trial gave a validation accuracy: warmup lies in [0, 1)")
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
        config = yaml.safe_load(Path(f"out/{name}/shared/test/seed=1/config.yaml").read_text())
        assert config["model"]["init_args"]["num_tokens"] == 2
        assert config["data"]["init_args"]["batch_size"] == 8  # the flag
    Path("other").mkdir()
    Path("other/warm.yaml").write_text("data: {class_path: DigitsDataModule}\n")
    same = vpt("pretrain", *TINY, "--tasks", "warm.yaml", "other/warm.yaml", *FLAGS, "--out", "twice").sentence
    assert "one file name" in same
    runs = [f"out/{name}/alone/test/seed=1" for name in ("warm", "cold")]
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
    task = [*DEMO[:1], str(CONFIGS / "vtab" / "caltech101.yaml"), "--model.weights", "random"]  # its data are not here
    answer = vpt("profile", *task, "--classes", "102", "--batch", "1", "--rounds", "1")
    assert answer.status == 0, answer.err
    assert "42,726 of" in answer.out
    assert "has no val/acc" in vpt("profile", "--run", str(trained.folder)).sentence  # it trained on val200
    assert vpt("fit", *DEMO, *SMALL, *QUICK, "--data.train=train800").status == 0
    answer = vpt("profile", "--run", "runs/digits/vpt_deep/version_0")
    assert answer.status == 0, answer.err
    assert "95 % of its best val" in answer.out
    assert "needs a config" in vpt("profile").sentence


def test_a_run_repeats_bit_for_bit_and_says_when_it_does_not(vpt: Vpt, trained: Run, tmp_path: Path) -> None:
    answer = vpt("rerun", str(trained.folder))
    assert answer.status == 0, answer.err
    assert "equal, bit for bit" in answer.out
    other = tmp_path / "other"
    other.mkdir()
    config = yaml.safe_load((trained.folder / "config.yaml").read_text())
    (other / "config.yaml").write_text(yaml.safe_dump(config | {"seed_everything": 5}))
    (other / "run.json").write_text((trained.folder / "run.json").read_text())
    answer = vpt("rerun", str(other))
    assert "did not come out equal (nothing that is recorded differs)" in answer.sentence
    assert "is no run: it has no config.yaml" in vpt("rerun", str(tmp_path)).sentence
