"""Several processes, started by Lightning's own flags."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.fakes import make_task
from vpt.models.delta_format import read_delta

from .conftest import DEMO, QUICK, Vpt

DDP = ["--trainer.devices=2", "--trainer.accelerator=cpu", "--trainer.strategy=ddp"]


def test_two_processes_train_one_run_as_one_does_with_the_same_global_batch(vpt: Vpt, tmp_path: Path) -> None:
    """33 test images in two processes: an odd number, so that counting one twice would show."""
    folder = make_task(tmp_path / "fake", per_class=(32, 5, 11))
    data = ["--data=VTABDataModule", "--data.task=fake", f"--data.root={folder.parent}", "--data.image_size=64"]
    found = []
    for name, batch, flags in (("one", "16", []), ("two", "8", DDP)):
        whole = [*QUICK, "--trainer.default_root_dir", name]
        train = [*DEMO, *whole, *data, "--data.train=train800", f"--data.batch_size={batch}", *flags]

        def run(*args: str, alone: bool = not flags) -> None:
            if alone:
                answer = vpt(*args)
                assert answer.status == 0, answer.err
            else:
                _started(tmp_path, *args)

        run("fit", *train)
        (folder,) = (tmp_path / name).glob("*/*/*")
        assert json.loads((folder / "run.json").read_text())["status"] == "finished"
        assert (folder / "checkpoints" / "last.ckpt").is_file()
        run("test", "-c", str(folder / "config.yaml"), "--ckpt_path", str(folder / "checkpoints" / "last.ckpt"))
        record = json.loads((folder / "run.json").read_text())
        assert len(list((tmp_path / name).rglob("delta.safetensors"))) == 1
        predict = [
            "predict",
            "-c",
            str(folder / "config.yaml"),
            "--ckpt_path",
            str(folder / "checkpoints" / "last.ckpt"),
        ]
        run(*predict)
        rows = _rows(folder)
        assert [int(row["index"]) for row in rows] == list(range(33))
        if flags:  # one process replaces what two have written: it is of the same model and data
            run(*predict, "--trainer.devices=1", "--trainer.strategy=auto", alone=True)
            assert [row["predicted"] for row in _rows(folder)] == [row["predicted"] for row in rows]
        found.append((record["metrics"], read_delta(folder / "delta.safetensors")[1]))
    (one, tensors), (two, others) = found
    assert one["val/acc"] == two["val/acc"] > 0.2
    assert one["test/acc"] == two["test/acc"]
    assert one["test/mean_per_class"] == pytest.approx(two["test/mean_per_class"], abs=1e-6)
    assert one["test/loss"] == pytest.approx(two["test/loss"], rel=1e-4)
    assert one["train/loss"] == pytest.approx(two["train/loss"], rel=1e-3)
    for key, tensor in tensors.items():
        torch.testing.assert_close(others[key], tensor, rtol=1e-3, atol=1e-4)


def _rows(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.glob("predictions*.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


def _started(folder: Path, *args: str) -> None:
    command = [sys.executable, "-m", "vpt", *args]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
