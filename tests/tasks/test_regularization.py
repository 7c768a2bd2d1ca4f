"""Decay towards the start, against both rules written out over a recorded training; and answers that are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zlib import crc32

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from tests.tasks.test_losses import _Stop
from tests.tasks.test_tasks import BASE, data, trainer
from vpt.data.corruptions import BASIC, corrupt
from vpt.errors import ConfigError, UnknownNameError
from vpt.run_record import training_protocol
from vpt.tasks import DeltaTuning, FineTuning, LinearProbe, PromptTuning
from vpt.tasks.run_protocol import protocol


class Watch(L.Callback):
    """Tensors at the start, and at each step what the optimiser made of them and what came after the decay."""

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}
        self.steps: list[dict[str, tuple[Tensor, Tensor, float]]] = []

    def _copy(self, pl_module: Any) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in pl_module.model.named_parameters() if p.requires_grad}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.start = self._copy(pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        rate = float(optimizer.param_groups[0]["lr"])
        own = dict(pl_module.model.named_parameters())
        self.steps.append({k: (v, own[k].grad.detach().clone(), rate) for k, v in self._copy(pl_module).items()})


class Moved(L.Callback):
    """What the optimiser has made of them, before they decay: its hook comes first in the list."""

    def __init__(self) -> None:
        self.after: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        own = pl_module.model.named_parameters()
        self.after.append({name: p.detach().clone() for name, p in own if p.requires_grad})


@pytest.mark.parametrize("rule", ["l2", "spd"])
@pytest.mark.parametrize("kind", ["delta", "full"])
def test_each_step_ends_where_the_rule_says(rule: str, kind: str) -> None:
    L.seed_everything(0)
    options: dict[str, Any] = BASE | {"start_decay": {"rule": rule, "rate": 0.7}, "warmup": 0.0}
    deltas = [{"name": "prompt", "num_tokens": 2}, {"name": "lora", "rank": 2}]
    task = DeltaTuning(deltas, **options) if kind == "delta" else FineTuning(**options)
    watch, moved = Watch(), Moved()
    run = trainer(epochs=1, batches=5, callbacks=[watch, moved])
    run.fit(task, datamodule=data())
    ends: list[dict[str, Tensor]] = [{name: step[name][0] for name in step} for step in watch.steps[1:]]
    ends.append(dict(task.model.named_parameters()))
    decayed = 0
    for step, after, end in zip(watch.steps, moved.after, ends, strict=True):
        for name, (before, gradient, rate) in step.items():
            start, found = watch.start[name].double(), after[name].double()
            if not name.startswith("head."):
                old, new = (before.double() - start).norm(), (found - start).norm()
                agree = float((gradient.double() * (before.double() - start)).sum()) <= 0
                share = rate * 0.7 if rule == "l2" else 0.0 if agree else 0.7 * float((1 - old / new).clamp(0, 1))
                decayed += share > 0
                found = found - share * (found - start)
            torch.testing.assert_close(end[name].detach().double(), found, rtol=1e-4, atol=1e-6)
    assert decayed > 3


def test_a_full_decay_undoes_all_growth_and_a_large_one_stays_at_the_start() -> None:
    L.seed_everything(0)
    task = DeltaTuning([{"name": "bias"}], **BASE, start_decay={"rule": "l2", "rate": 1e6})
    start = {name: p.detach().clone() for name, p in task.model.named_parameters() if p.requires_grad}
    trainer(epochs=1, batches=4).fit(task, datamodule=data())
    for name, parameter in task.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, start[name]) != name.startswith("head."), name


def test_a_training_with_decay_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    options: dict[str, Any] = BASE | {"start_decay": {"rule": "spd"}, "ema_decay": 0.5}

    def leg(stop: int, checkpoint: Path | None = None) -> PromptTuning:
        L.seed_everything(0)
        task = PromptTuning(**options)
        keep = ModelCheckpoint(dirpath=tmp_path / str(stop), save_last=True)
        run = trainer(epochs=3, callbacks=[keep, _Stop(stop)])
        run.fit(task, datamodule=data(), ckpt_path=checkpoint, weights_only=True)
        return task

    whole, _ = leg(3), leg(1)
    resumed = leg(3, tmp_path / "1" / "last.ckpt")
    for key, tensor in whole.model.owned().items():
        assert torch.equal(resumed.model.owned()[key], tensor), key


def test_it_is_part_of_the_protocol_and_checked() -> None:
    plain, kept = (protocol(trainer(), PromptTuning(**BASE, start_decay=each)) for each in (None, {"rule": "l2"}))
    assert training_protocol(plain) != training_protocol(kept)
    old = {**plain, "hyperparameters": {k: v for k, v in plain["hyperparameters"].items() if k != "start_decay"}}
    assert training_protocol(old) == training_protocol(plain)
    wrong: dict[str, dict[str, Any]] = {"must be positive": {"rate": 0}, "rate of start_decay": {"rate": 2.0}}
    for said, given in (wrong | {"rat": {"rat": 1}}).items():
        with pytest.raises((ConfigError, UnknownNameError), match=said):
            PromptTuning(**BASE, start_decay=given)
    with pytest.raises(UnknownNameError, match="rule of start_decay"):
        PromptTuning(**BASE, start_decay={"rule": "ewc"})


KEPT: dict[str, Any] = {"init_head": "probe", "probe_l2": 0.01, "keep_answers": {"rate": 2.0, "severity": 3}}


def test_answers_that_are_kept_add_a_divergence_on_corrupted_copies() -> None:
    L.seed_everything(3)
    deltas: list[dict[str, Any]] = [{"name": "prompt", "num_tokens": 2}, {"name": "bias"}]
    task, plain = (DeltaTuning(deltas, **BASE, **each) for each in (KEPT, {**KEPT, "keep_answers": None}))
    module = data()
    for each in (task, plain):
        L.seed_everything(3)
        trainer(epochs=1, batches=4).fit(each, datamodule=module)
    weights = [each.model.owned()["delta.parts.0.tokens"] for each in (task, plain)]
    assert not torch.equal(*weights)
    batch = module.split("train").batch(range(6))
    images = batch["image"].permute(0, 2, 3, 1).numpy()
    names = [f"3/{task.current_epoch}/{int(i)}" for i in batch["index"]]
    copies = [corrupt(image, BASIC[crc32(n.encode()) % 5], 3, n) for image, n in zip(images, names, strict=True)]
    seen = torch.from_numpy(np.stack(copies)).permute(0, 3, 1, 2)
    model = task.model.eval()
    with torch.no_grad():
        found = float(task._second_losses(model(batch["image"]), batch, {}))
        assert model.anchor_weight is None  # nothing is left on the model
        now, head = model(seen).softmax(dim=1), nn.Linear(model.head.in_features, model.head.out_features)
        head.load_state_dict(task._remembered["keep_answers"])
        model.set_strength(0.0)
        before = head(model.encode(seen)).softmax(dim=1)
        model.set_strength(1.0)
        assert not torch.equal(head.weight, model.head.weight)
    expected = 2 * float((before * (before.log() - now.log())).sum(dim=1).mean())
    assert found == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-4


def test_a_training_that_keeps_answers_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def leg(stop: int, checkpoint: Path | None = None) -> PromptTuning:
        L.seed_everything(0)
        task = PromptTuning(**BASE, **KEPT)
        keep = ModelCheckpoint(dirpath=tmp_path / str(stop), save_last=True)
        run = trainer(epochs=3, callbacks=[keep, _Stop(stop)])
        run.fit(task, datamodule=data(), ckpt_path=checkpoint, weights_only=True)
        return task

    whole, _ = leg(3), leg(1)
    resumed = leg(3, tmp_path / "1" / "last.ckpt")
    for key, tensor in whole.model.owned().items():
        assert torch.equal(resumed.model.owned()[key], tensor), key


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (PromptTuning, {"keep_answers": {}}, "needs init_head"),
        (FineTuning, KEPT, "take DeltaTuning with the delta `full`"),
        (PromptTuning, {**KEPT, "micro_batch": 2}, "leave micro_batch out"),
        (PromptTuning, {**KEPT, "mixup": 0.2}, "leave mixup out"),
        (PromptTuning, {**KEPT, "init_delta": "delta.safetensors"}, "init_delta, which leaves it"),
        (LinearProbe, {"start_decay": {}}, "nothing but the head trains"),
    ],
)
def test_where_there_are_no_answers_to_keep_training_does_not_begin(
    kind: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        trainer().fit(kind(**BASE, **options), datamodule=data())


def test_numbers_of_answers_to_keep_are_checked() -> None:
    with pytest.raises(ConfigError, match="start_decay has no effect with solver lbfgs"):
        LinearProbe(solver="lbfgs", **BASE, start_decay={})
    for given, said in (({"rate": 0}, "must be positive"), ({"severity": 6}, "severity"), ({"rates": 1}, "rates")):
        with pytest.raises((ConfigError, UnknownNameError), match=said):
            PromptTuning(**BASE, keep_answers=given)
