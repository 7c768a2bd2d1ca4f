"""Prompts that move while a task trains: what scores them, when and where they go, and that nothing else changes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from tests.deltas.families import make
from tests.tasks.test_losses import _Stop
from tests.tasks.test_tasks import BASE, data, trainer
from vpt.deltas.prompts.prompt import Prompt
from vpt.errors import ConfigError, VPTWarning
from vpt.models import load_classifier, save_delta
from vpt.models.delta_format import read_header
from vpt.tasks import DeltaTuning
from vpt.tasks.relocation import Relocation


def task_of(options: dict[str, Any] | None = None, relocate: dict[str, Any] | None = None, **task: Any) -> DeltaTuning:
    L.seed_everything(0)
    spec = {"name": "prompt", "num_tokens": 2, "relocate": {} if relocate is None else relocate} | (options or {})
    return DeltaTuning([spec], **BASE, **task)


def prompts_of(task: DeltaTuning) -> Prompt:
    return cast("Prompt", task.model.parts()[0])


def standing(task: DeltaTuning) -> list[int]:
    assigned = prompts_of(task).assigned
    assert assigned is not None
    return assigned.layers.tolist()


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, float]]:
    """Scores and loss of each pass of what trains meanwhile, in which nothing moves."""
    found: list[tuple[Tensor, float]] = []
    monkeypatch.setattr(Relocation, "move", lambda self, scores, loss, generator: found.append((scores, loss)))
    return found


def test_scores_are_means_over_the_images_that_an_epoch_trains_on(scored: list[tuple[Tensor, float]]) -> None:
    class Recording(DeltaTuning):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = cast("Any", super().training_step(batch, batch_idx))
            tokens = self.model.owned()["delta.parts.0.tokens"]
            (gradient,) = torch.autograd.grad(loss, tokens, retain_graph=True)
            expected.setdefault(self.current_epoch, []).append(((gradient * tokens).sum(dim=1).detach(), float(loss)))
            return cast("Tensor", loss * 0)

    L.seed_everything(0)
    expected: dict[int, list[tuple[Tensor, float]]] = {}
    task = Recording([{"name": "prompt", "num_tokens": 2, "relocate": {}}], **BASE | {"weight_decay": 0.0})
    trainer(epochs=3, precision="64-true").fit(task, datamodule=data(augment="flip"))
    assert (len(expected), len(scored)) == (3, 2)  # none before the first epoch, of warm-up
    for epoch, (scores, loss) in enumerate(scored, start=1):
        torch.testing.assert_close(scores, torch.stack([s for s, _ in expected[epoch]]).mean(dim=0), rtol=1e-9, atol=0)
        assert loss == pytest.approx(np.mean([each for _, each in expected[epoch]]), rel=1e-12)
    assert not torch.equal(scored[0][0], scored[1][0])  # other images, by order and augmentation
    assert float(scored[0][0].abs().max()) > 1e-9


def test_micro_batches_have_the_scores_of_whole_ones(scored: list[tuple[Tensor, float]]) -> None:
    for size in (None, 3):
        trainer(epochs=2, precision="64-true").fit(task_of(micro_batch=size), datamodule=data())
    (whole, loss), (parts, again) = scored
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-14)
    assert again == pytest.approx(loss, rel=1e-12)


def test_a_pass_without_a_move_leaves_training_as_it_is(scored: list[tuple[Tensor, float]]) -> None:
    tasks = [task_of({"dropout": 0.3, "relocate": each}, mixup=0.2) for each in (None, {"warmup": 0}, {"warmup": 9})]
    for task in tasks:
        L.seed_everything(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", VPTWarning)
            trainer(epochs=3).fit(task, datamodule=data(augment="flip"))
        told = [str(each.message) for each in caught if each.category is VPTWarning]
        never_moves = "relocate has a warmup of 9 epochs, and trainer.max_epochs is 3: no prompt moves."
        assert told == ([never_moves] if task is tasks[2] else [])
    assert len(scored) == 3
    plain, passed, never = ([prompts_of(task).prompts(layer) for layer in range(6)] for task in tasks)
    assert all(map(torch.equal, plain, passed))
    assert all(map(torch.equal, plain, never))
    assert torch.equal(tasks[0].model.head.weight, tasks[1].model.head.weight)


@pytest.mark.parametrize("largest", [1.0, -1.0])
def test_the_most_idle_prompt_moves_if_its_score_is_positive(largest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.full((12,), -3.0, dtype=torch.float64)
    scores[5] = largest
    before: list[Tensor] = []

    def found(self: Relocation, *_: Any) -> tuple[Tensor, float]:
        before.append(cast("Tensor", self._prompts.tokens).detach().clone())
        return scores, 1.0

    class Looking(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 1 and batch_idx == 0:
                after.append(cast("Tensor", prompts_of(pl_module).tokens).detach().clone())

    monkeypatch.setattr(Relocation, "_scores", found)
    after: list[Tensor] = []
    task = task_of(relocate={"scale": 0.25})
    trainer(epochs=2, callbacks=[Looking()]).fit(task, datamodule=data())
    moved = [row for row, layer in enumerate(standing(task)) if layer != row // 2]
    assert moved == ([5] if largest > 0 else [])
    expected = before[0].clone()
    expected[moved] *= 0.25
    assert torch.equal(after[0], expected)


def test_moves_and_rewards_are_those_of_the_released_loop() -> None:
    """`train_classifier` of src/engine/trainer.py of ckshang/PRO-VPT on given scores and losses, with lists."""
    part = Prompt(make("vit")[0], [2, 3, 1], relocate=cast("Any", {"warmup": 0}))
    relocation = Relocation(part)
    rng = np.random.default_rng(0)
    layers: list[list[int]] = [[0, 1], [2, 3, 4], [5]]
    states, rewards, previous = [], [], None
    moves = 0
    for epoch in range(30):
        scores, loss = rng.normal(size=6) - (3 if epoch % 7 == 6 else 0), float(rng.random())
        policy = relocation._policy
        rewarded = [] if policy is None else list(policy.rewards)
        if previous is not None:
            rewards.append(previous - loss - scores.max())
        relocation.move(torch.from_numpy(scores), loss, torch.Generator().manual_seed(epoch))
        policy = relocation._policy
        assert policy is not None
        if previous is not None:
            pending = [*rewarded, rewards[-1]] if len(rewarded) == 0 else []
            assert policy.rewards == pytest.approx(pending)
        best = [max((scores[p] for p in own), default=-10000.0) for own in layers]
        previous = None
        if max(best) > 0:
            source = int(np.argmax(best))
            worst = layers[source][int(np.argmax([scores[p] for p in layers[source]]))]
            sums = np.array([sum(scores[p] for p in own) for own in layers])
            counts = np.array([len(own) for own in layers], dtype=float) - np.eye(3)[source]
            context = [(sums - sums.mean()) / (sums.std() + 1e-8), counts / counts.sum(), np.eye(3)[source]]
            states.append(np.concatenate(context))
            np.testing.assert_allclose(policy.states[-1].numpy(), states[-1], rtol=1e-5, atol=1e-6)
            target = policy.actions[-1]
            if target != source:
                layers[source].remove(worst)
                layers[target].append(worst)
                moves += 1
            previous = loss
        assert part.assigned is not None
        assert [sorted(own) for own in layers] == [part.assigned.rows(layer).tolist() for layer in range(3)]
    assert moves > 5
    assert 5 < len(rewards) < 29


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_equals_one_that_was_not_interrupted(stop: int, tmp_path: Path) -> None:
    def leg(stop: int, checkpoint: Path | None = None) -> tuple[DeltaTuning, Relocation]:
        task = task_of({"dropout": 0.2})
        keep = ModelCheckpoint(dirpath=tmp_path / str(stop), save_last=True)
        run = trainer(epochs=5, callbacks=[keep, _Stop(stop)])
        run.fit(task, datamodule=data(), ckpt_path=checkpoint, weights_only=True)
        (found,) = (each for each in cast("Any", run).callbacks if isinstance(each, Relocation))
        return task, found

    (whole, first), _ = leg(5), leg(stop)
    resumed, second = leg(5, tmp_path / str(stop) / "last.ckpt")
    assert standing(whole) != standing(task_of())
    for key, tensor in whole.model.owned().items():
        assert torch.equal(resumed.model.owned()[key], tensor), key
    assert first._policy is not None
    assert second._policy is not None
    assert first._policy.rewards == second._policy.rewards
    for one, other in zip(first._policy.actor.parameters(), second._policy.actor.parameters(), strict=True):
        assert torch.equal(one, other)


def test_curves_count_prompts_and_the_file_is_plain(tmp_path: Path) -> None:
    task = task_of()
    trainer(tmp_path, epochs=4).fit(task, datamodule=data())
    events = EventAccumulator(str(tmp_path / "run" / "0"))
    events.Reload()
    curves = [[point.value for point in events.Scalars(f"prompts/block_{block:02d}")] for block in range(6)]
    assert [curve[0] for curve in curves] == [2] * 6
    assert {sum(step) for step in zip(*curves, strict=True)} == {12}
    last = [int(curve[-1]) for curve in curves]
    assert last == [standing(task).count(block) for block in range(6)] != [2] * 6
    save_delta(file := tmp_path / "delta.safetensors", task.model)
    (spec,) = read_header(file)["specs"]
    assert (spec["num_tokens"], spec["relocate"]) == (last, None)
    pixels = task.model.backbone.random_images(3)
    with torch.no_grad():
        assert torch.equal(load_classifier(file)(pixels), task.eval().model(pixels))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ema_decay": 0.9}, "leave ema_decay out"),
        ({"start_decay": {}}, "leave start_decay out"),
        ({"compile": True}, "leave compile out"),
    ],
)
def test_what_would_not_follow_a_prompt_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        trainer().fit(task_of(**options), datamodule=data())


def test_one_prompt_of_a_delta_moves_in_a_precision_that_has_its_score() -> None:
    spec = {"name": "prompt", "num_tokens": 2, "relocate": {}}
    with pytest.raises(ConfigError, match="One prompt of a delta can relocate"):
        trainer().fit(DeltaTuning([spec, spec], **BASE), datamodule=data())
    with pytest.raises(ConfigError, match="bf16-true rounds away"):
        trainer(precision="bf16-true").fit(task_of(), datamodule=data())
    module = data()
    module.setup("fit")
    with pytest.raises(ConfigError, match="of a data module"):
        trainer().fit(task_of(), train_dataloaders=module.train_dataloader(), val_dataloaders=module.val_dataloader())


def test_the_pass_sees_the_images_that_train_or_training_does_not_begin() -> None:
    with pytest.raises(ConfigError, match="take limit_train_batches, not overfit_batches"):
        trainer(overfit_batches=1).fit(task_of(), datamodule=data())
