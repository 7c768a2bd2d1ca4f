from __future__ import annotations

import csv
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from tests.fakes import make_folder, make_task
from vpt.errors import DataError
from vpt.models.delta_format import read_delta
from vpt.tasks import PromptTuning

from .conftest import CONFIGS, DEMO, QUICK, SMALL, Answer, Run, Vpt

METHODS = sorted((CONFIGS / "method").glob("*.yaml"))
BACKBONES = set((CONFIGS / "backbone").glob("*.yaml"))
# in test_vtab.py and test_suites.py
SUITES = {path for suite in ("vtab", "fgvc", "imagenet") for path in (CONFIGS / suite).glob("*.yaml")}
SWEEPS = set((CONFIGS / "sweep").glob("*.yaml"))  # in tests/experiments/test_sweep.py
SEGMENTATION = set((CONFIGS / "segmentation").glob("*.yaml"))  # in test_segmentation.py
TASKS = sorted(set(CONFIGS.rglob("*.yaml")) - set(METHODS) - BACKBONES - SUITES - SWEEPS - SEGMENTATION)


def _fast(vpt: Vpt, *args: str) -> Answer:
    return vpt("fit", *args, "--trainer.fast_dev_run=true", "--data.batch_size=2")


@pytest.mark.parametrize("config", TASKS, ids=lambda path: path.stem)
def test_every_shipped_config_trains(vpt: Vpt, tmp_path: Path, config: Path) -> None:
    data = yaml.safe_load(config.read_text())["data"]
    overrides: list[str] = []
    if data["class_path"] == "VTABDataModule":
        make_task(tmp_path / "data" / data["init_args"]["task"])
        overrides = ["--data.root", str(tmp_path / "data"), "--model.weights", "random"]
    if data["class_path"] == "FolderDataModule":
        make_folder(tmp_path / "my_images", {"train": 5, "test": 1})  # the root that the config names
        overrides = ["--model.weights", "random"]
    answer = _fast(vpt, "-c", str(config), *overrides)
    assert answer.status == 0, answer.err


@pytest.mark.parametrize("method", METHODS, ids=lambda path: path.stem)
def test_every_method_lies_over_the_demo_from_fit_to_test(vpt: Vpt, method: Path) -> None:
    answer = vpt("fit", *DEMO, "-c", str(method), "--data.train=train800", *SMALL, *QUICK)
    assert answer.status == 0, answer.err
    (folder,) = Path("runs").glob("digits/*/version_0")
    run = Run(folder.resolve())
    answer = vpt("test", *run.config, "--ckpt_path", run.checkpoint, *SMALL)
    assert answer.status == 0, answer.err
    assert {"val/acc", "test/acc"} <= run.record["metrics"].keys()


@pytest.mark.parametrize("method", ["vpt_deep", "full", "linear_lbfgs"])  # the ways to train: deltas, all, a solver
def test_a_dry_run_needs_no_more_than_a_batch(vpt: Vpt, method: str) -> None:
    assert _fast(vpt, *DEMO, "-c", str(CONFIGS / "method" / f"{method}.yaml")).status == 0


def test_a_run_folder_is_complete_and_its_config_explicit(trained: Run) -> None:
    assert {path.name for path in trained.folder.iterdir()} >= {"config.yaml", "run.json", "delta.safetensors"}
    assert [path.name for path in (trained.folder / "checkpoints").iterdir()] == ["last.ckpt"]
    config = yaml.safe_load((trained.folder / "config.yaml").read_text())
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert (model["num_classes"], model["image_size"], model["normalization"]) == (10, 64, "weights")
    assert data["image_size"] == 64
    assert read_delta(trained.folder / "delta.safetensors")[0]["class_names"] == [str(digit) for digit in range(10)]


def test_test_and_validate_add_their_metrics_to_the_run_that_is_measured(vpt: Vpt, trained: Run) -> None:
    for command in ("validate", "test"):
        answer = vpt(command, *trained.config, "--ckpt_path", trained.checkpoint, *SMALL)
        assert answer.status == 0, answer.err
    assert {"trained/acc", "test/acc"} <= trained.record["metrics"].keys()  # on all 1,000, the 200 of validation too
    assert "val/acc" not in trained.record["metrics"]
    assert trained.record["status"] == "finished"
    assert not Path("runs").exists()


def test_a_model_is_tested_on_photos_of_some_of_its_classes(vpt: Vpt, trained: Run, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("7", "3"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for number, shade in enumerate((40, 200) if split == "train" else (90, 120, 160)):
                Image.new("RGB", (64, 64), (shade, number, int(name))).save(
                    tmp_path / "photos" / split / name / f"{number}.png"
                )
    config = yaml.safe_load((trained.folder / "config.yaml").read_text())
    config["data"] = {
        "class_path": "FolderDataModule",
        "init_args": {"root": str(tmp_path / "photos"), "image_size": 64},
    }
    (tmp_path / "photos.yaml").write_text(yaml.safe_dump({key: config[key] for key in ("model", "data")}))
    answer = vpt("test", "-c", str(tmp_path / "photos.yaml"), "--ckpt_path", trained.checkpoint)
    assert answer.status == 0, answer.err
    (record,) = trained.folder.glob("test-photos-*.json")
    assert json.loads(record.read_text())["read"]["test"] == 6
    (tmp_path / "photos" / "test" / "7").rename(tmp_path / "photos" / "test" / "seven")
    (tmp_path / "photos" / "train" / "7").rename(tmp_path / "photos" / "train" / "seven")
    answer = vpt("test", "-c", str(tmp_path / "photos.yaml"), "--ckpt_path", trained.checkpoint)
    assert answer.status == 1
    assert "does not know class 'seven' of photos" in answer.sentence


def test_three_lines_of_yaml_and_a_flag_train_on_few_shots_of_your_own_images(vpt: Vpt, tmp_path: Path) -> None:
    make_folder(tmp_path / "pets", {"train": 5, "test": 2})
    Path("data.yaml").write_text("data:\n  class_path: FolderDataModule\n  init_args: {root: pets}\n")
    answer = vpt("fit", *DEMO, "-c", "data.yaml", *QUICK, "--data.shots=3")
    assert answer.status == 0, answer.err
    run = Run(Path("runs/pets/vpt_deep/version_0"))
    assert run.record["data"]["counts"] == {"train": 9, "val": 3, "test": 6}
    assert run.record["data"]["subset"]["shots"] == 3
    assert len(run.record["data"]["subset"]["sha256"]) == 64
    config = yaml.safe_load((run.folder / "config.yaml").read_text())["data"]["init_args"]
    assert (config["shots"], config["preset"], config["root"]) == (3, "square", "pets")
    assert read_delta(run.folder / "delta.safetensors")[0]["preset"]["name"] == "square"
    assert "shots is 5, but class 'cat' has 4" in vpt("fit", *DEMO, "-c", "data.yaml", "--data.shots=5").sentence
    assert vpt("test", *run.config, "--ckpt_path", run.checkpoint).status == 0
    os.rename(b"pets/test/cat/0.jpg", b"pets/test/cat/\xe4.jpg")  # noqa: PTH104  # no text in UTF-8
    assert vpt("predict", *run.config, "--ckpt_path", run.checkpoint).status == 0
    assert b",test/cat/\xe4.jpg," in (run.folder / "predictions.csv").read_bytes()


def test_predict_writes_a_line_per_image_of_some_apart(vpt: Vpt, trained: Run) -> None:
    def predict(*flags: str) -> Path:
        answer = vpt("predict", *trained.config, "--ckpt_path", trained.checkpoint, "--data.batch_size=8", *flags)
        assert answer.status == 0, answer.err
        return Path(answer.out.splitlines()[-1].removeprefix("written to "))

    some, whole = predict("--trainer.limit_predict_batches=2"), predict()
    assert some == trained.folder.resolve() / "predictions-partial.csv"
    assert whole == trained.folder.resolve() / "predictions.csv"
    lines = whole.read_text().splitlines()
    rows = list(csv.DictReader(lines))
    assert some.read_text().splitlines() == lines[:17]
    assert [int(row["index"]) for row in rows] == list(range(trained.record["data"]["counts"]["test"]))
    assert all(row["path"].startswith("digits/") and row["predicted"] in "0123456789" for row in rows)
    assert all(0.1 <= float(row["probability"]) <= 1 for row in rows)


def test_predictions_of_another_model_data_or_precision_are_not_replaced(
    vpt: Vpt, trained: Run, tmp_path: Path
) -> None:
    shutil.copytree(trained.folder, run := tmp_path / "run", ignore=shutil.ignore_patterns("predictions*"))
    config, checkpoint = ["-c", str(run / "config.yaml")], run / "checkpoints" / "last.ckpt"
    command = ["predict", *config, "--ckpt_path", str(checkpoint), "--trainer.limit_predict_batches=1"]
    assert vpt(*command).status == 0
    written = {path.name: path.read_bytes() for path in run.glob("predictions*")}
    assert written.keys() == {"predictions-partial.csv", "predictions-partial.json"}
    assert vpt(*command).status == 0  # of the same: the same
    refused = f"{run.resolve() / 'predictions-partial.csv'} is of another model, other data or precision: move it"
    for other in ("--data.preset=timm", "--data.test=val200", "--trainer.precision=bf16-mixed"):
        assert refused in vpt(*command, other).sentence
    state = torch.load(checkpoint, weights_only=True)
    state["state_dict"]["model.head.bias"].data += 1
    torch.save(state, checkpoint)
    assert refused in vpt(*command).sentence
    assert {path.name: path.read_bytes() for path in run.glob("predictions*")} == written


def test_an_interrupted_prediction_leaves_no_file(vpt: Vpt, trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(trained.folder.glob("*predictions*"))

    answer = PromptTuning.predict_step

    def stop(self: PromptTuning, batch: Any, batch_idx: int) -> Any:
        if batch_idx:
            raise DataError("the disk is gone")
        return answer(self, batch, batch_idx)

    monkeypatch.setattr(PromptTuning, "predict_step", stop)
    command = ["predict", *trained.config, "--ckpt_path", trained.checkpoint, "--trainer.limit_predict_batches=3"]
    assert vpt(*command).sentence == "the disk is gone"
    assert sorted(trained.folder.glob("*predictions*")) == before


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_an_untrained_model_is_measured_only_to_try_the_command(vpt: Vpt, command: str) -> None:
    assert "needs a trained model: give --ckpt_path" in vpt(command, *DEMO).sentence
    assert vpt(command, *DEMO, "--data.batch_size=2", "--trainer.fast_dev_run=true").status == 0
    assert not Path("runs").exists()


@pytest.mark.parametrize("command", ["fit", "test", "predict"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("last", "--ckpt_path last says of no run"),
        ("best", "--ckpt_path best says of no run"),
        ("a" * 5000, "No checkpoint aaa"),
        ("tensor", "tensor.ckpt is no checkpoint of a run"),
        ("delta", "delta.safetensors is no checkpoint of a run"),
    ],
)
def test_what_is_no_checkpoint_is_refused(
    vpt: Vpt, trained: Run, tmp_path: Path, command: str, given: str, message: str
) -> None:
    torch.save(torch.zeros(2), tmp_path / "tensor.ckpt")
    path = {"tensor": tmp_path / "tensor.ckpt", "delta": trained.folder / "delta.safetensors"}.get(given, given)
    assert message in vpt(command, *DEMO, "--ckpt_path", str(path)).sentence
    assert not Path("runs").exists()


def test_resuming_continues_where_the_checkpoint_stopped(vpt: Vpt, trained: Run) -> None:
    answer = vpt("fit", *DEMO, *SMALL, *QUICK, "--trainer.max_epochs=2", "--ckpt_path", trained.checkpoint)
    assert f"goes on from {trained.checkpoint} as a new run in runs/digits/vpt_deep/version_0" in answer.out
    assert answer.status == 0, answer.err
    run = Run(Path("runs/digits/vpt_deep/version_0"))
    assert torch.load(run.checkpoint, weights_only=True)["global_step"] == 4


@pytest.mark.parametrize("flag", ["--data.batch_size=4", "--seed_everything=9", "--data.train=train800"])
def test_training_goes_on_with_what_it_began_with(vpt: Vpt, trained: Run, flag: str) -> None:
    flags = (*DEMO, *SMALL, *QUICK, "--trainer.max_epochs=2", flag)
    answer = vpt("fit", *flags, "--ckpt_path", trained.checkpoint)
    assert answer.status == 1
    assert "Training cannot go on from another run's checkpoint" in answer.sentence


def test_training_does_not_go_on_with_other_class_names(vpt: Vpt, tmp_path: Path) -> None:
    make_folder(tmp_path / "pets", {"train": 5, "test": 2})
    flags = [*DEMO, "--data", "FolderDataModule", "--data.root", "pets", "--data.batch_size", "4"]
    assert vpt("fit", *flags, *QUICK).status == 0
    checkpoint = Run(Path("runs/pets/vpt_deep/version_0")).checkpoint
    for split in ("train", "test"):
        (tmp_path / "pets" / split / "cat").rename(tmp_path / "pets" / split / "lion")
    answer = vpt("fit", *flags, *QUICK, "--trainer.max_epochs=2", "--ckpt_path", checkpoint)
    assert "other classes than those of pets" in answer.sentence


def test_an_interrupted_run_keeps_its_last_whole_epoch(vpt: Vpt, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(task: PromptTuning) -> None:
        if task.current_epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(PromptTuning, "on_train_epoch_start", interrupt)
    answer = vpt("fit", *DEMO, *SMALL, *QUICK, "--trainer.max_epochs=3")
    assert answer.status == 130
    run = Run(Path("runs/digits/vpt_deep/version_0"))
    checkpoint = torch.load(run.checkpoint, weights_only=True)
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (0, 2)
    assert f"To go on: vpt fit -c {run.config[1]} --ckpt_path {run.checkpoint}" in answer.err


def test_print_config_composes_files_and_flags(vpt: Vpt) -> None:
    answer = vpt("fit", *DEMO, "-c", str(CONFIGS / "method" / "linear.yaml"), "--model.base_lr=0.5", "--print_config")
    config = yaml.safe_load(answer.out)
    assert answer.status == 0
    assert config["model"]["class_path"].endswith("LinearProbe")
    assert config["model"]["init_args"]["base_lr"] == 0.5
    assert config["data"]["class_path"].endswith("DigitsDataModule")


def test_the_users_logger_and_flags_win(vpt: Vpt) -> None:
    answer = vpt("fit", *DEMO, *SMALL, *QUICK, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=mine",
                 "--trainer.enable_checkpointing=false")  # fmt: skip
    assert answer.status == 0, answer.err
    assert Path("mine/lightning_logs/version_0/metrics.csv").is_file()
    assert not list(Path().rglob("*.ckpt"))


def test_off_a_terminal_every_epoch_says_what_it_gave(vpt: Vpt) -> None:
    options = ["--data.train=train800", "--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=2"]
    lines = [line for line in vpt("fit", *DEMO, *SMALL, *QUICK, *options).out.splitlines() if line.startswith("epoch ")]
    assert re.fullmatch(r"epoch 1 of 2: train/loss [\d.]+, [\d,]+ images/s", lines[0])
    told = r"train/loss [\d.]+, val/loss [\d.]+, val/acc [\d.]+, val/mean_per_class [\d.]+, [\d,]+ images/s"
    assert re.fullmatch(f"epoch 2 of 2: {told}", lines[1])
    assert len(lines) == 2


def test_a_damaged_record_is_named_before_anything_is_measured(
    vpt: Vpt, trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(trained.folder, run.folder)
    (run.folder / "run.json").write_text("{")
    for command, step in (("test", "test_step"), ("validate", "validation_step")):
        monkeypatch.setattr(f"vpt.tasks.PromptTuning.{step}", lambda *_: pytest.fail("measured"))
        assert "run/run.json cannot be read" in vpt(command, *run.config, "--ckpt_path", run.checkpoint).sentence
    assert (run.folder / "run.json").read_text() == "{"


def test_the_console_is_free_of_known_noise(vpt: Vpt) -> None:
    answer = _fast(vpt, *DEMO)
    noise = ("litlogger", "litmodels", "many workers", "eval mode at the start", "TPU", "logging interval")
    assert not [word for word in noise if word in answer.out + answer.err]


@pytest.mark.slow
def test_the_real_task_trains_as_the_readme_says(vpt: Vpt, real_data: Path) -> None:
    weights = real_data / "weights" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
    answer = vpt("fit", "-c", str(CONFIGS / "vtab" / "caltech101.yaml"), "--data.root", str(real_data),
                 "--model.weights", str(weights), *QUICK, "--trainer.limit_train_batches=2")  # fmt: skip
    assert answer.status == 0, answer.err
    delta = Path("runs/caltech101/vpt_deep/version_0/delta.safetensors")
    assert delta.stat().st_size < 400_000
