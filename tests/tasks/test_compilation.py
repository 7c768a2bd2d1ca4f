"""Training of compiled models: the same numbers but for rounding, and checkpoints that either goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from tests.tasks.test_tasks import BASE, data, trainer
from vpt.errors import ConfigError
from vpt.run_record import cell_protocol, training_protocol
from vpt.tasks import ClassificationTask, DeltaTuning, PromptTuning, RunRecord
from vpt.tasks.run_protocol import protocol


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Compiles without generating code, which inductor takes long for; the devices that it was asked for."""
    devices: list[torch.device] = []

    def compile_for(model: nn.Module, device: torch.device) -> None:
        devices.append(device)
        model.compile(backend="eager")

    monkeypatch.setattr("vpt.tasks.base.compile_for", compile_for)
    return devices


def trained(folder: Path, epochs: int = 1, resume: str | None = None, **options: Any) -> tuple[ClassificationTask, Any]:
    L.seed_everything(0)
    task = PromptTuning(**BASE | {"num_tokens": 2, "dropout": 0.2, "micro_batch": 5} | options)
    run = trainer(folder, epochs=epochs, callbacks=[RunRecord(), ModelCheckpoint(folder, "last", every_n_epochs=1)])
    run.fit(task, datamodule=data(), ckpt_path=resume, weights_only=True)
    return task, run


def test_a_compiled_run_differs_by_rounding_and_goes_on_from_either_kind(
    compiled: list[torch.device], tmp_path: Path
) -> None:
    (eager, first), (own, second) = trained(tmp_path / "a"), trained(tmp_path / "b", compile=True)
    assert compiled == [torch.device("cpu")]
    assert list(own.model.state_dict()) == list(eager.model.state_dict())
    for (name, one), other in zip(own.model.owned().items(), eager.model.owned().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)
    for rule in (cell_protocol, training_protocol):
        assert rule(protocol(first, eager)) == rule(protocol(second, own))
    on, _ = trained(tmp_path / "c", epochs=2, resume=str(tmp_path / "a" / "last.ckpt"), compile=True)
    whole, _ = trained(tmp_path / "d", epochs=2, resume=str(tmp_path / "b" / "last.ckpt"))
    for one, other in zip(on.model.owned().values(), whole.model.owned().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_without_a_compiler_training_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no working compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    run = trainer()
    with pytest.raises(ConfigError, match=r"^Nothing can be compiled for cpu here \(no working compiler\): install"):
        run.fit(PromptTuning(**BASE, compile=True), datamodule=data())
    assert run.global_step == 0


def test_pace_is_not_compiled() -> None:
    task = DeltaTuning([{"name": "lora"}], **BASE, pace={}, compile=True)
    with pytest.raises(ConfigError, match=r"pace changes layers in each step, .*: leave compile out"):
        task.check_fit(None)
