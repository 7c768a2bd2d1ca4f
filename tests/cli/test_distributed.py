"""Several processes, started by Lightning's own flags."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from .conftest import DEMO, QUICK, SMALL

DDP = ["--trainer.devices=2", "--trainer.accelerator=cpu", "--trainer.strategy=ddp"]


def test_two_processes_train_one_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vpt", "fit", *DEMO, *SMALL, *QUICK, *DDP]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (folder,) = (tmp_path / "runs").glob("*/*/*")
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    assert len(list(tmp_path.rglob("delta.safetensors"))) == 1
    assert (folder / "checkpoints" / "last.ckpt").is_file()
