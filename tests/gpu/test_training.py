"""On a card a run resumes to the same numbers, bit for bit, and no training step waits for the device."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vpt.data import DigitsDataModule
from vpt.tasks import DeltaTuning, FineTuning, LinearProbe, PromptTuning, RunRecord
from vpt.tasks.classification import ClassificationTask

BASE: dict[str, Any] = {"backbone": "vit_nano_patch8_64", "num_classes": 10, "base_lr": 0.02}
TASKS: dict[str, tuple[type[ClassificationTask], dict[str, Any]]] = {
    "deep": (PromptTuning, {"num_tokens": 3, "deep": True, "dropout": 0.1}),
    "shallow": (PromptTuning, {"num_tokens": 3, "deep": False}),
    "log-bias": (DeltaTuning, {"deltas": [{"name": "prompt", "num_tokens": 3, "log_bias": True}]}),
    "gate": (DeltaTuning, {"deltas": [{"name": "prompt", "num_tokens": 3, "gate": {}}]}),
    "relocate": (DeltaTuning, {"deltas": [{"name": "prompt", "num_tokens": 3, "relocate": {"warmup": 0}}]}),
    "prefix": (DeltaTuning, {"deltas": [{"name": "prefix", "num_tokens": 3}]}),
    "lora": (DeltaTuning, {"deltas": [{"name": "lora", "rank": 2}]}),
    "adapter": (DeltaTuning, {"deltas": [{"name": "adapter"}]}),
    "ssf": (DeltaTuning, {"deltas": [{"name": "ssf"}]}),
    "attention-pool": (DeltaTuning, {"deltas": [{"name": "attention_pool"}]}),
    "average": (PromptTuning, {"num_tokens": 3, "ema_decay": 0.9}),
    "full": (FineTuning, {}),
    "probe": (LinearProbe, {}),
}


class _Looks(TorchDispatchMode):  # type: ignore[no-untyped-call]  # so is its base
    """Where Python is told a number of a tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            frames = [each for each in traceback.extract_stack()[:-1] if "/torch/" not in each.filename]
            self.found.append(f"{frames[-1].filename}:{frames[-1].lineno}")
        return func(*args, **(kwargs or {}))


@contextmanager
def waits(device: torch.device) -> Iterator[list[str]]:
    """Where the host waits for a card; on the processor, where nothing waits, where it would."""
    found: list[str] = []
    if device.type == "cpu":
        with _Looks() as mode:
            yield found
        found += mode.found
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [f"{each.filename}:{each.lineno}" for each in caught if "called a synchronizing" in str(each.message)]


class _Watch(L.Callback):
    """Watches all steps between the first and the last of an epoch, their batches and what is between them."""

    def __init__(self, device: torch.device, last: int) -> None:
        self.device, self.last, self.found = device, last, ["nothing was watched"]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == 1:
            self.context = waits(self.device)
            self.found = self.context.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.last:
            self.context.__exit__(None, None, None)


def trainer(device: torch.device, epochs: int, batches: int, **options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        max_epochs=epochs,
        limit_train_batches=batches,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in options["callbacks"]),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def data() -> DigitsDataModule:
    return DigitsDataModule(batch_size=8, train="train800")


@pytest.mark.parametrize("name", TASKS)
def test_a_training_step_needs_no_number_of_the_device(name: str) -> None:
    """The meta device has none: whatever looks at one fails."""
    kind, options = TASKS[name]
    task = kind(**BASE, **options).to("meta")
    empty = dict.fromkeys(("datamodule", "train_dataloader", "progress_bar_callback"))
    task.trainer = SimpleNamespace(world_size=1, current_epoch=0, **empty)  # type: ignore[assignment]
    task.log = lambda *_, **__: None  # type: ignore[method-assign]
    images = torch.zeros(4, 3, 64, 64, dtype=torch.uint8, device="meta")
    batch = {key: torch.zeros(4, dtype=torch.int64, device="meta") for key in ("label", "index")}
    optimizer = torch.optim.AdamW([each for each in task.parameters() if each.requires_grad], 0.1)
    loss = task.training_step({"image": images, **batch}, 1)
    assert isinstance(loss, Tensor)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    with pytest.raises(RuntimeError, match="meta"):
        float(loss.detach())


@pytest.mark.parametrize("name", ["deep", "relocate", "lora", "average", "full"])
def test_no_step_of_a_run_waits_for_the_device(name: str, device: torch.device) -> None:
    kind, options = TASKS[name]
    watch = _Watch(device, last=6)
    run = trainer(device, 1, 6, callbacks=[watch, RunRecord()])
    run.fit(kind(**BASE, **options, optimizer="sgd"), datamodule=data())
    # On the processor each of the five steps looks whether its loss is finite, which a card is asked every fifty.
    assert len(watch.found) == (5 if device.type == "cpu" else 0), watch.found


def test_waiting_is_noticed(device: torch.device) -> None:
    with waits(device) as found:
        float(torch.ones(3, device=device).sum())
        torch.ones(3, device=device).sum()
    assert len(found) == 1


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("deep", "32-true"),
        ("log-bias", "bf16-mixed"),
        ("relocate", "bf16-mixed"),
        ("lora", "bf16-mixed"),
        ("full", "32-true"),
    ],
)
def test_a_run_is_repeated_and_resumed_bit_for_bit(
    name: str, precision: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in (("PL_GLOBAL_SEED", "0"), ("PL_SEED_WORKERS", "0"), ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")):
        monkeypatch.setenv(variable, value)  # Lightning sets them; this puts them back afterwards
    kind, options = TASKS[name]

    def run(*more: L.Callback, seed: int = 0, checkpoint: Path | None = None) -> dict[str, Tensor]:
        L.seed_everything(seed, verbose=False)
        task = kind(**BASE, **options)
        L.seed_everything(0, verbose=False)
        fit = trainer(device, 3, 2, deterministic=True, precision=precision, callbacks=list(more))
        fit.fit(task, datamodule=data(), ckpt_path=checkpoint, weights_only=True)
        return {key: tensor.detach().cpu() for key, tensor in task.model.owned().items()}

    try:
        whole, again = run(), run()
        paused = run(ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True), _Stop(2))
        resumed = run(seed=1, checkpoint=tmp_path / "last.ckpt")
    finally:
        torch.use_deterministic_algorithms(False)
    assert [key for key, tensor in whole.items() if not torch.equal(again[key], tensor)] == []
    assert [key for key, tensor in whole.items() if not torch.equal(resumed[key], tensor)] == []
    assert [key for key, tensor in whole.items() if not torch.equal(paused[key], tensor)] != []


class _Stop(L.Callback):
    """Ends training after an epoch, without a change to the schedule."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs
