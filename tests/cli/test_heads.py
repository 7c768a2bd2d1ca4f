"""A head that is fitted in one pass leaves the files, records and figures of any other probe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vpt.robustness import RobustnessResult

from .conftest import CONFIGS, DEMO, QUICK, SMALL, Run, Vpt

FEW = ["--data.batch_size=32", *(f"--trainer.limit_{stage}_batches=2" for stage in ("train", "val", "test"))]


def fitted(vpt: Vpt, method: str, name: str, *flags: str) -> Run:
    config = str(CONFIGS / "method" / f"{method}.yaml")
    answer = vpt("fit", *DEMO, "-c", config, "--data.train=train800", *FEW, *QUICK, *flags)
    assert answer.status == 0, answer.err
    return Run(Path(f"runs/digits/{name}/version_0").resolve())


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
