"""The command line, run in this process as a user would run it: importing Lightning takes seconds."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning  # noqa: F401  # makes the handlers that the fixture below redirects
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from vpt.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"
DEMO = ["-c", str(CONFIGS / "demo.yaml")]
SMALL = ["--data.batch_size", "8"] + [f"--trainer.limit_{stage}_batches=2" for stage in ("train", "val", "test")]
QUICK = ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@dataclass(frozen=True)
class Answer:
    """What a command gave back."""

    status: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The error, which must be one line and nothing else."""
        errors = [line for line in self.err.splitlines() if line.startswith("vpt: error: ")]
        assert self.status == 1, self.err
        assert len(errors) == 1, self.err
        assert "Traceback" not in self.err
        assert self.err.splitlines()[-1] == errors[0]
        return errors[0].removeprefix("vpt: error: ")


Vpt = Callable[..., Answer]


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path

    @property
    def checkpoint(self) -> str:
        return str(self.folder / "checkpoints" / "last.ckpt")

    @property
    def config(self) -> list[str]:
        return ["-c", str(self.folder / "config.yaml")]

    @property
    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.folder / "run.json").read_text())
        return record


@pytest.fixture(scope="package", autouse=True)
def _coarse_figures() -> Iterator[None]:
    """Figures are half the time of a short run, which draws them twice; tests/visualize looks at them closely."""
    drawn = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, *args, **options: drawn(self, *args, **(options | {"dpi": 40})))
        patch.setattr("vpt.visualize.callbacks.pixels", lambda figure: np.zeros((8, 8, 3), np.uint8))
        yield


@pytest.fixture
def vpt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Vpt]:
    """Runs a command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # Lightning sets it; this puts it back afterwards

    def call(*args: str) -> Answer:
        capfd.readouterr()
        for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
            for handler in logging.getLogger(name).handlers:
                if type(handler) is logging.StreamHandler:
                    monkeypatch.setattr(
                        handler, "stream", sys.stderr
                    )  # it holds that of the test that imported Lightning
        status = main(list(args))
        return Answer(status, *capfd.readouterr())

    yield call
    torch.use_deterministic_algorithms(False)  # `trainer.deterministic` of a config stays on in the process


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A VPT-deep run of two steps on the digits. Tests may add files but not change any."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "0")
        assert main(["fit", *DEMO, *SMALL, *QUICK, "--trainer.default_root_dir", str(root)]) == 0
    return Run(root / "digits" / "vpt_deep" / "version_0")


@pytest.fixture
def copied(trained: Run, tmp_path: Path) -> Run:
    """A run of which no test has been made."""
    run = Run(shutil.copytree(trained.folder, tmp_path / "run", ignore=shutil.ignore_patterns("figures", "test-*")))
    record = run.record
    for part in (record["metrics"], record["evaluated"], record["read"]):
        for key in [key for key in part if key.startswith("test")]:
            del part[key]
    (run.folder / "run.json").write_text(json.dumps(record))
    return run
