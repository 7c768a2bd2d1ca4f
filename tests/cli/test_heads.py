"""A head that is fitted in one pass leaves the files, records and figures of any other probe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vpt.models.delta_format import read_calibration, read_delta
from vpt.robustness import RobustnessResult

from .conftest import CONFIGS, DEMO, QUICK, SMALL, Run, Vpt

FEW = ["--data.batch_size=32", *(f"--trainer.limit_{stage}_batches=2" for stage in ("train", "val", "test"))]


def fitted(vpt: Vpt, method: str, name: str, *flags: str) -> Run:
    config = str(CONFIGS / "method" / f"{method}.yaml")
    answer = vpt("fit", *DEMO, "-c", config, "--data.train=train800", *FEW, *QUICK, *flags)
    assert answer.status == 0, answer.err
    return Run(Path(f"runs/digits/{name}/version_0").resolve())


def test_nearest_neighbours_do_what_a_trained_head_does(vpt: Vpt) -> None:
    run = fitted(vpt, "knn", "knn", "--model.k", "[1,5,100]")
    delta, data = str(run.folder / "delta.safetensors"), ["--data", str(CONFIGS / "demo.yaml")]
    assert run.record["parameters"]["trainable"] == 0
    assert run.record["metrics"]["train/k"] in (1, 5, 100)
    header, tensors = read_delta(delta)
    assert header["head"] == {"kind": "knn", "images": 64, "k": run.record["metrics"]["train/k"], "temperature": 0.07}
    assert tensors["head.features"].shape == (64, 192)
    for command in (
        ("test", *run.config, "--ckpt_path", run.checkpoint, *SMALL),
        ("validate", *run.config, "--ckpt_path", run.checkpoint, *FEW),
        ("predict", *run.config, "--ckpt_path", run.checkpoint, *FEW, "--trainer.limit_predict_batches=1"),
        ("calibrate", "--delta", delta, "--out", "calibrated.safetensors"),
        ("robustness", "run", "--delta", delta, *data, "--max-images=10", "--severities", "--out", "measured"),
        ("runs", "runs"),
        ("report", "runs", "--out", "report"),
    ):
        answer = vpt(*command)
        assert answer.status == 0, answer.err
    assert "test/acc" in run.record["metrics"]
    assert read_calibration("calibrated.safetensors") is not None
    assert {row.alpha for row in RobustnessResult.read(Path("measured")).rows} == {1.0}
    again = vpt("robustness", "run", "--delta", delta, *data, "--anchor", delta, "--out", "swept")
    assert "is of nearest neighbours, which have no weights: leave out the anchor" in again.sentence


def test_a_resumed_run_of_nearest_neighbours_ends_as_one_that_was_not_interrupted(vpt: Vpt) -> None:
    first = fitted(vpt, "knn", "knn", "--model.k=5")
    twice = "--trainer.max_epochs=2"
    answer = vpt("fit", *first.config, "--ckpt_path", first.checkpoint, twice)
    assert answer.status == 0, answer.err
    fitted(vpt, "knn", "knn", "--model.k=5", twice)
    found = [read_delta(first.folder.parent / f"version_{n}" / "delta.safetensors") for n in range(3)]
    assert found[1][0]["head"] == found[2][0]["head"]
    assert all(torch.equal(tensor, found[2][1][key]) for key, tensor in found[1][1].items())
    assert not torch.equal(found[0][1]["head.labels"], found[1][1]["head.labels"])  # other images were drawn


@pytest.mark.parametrize(("method", "name"), [("linear_ridge", "ridge"), ("linear_ncm", "ncm")])
def test_a_solved_head_does_what_a_trained_one_does(vpt: Vpt, method: str, name: str) -> None:
    run, anchor = fitted(vpt, method, name), fitted(vpt, "linear", "linear")
    delta, data = str(run.folder / "delta.safetensors"), ["--data", str(CONFIGS / "demo.yaml")]
    assert run.record["hyperparameters"]["solver"] == name
    assert run.record["steps"] == 1  # of the optimiser that moves nothing, when the epoch is complete
    sweep = ["--max-images=10", "--severities", "--alphas", "0", "0.5", "1", "--out", "swept"]
    sweep += ["--anchor", str(anchor.folder / "delta.safetensors")]
    for command in (
        ("test", *run.config, "--ckpt_path", run.checkpoint, *SMALL),
        ("export", "--delta", delta, "--format", "torch", "--out", "model.pt2"),
        ("robustness", "run", "--delta", delta, *data, *sweep),
    ):
        answer = vpt(*command)
        assert answer.status == 0, answer.err
    assert "test/acc" in run.record["metrics"]
    result = RobustnessResult.read(Path("swept"))
    assert result.protocol["way"] == "head"
    assert {row.alpha for row in result.rows} == {0.0, 0.5, 1.0}
    zero, one = (record.logits for record in result.ends(result.rows[0]))
    assert not np.allclose(zero, one)
