"""What a run leaves where a disk is full, a folder read-only, a picture too large, or the process told to stop."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

import vpt as package
from vpt.errors import OutputError
from vpt.tasks import PromptTuning

from .conftest import DEMO, QUICK, SMALL, Run, Vpt

FIT = ("fit", *DEMO, *SMALL, *QUICK)


def test_sigterm_says_how_to_go_on_and_what_became_of_the_run(vpt: Vpt, monkeypatch: pytest.MonkeyPatch) -> None:
    def terminate(task: PromptTuning) -> None:
        if task.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(PromptTuning, "on_train_epoch_start", terminate)
    answer = vpt(*FIT, "--trainer.max_epochs=3")
    run = Run(Path("runs/digits/vpt_deep/version_0"))
    assert (answer.status, run.record["status"]) == (143, "interrupted")
    assert f"To go on: vpt fit -c {run.config[1]} --ckpt_path {run.checkpoint}" in answer.err
    assert answer.err.endswith("vpt: error: terminated\n")
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    "command",
    [
        *("test {test}", "validate {test}", "predict {test}", "robustness run --delta {delta}"),
        *("robustness report {run}", "attention --delta {delta}", "attention --delta {delta} --kind all"),
        *(f"export --delta {{delta}} --format {name}" for name in ("onnx", "torch", "peft")),
    ],
)
def test_a_run_that_nothing_may_be_written_beside_is_told_before_work_begins(
    vpt: Vpt, copied: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    allowed = os.access  # the tests may run as root, whom no permission stops

    def access(path: Any, mode: int) -> bool:
        return not (mode & os.W_OK and Path(path).resolve().is_relative_to(copied.folder)) and allowed(path, mode)

    monkeypatch.setattr(os, "access", access)
    test = f"{' '.join(copied.config)} --ckpt_path {copied.checkpoint}"
    before = sorted(copied.folder.rglob("*"))
    answer = vpt(*command.format(run=copied.folder, delta=copied.folder / "delta.safetensors", test=test).split())
    assert f"{copied.folder} is read-only." in answer.sentence
    assert sorted(copied.folder.rglob("*")) == before


def full(path: Path, *_: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(vpt: Vpt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PromptTuning, "on_train_epoch_start", lambda task: _fill(task, monkeypatch))
    answer = vpt(*FIT, "--trainer.max_epochs=3")
    run = Run(Path("runs/digits/vpt_deep/version_0"))
    assert answer.sentence.endswith("checkpoints/last.ckpt cannot be written: No space left on device.")
    assert torch.load(run.checkpoint, weights_only=True)["epoch"] == 0
    assert run.record["status"] == "failed"
    assert [path.name for path in Path(run.checkpoint).parent.iterdir()] == ["last.ckpt"]


def _fill(task: PromptTuning, monkeypatch: pytest.MonkeyPatch) -> None:
    if task.current_epoch == 1:
        monkeypatch.setattr(Path, "write_bytes", full)


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 1,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_safetensors_says_of_a_full_disk_is_one_sentence(
    trained: Run, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = package.load(trained.folder / "delta.safetensors")
    request.getfixturevalue("small_files")
    with pytest.raises(OutputError, match=r"delta\.safetensors cannot be written: .*File too large"):
        package.save_delta(tmp_path / "delta.safetensors", model)
    assert not list(tmp_path.iterdir())


def _too_large(*_: Any, **__: Any) -> None:
    raise ValueError("Image size of 400000x300 pixels is too large.\nIt must be less than 2^16 in each direction.")


def test_a_picture_that_cannot_be_drawn_takes_nothing_with_it(
    vpt: Vpt, copied: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Figure, "savefig", _too_large)
    fitted = vpt(*FIT)
    run = Run(Path("runs/digits/vpt_deep/version_0"))
    assert "figures/attention.png cannot be drawn: Image size of 400000x300 pixels is too large." in fitted.sentence
    assert run.record["status"] == "finished"
    assert (run.folder / "delta.safetensors").is_file()
    tested = vpt("test", *copied.config, "--ckpt_path", copied.checkpoint, "--trainer.limit_test_batches=1")
    assert "figures/confusion.png cannot be drawn" in tested.sentence
    assert "test/acc" in tested.out
    assert "test/acc" in copied.record["metrics"]
    drawn = vpt("attention", "--delta", str(copied.folder / "delta.safetensors"), "--out", "new/x.png")
    assert "new/x.png cannot be drawn" in drawn.sentence
    assert not Path("new").exists()


def test_a_report_whose_figure_cannot_be_drawn_has_its_tables(vpt: Vpt, monkeypatch: pytest.MonkeyPatch) -> None:
    from vpt.reports.page import Report, Table

    table = Table("T", "note", ["a"], [["1"]])
    report = Report({"a": 1}, "T", [], [table], {"F": Figure()}, {"F": "caption"}, {"csv": "a\n1\n"})
    monkeypatch.setattr(Figure, "savefig", _too_large)
    with pytest.raises(OutputError, match="The figure 'F' cannot be drawn: Image size"):
        report.write(Path("out"))
    assert sorted(path.name for path in Path("out").iterdir()) == ["report.csv", "report.json", "report.md"]


def test_a_test_of_some_images_replaces_neither_numbers_nor_figure(vpt: Vpt, copied: Run) -> None:
    test = ("test", *copied.config, "--ckpt_path", copied.checkpoint, "--data.batch_size=8")
    assert vpt(*test, "--trainer.limit_test_batches=3").status == 0
    record, figure = copied.record, copied.folder / "figures" / "confusion.png"
    drawn = figure.read_bytes()
    assert vpt(*test, "--trainer.limit_test_batches=1").status == 0
    assert (copied.record, figure.read_bytes()) == (record, drawn)
    (apart,) = copied.folder.glob("test-*.json")
    assert (copied.folder / "figures" / f"confusion{apart.stem.removeprefix('test')}.png").is_file()


def test_a_run_is_not_replaced_by_another(vpt: Vpt) -> None:
    mine = ("--trainer.logger=CSVLogger", "--trainer.logger.save_dir=mine", "--trainer.logger.version=0")
    assert vpt(*FIT, *mine).status == 0
    run = Run(Path("mine/lightning_logs/version_0"))
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    assert f"{run.folder} holds a run already" in vpt(*FIT, *mine).sentence
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before
    assert vpt(*FIT, *mine, "--trainer.max_epochs=2", "--ckpt_path", run.checkpoint).status == 0  # it goes on


def test_a_damaged_record_is_told_before_a_test(vpt: Vpt, copied: Run) -> None:
    (copied.folder / "run.json").write_text('{"status"')
    answer = vpt("test", *copied.config, "--ckpt_path", copied.checkpoint, "--trainer.limit_test_batches=1")
    assert "run.json cannot be read" in answer.sentence
    assert answer.out == ""
