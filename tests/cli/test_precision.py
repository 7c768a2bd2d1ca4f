"""`--trainer.precision auto`: chosen once, written down, and kept by whatever follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from vpt.experiments.precision import Speed

from .conftest import DEMO, QUICK, SMALL, Run, Vpt

AUTO = ["--trainer.precision", "auto", "--trainer.accelerator", "cpu"]


def test_the_choice_is_recorded_and_neither_resuming_nor_testing_measures_anew(
    vpt: Vpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def measure(model: Any, batch: int, device: Any) -> Speed:
        asked.append(batch)
        return Speed(1.83, 4)

    monkeypatch.setattr("vpt.cli.precision.measure", measure)
    answer = vpt("fit", *DEMO, "--data.train=train800", *SMALL, *QUICK, *AUTO, "--model.micro_batch", "1")
    assert answer.status == 0, answer.err
    assert "precision bf16-mixed: a step in bf16-mixed is 1.83 times as fast as in 32-true (batch 4, cpu" in answer.out
    assert asked == [1]
    (folder,) = Path("runs").glob("digits/*/version_0")
    run = Run(folder.resolve())
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["precision"] == "bf16-mixed"
    measured = {"speed_up": 1.83, "images": 4}
    assert (run.record["precision"], run.record["precision_measured"]) == ("bf16-mixed", measured)
    again = ["--ckpt_path", run.checkpoint, "--trainer.max_epochs", "2"]
    for precision in ([], AUTO):  # the config names it by now
        answer = vpt("fit", *run.config, *again, *precision)
        assert answer.status == 0, answer.err
    for folder in Path("runs").glob("digits/*/version_[12]"):
        record = Run(folder.resolve()).record
        assert (record["precision"], record["precision_measured"]) == ("bf16-mixed", measured)
    answer = vpt("test", *run.config, "--ckpt_path", run.checkpoint, *AUTO)
    assert answer.status == 0, answer.err
    assert run.record["evaluated"]["test"]["precision"] == "bf16-mixed"
    assert asked == [1]


def test_where_bfloat16_is_not_faster_training_is_in_single_precision(
    vpt: Vpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vpt.cli.precision.measure", lambda *_: Speed(0.7, 2))
    answer = vpt("fit", *DEMO, "--data.train=train800", *SMALL, *QUICK, *AUTO)
    assert answer.status == 0, answer.err
    (folder,) = Path("runs").glob("digits/*/version_0")
    assert Run(folder.resolve()).record["precision"] == "32-true"
