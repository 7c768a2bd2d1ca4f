"""Tasks train what they say, and only that; their checkpoints are small and resume to the same numbers."""

from __future__ import annotations

import inspect
import json
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray
from torch import nn

from tests.robustness.fakes import BACKBONE, SIZE
from tests.robustness.fakes import task as fake_task
from vpt.data import DigitsDataModule, ImageDataModule
from vpt.data.splits import Split
from vpt.deltas import attach
from vpt.errors import ConfigError, DeltaFileError, DivergedError, UnknownNameError
from vpt.models import load_classifier
from vpt.models.closed_form import fit_class_means, fit_ridge
from vpt.models.delta_format import read_delta
from vpt.models.feature_cache import FeatureCache
from vpt.models.logistic_regression import fit_logistic
from vpt.run_record import epoch_rule
from vpt.tasks import (
    ClassificationTask,
    DeltaTuning,
    DeltaWriter,
    FineTuning,
    InitWriter,
    LinearProbe,
    NearestNeighbours,
    PromptTuning,
    RunRecord,
)
from vpt.tasks.optimizers import warmup_cosine
from vpt.tasks.run_protocol import _INDIFFERENT, protocol
from vpt.tasks.targets.scores import MeanPerClass

BASE: dict[str, Any] = {"backbone": "vit_nano_patch8_64", "num_classes": 10, "base_lr": 0.02}


def data(**options: Any) -> DigitsDataModule:
    defaults: dict[str, Any] = {"batch_size": 8, "train": "train800"}
    return DigitsDataModule(**defaults | options)


def trainer(folder: Path | None = None, epochs: int = 2, batches: int = 3, **options: Any) -> L.Trainer:
    logger = TensorBoardLogger(folder, name="run", version="0") if folder else False
    return L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_train_batches=None if "overfit_batches" in options else batches,
        limit_val_batches=None if "overfit_batches" in options else 4,
        limit_test_batches=2,
        logger=logger,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in options.get("callbacks", [])),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        **options,
    )


def snapshot(task: ClassificationTask) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in task.model.state_dict().items()}


@pytest.mark.parametrize("kind", [PromptTuning, LinearProbe, FineTuning])
def test_what_trains_moves_and_nothing_else(kind: type[ClassificationTask]) -> None:
    L.seed_everything(0)
    task = kind(**BASE)
    trained = set(task.model.owned())
    before = snapshot(task)
    trainer(batches=4).fit(task, datamodule=data())
    moved = {key for key, tensor in task.model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert moved == trained
    frozen = kind is not FineTuning
    assert task.model.backbone.frozen == frozen
    if frozen:
        assert not any(key.startswith("backbone.") for key in trained)
        task.train()
        assert not any(module.training for module in task.model.backbone.model.modules())


def test_prompts_and_head_can_fit_a_few_images() -> None:
    L.seed_everything(0)
    task = PromptTuning(**BASE | {"base_lr": 0.1})
    losses: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, idx: int) -> None:
            losses.append(float(outputs["loss"]))

    run = trainer(epochs=15, overfit_batches=2, callbacks=[Watch()])
    run.fit(task, datamodule=data())
    assert sum(losses[-2:]) < 0.5 * sum(losses[:2])


def test_weight_decay_and_learning_rate_reach_the_optimiser() -> None:
    task = PromptTuning(**BASE | {"weight_decay": 0.3, "warmup": 0.0})
    run = trainer(epochs=1, batches=1)
    run.fit(task, datamodule=data(batch_size=16))
    decayed, plain = run.optimizers[0].param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert decayed["initial_lr"] == pytest.approx(0.02 * 16 / 256)
    assert [p.shape for p in plain["params"]] == [(10,)]
    assert {tuple(p.shape) for p in decayed["params"]} == {(6, 10, 192), (10, 192)}


@pytest.mark.parametrize(
    ("callback", "remedy"),
    [
        (callbacks.EMAWeightAveraging(), "set model.ema_decay"),
        (callbacks.WeightAveraging(), "vpt robustness soup"),
        (callbacks.StochasticWeightAveraging(1e-2), "vpt robustness soup"),
        (callbacks.BatchSizeFinder(), "model.micro_batch"),
        (callbacks.LearningRateFinder(), "vpt sweep"),
        (callbacks.GradientAccumulationScheduler({1: 2}), "model.micro_batch"),
        (callbacks.BackboneFinetuning(), "configs/method"),
        (callbacks.ModelPruning("l1_unstructured", parameter_names=["weight"]), "leave it out"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_would_train_another_model_than_the_record_says_is_refused_by_name(
    callback: L.Callback, remedy: str
) -> None:
    run = trainer(callbacks=[callback])
    with pytest.raises(ConfigError, match=rf"{type(callback).__name__} changes what is trained, .*{remedy}"):
        run.fit(LinearProbe(**BASE), datamodule=data())
    assert run.global_step == 0


def test_accumulated_batches_are_refused_for_micro_batches() -> None:
    with pytest.raises(ConfigError, match=r"accumulate_grad_batches is 2: .* model\.micro_batch .* is exact"):
        trainer(accumulate_grad_batches=2).fit(LinearProbe(**BASE), datamodule=data())


def test_validation_images_that_are_trained_on_are_measured_only_on_request() -> None:
    task, both, run = LinearProbe(**BASE), data(train="train800val200"), trainer()
    run.fit(task, datamodule=both)
    assert {"train/loss"} == run.callback_metrics.keys()
    run.validate(task, datamodule=both, verbose=False)
    assert run.callback_metrics.keys() == {"trained/loss", "trained/acc", "trained/mean_per_class"}
    run.validate(task, datamodule=data(), verbose=False)
    assert run.callback_metrics.keys() == {"val/loss", "val/acc", "val/mean_per_class"}


def test_some_validation_images_that_are_trained_on_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the others were the list; of the first batches one is trained on whole."""
    L.seed_everything(0)
    task, module, run = LinearProbe(**BASE), data(), trainer(epochs=1)
    shared = np.arange(200) % 3 == 0
    shared[8:16] = True
    monkeypatch.setattr(module, "shared", lambda name, other="train": shared)
    run.fit(task, datamodule=module)
    rest = np.flatnonzero(~shared[:32])
    batch = module.split("val").batch(rest.tolist())
    with torch.no_grad():
        logits = task.eval()(batch["image"])
    expected = {
        "val/acc": float((logits.argmax(dim=1) == batch["label"]).float().mean()),
        "val/loss": float(nn.functional.cross_entropy(logits, batch["label"])),
    }
    assert {key: float(run.callback_metrics[key]) for key in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("watch", [callbacks.EarlyStopping("val/acc"), ModelCheckpoint(monitor="val/loss")])
def test_what_watches_the_validation_needs_one(watch: Any) -> None:
    message = rf"{type(watch).__name__} watches val/\w+, which is not measured, since 200 of 200 validation images are"
    with pytest.raises(ConfigError, match=message):
        trainer(callbacks=[watch]).fit(LinearProbe(**BASE), datamodule=data(train="train800val200"))


def test_sgd_is_sgd_with_momentum() -> None:
    task = LinearProbe(**BASE | {"optimizer": "sgd", "momentum": 0.7})
    run = trainer(epochs=1, batches=1)
    run.fit(task, datamodule=data())
    assert isinstance(run.optimizers[0], torch.optim.SGD)
    assert run.optimizers[0].param_groups[0]["momentum"] == 0.7


def test_schedule_rises_linearly_and_falls_by_a_cosine() -> None:
    factors = [warmup_cosine(step, 100, 0.1) for step in range(101)]
    assert factors[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0.0)
    assert warmup_cosine(0, 10, 0.0) == 1.0


def test_the_linear_probe_passes_each_image_through_the_backbone_once() -> None:
    task = LinearProbe(**BASE)
    seen: list[int] = []
    task.model.backbone.layout.blocks[0].register_forward_hook(lambda block, args, out: seen.append(len(out)))
    run = trainer(epochs=2, batches=100)
    run.fit(task, datamodule=data(train="val200", val="train800"))
    assert sum(seen) == 200 + 32  # all training images, four validation batches


def test_kept_features_train_the_same_head_as_fresh_ones() -> None:
    heads = []
    for keep in (True, False):
        L.seed_everything(0)
        task, module = LinearProbe(**BASE), data()
        if not keep:
            module.augmented = True  # pretend, so that nothing is kept
        trainer(epochs=2, batches=5).fit(task, datamodule=module)
        heads.append(task.model.head.weight.detach().clone())
    torch.testing.assert_close(heads[0], heads[1], rtol=1e-4, atol=1e-5)


def test_kept_features_belong_to_their_data() -> None:
    task = LinearProbe(**BASE)
    for module in (data(), data(preset="vpt")):  # the same images, resized in another way
        trainer(epochs=1, batches=2).fit(task, datamodule=module)
        batch = next(iter(module.val_dataloader()))
        torch.testing.assert_close(task.features(batch, "val"), task.model.backbone(batch["image"]))


def test_kept_features_follow_the_strength_new_values_and_another_cut() -> None:
    task, module = DeltaTuning(deltas=[{"name": "partial", "blocks": 2}], **BASE), data()
    trainer(epochs=1, batches=2).fit(task, datamodule=module)
    batch = next(iter(module.val_dataloader()))
    model = task.model.eval()

    def check() -> None:
        torch.testing.assert_close(task.features(batch, "val"), model.backbone(batch["image"]), rtol=1e-4, atol=1e-4)

    check()
    model.set_strength(0.5)
    check()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    check()
    lora = attach(model.backbone, [{"name": "lora", "layers": [1, 3]}])  # before the old cut
    for parameter in lora.parameters():
        nn.init.normal_(parameter, std=0.2)
    check()
    lora.detach()
    check()


def test_whatever_kept_features_depend_on_is_part_of_their_key(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[Any] = []

    class Watched(FeatureCache):
        def __init__(self, compute: Any, key: Any) -> None:
            keys.append(key)
            super().__init__(compute)

    monkeypatch.setattr("vpt.tasks.kept_features.FeatureCache", Watched)
    monkeypatch.setattr("vpt.tasks.base.compile_for", lambda *_: None)

    def key(given: dict[str, Any], precision: Any = "32-true", **options: Any) -> tuple[Any, ...]:
        run = trainer(epochs=1, batches=1, precision=precision)
        run.fit(
            DeltaTuning(**BASE | {"deltas": [{"name": "partial", "blocks": 2}]} | given), datamodule=data(**options)
        )
        return tuple(keys[-1])

    base = key({})
    others = [
        *(key({"weights": "random"}), key({"normalization": "none"}), key({}, train="train800val200")),
        *(key({}, preset="timm"), key({"image_size": 32}, image_size=32)),
        key({"deltas": [{"name": "partial", "blocks": 1}]}),
        key({}, precision="bf16-mixed"),
        key({"compile": True}),
    ]
    assert len({base, *others}) == 1 + len(others)
    differ = [{position for position, value in enumerate(other) if value != base[position]} for other in others]
    # Of its parts these are one here: the form of a model, the trimming, the device, and the channels that files have.
    assert len(set().union(*differ)) == len(base) - 4


def test_lbfgs_puts_the_head_at_the_minimum_in_one_epoch() -> None:
    L.seed_everything(0)
    task, module = LinearProbe(**BASE, solver="lbfgs", l2=0.05), data(train="train800")
    run = trainer(epochs=1, batches=20)
    run.fit(task, datamodule=module)
    head = task.model.head
    store = task._kept[1]._stores["train"] if task._kept else None
    assert store is not None
    index = store.known.nonzero().flatten()
    assert len(index) == 160
    rows, labels = store.values[index], torch.tensor([module.split("train")[int(i)]["label"] for i in index])
    weight, bias = fit_logistic(rows, labels, 10, 0.05)
    torch.testing.assert_close(head.weight, weight)
    torch.testing.assert_close(head.bias, bias)
    assert float(run.callback_metrics["val/acc"]) > 0.7  # measured with the solved head, not the drawn one


@pytest.mark.parametrize("solver", ["ridge", "ncm"])
def test_a_closed_form_is_that_of_the_features_of_the_epoch(solver: Any, tmp_path: Path) -> None:
    L.seed_everything(0)
    task, module = LinearProbe(**BASE, solver=solver, l2=0.05), data(train="train800")
    run = trainer(tmp_path, epochs=1, batches=20, callbacks=[DeltaWriter()])
    run.fit(task, datamodule=module)
    store = task._kept[1]._stores["train"] if task._kept else None
    assert store is not None
    index = store.known.nonzero().flatten()
    rows, labels = store.values[index], torch.tensor([module.split("train")[int(i)]["label"] for i in index])
    fitted = fit_ridge(rows, labels, 10, 0.05) if solver == "ridge" else fit_class_means(rows, labels, 10)
    for found in (task.model, load_classifier(tmp_path / "run" / "0" / "delta.safetensors")):
        torch.testing.assert_close((found.head.weight.detach(), found.head.bias.detach()), fitted)
    assert float(run.callback_metrics["val/acc"]) > 0.5  # measured with this head: a drawn one has a tenth


def test_ridge_chooses_its_penalty_on_images_that_the_head_has_not_seen() -> None:
    candidates = [0.01, 0.1, 1000.0]
    task, module = LinearProbe(**BASE, solver="ridge", l2=candidates), data(train="train800val200")
    run = trainer(epochs=1, batches=125)
    run.fit(task, datamodule=module)
    assert task._kept is not None
    stores = task._kept[1]._stores
    (train, labels), val = (
        (stores[name].values, torch.from_numpy(module.split(name).labels))  # type: ignore[union-attr]
        for name in ("train", "val")
    )
    scores = {}
    for l2 in candidates:  # train800 comes first in train800val200
        weight, bias = fit_ridge(train[:800], labels[:800], 10, l2)
        scores[l2] = float(((val[0] @ weight.T + bias).argmax(dim=1) == val[1]).float().mean())
    best = max(candidates, key=lambda l2: (scores[l2], l2))
    assert len(set(scores.values())) > 1
    assert float(run.callback_metrics["train/l2"]) == pytest.approx(best)
    torch.testing.assert_close(task.model.head.weight.detach(), fit_ridge(train, labels, 10, best)[0])


def test_the_number_of_neighbours_is_chosen_on_other_images_than_it_is_chosen_by(tmp_path: Path) -> None:
    candidates = [1, 7, 300]
    task, module = NearestNeighbours(**BASE, k=candidates), data(train="train800val200")
    run = trainer(tmp_path, epochs=1, batches=125, callbacks=[DeltaWriter()])
    run.fit(task, datamodule=module)
    assert task._kept is not None
    stores = task._kept[1]._stores
    (train, labels), val = (
        (nn.functional.normalize(stores[name].values), torch.from_numpy(module.split(name).labels))  # type: ignore[union-attr]
        for name in ("train", "val")
    )
    scores = {}
    for k in candidates:  # train800 comes first in train800val200
        near = (val[0] @ train[:800].T).topk(k)
        votes = torch.zeros(200, 10).scatter_add_(1, labels[near.indices], (near.values / 0.07).exp())
        scores[k] = float((votes.argmax(dim=1) == val[1]).float().mean())
    best = max(candidates, key=lambda k: (scores[k], k))
    assert len(set(scores.values())) > 1
    assert float(run.callback_metrics["train/k"]) == best
    heads: list[Any] = [task.model.head, load_classifier(tmp_path / "run" / "0" / "delta.safetensors").head]
    for head in heads:
        torch.testing.assert_close(head.features, train)
        assert torch.equal(head.labels, labels)
        assert head.k == best


def test_a_head_of_one_pass_is_the_same_in_any_order_of_the_images() -> None:
    kept: list[Any] = []
    for seed in (0, 1):
        L.seed_everything(seed)
        task = NearestNeighbours(**BASE)
        trainer(epochs=1, batches=25).fit(task, datamodule=data(train="val200", seed=seed))
        kept.append(task.model.head)
    assert torch.equal(kept[0].labels, kept[1].labels)
    torch.testing.assert_close(kept[0].features, kept[1].features)


def test_lbfgs_chooses_its_penalty_on_images_that_the_head_has_not_seen() -> None:
    candidates = [0.01, 0.1, 30.0]
    task, module = LinearProbe(**BASE, solver="lbfgs", l2=candidates), data(train="train800val200")
    run = trainer(epochs=1, batches=125)
    run.fit(task, datamodule=module)
    assert task._kept is not None
    parts = {  # equal to fresh features, as tested above
        name: (store.values, torch.from_numpy(module.split(name).labels))
        for name, store in task._kept[1]._stores.items()
        if store is not None
    }
    (train, labels), val = parts["train"], parts["val"]
    scores = {}
    for l2 in candidates:  # train800 comes first in train800val200
        weight, bias = fit_logistic(train[:800], labels[:800], 10, l2)
        scores[l2] = float(((val[0] @ weight.T + bias).argmax(dim=1) == val[1]).float().mean())
    best = max(candidates, key=lambda l2: (scores[l2], l2))
    assert float(run.callback_metrics["train/l2"]) == pytest.approx(best)
    weight, bias = fit_logistic(train, labels, 10, best)
    torch.testing.assert_close(task.model.head.weight, weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "deltas",
    [
        [{"name": "partial", "blocks": 2}],
        [{"name": "attention_pool"}],
        [{"name": "prompt", "num_tokens": 3, "layers": [4, 6]}],
        [{"name": "lora", "rank": 2, "layers": [3, 6]}, {"name": "prefix", "num_tokens": 2, "layers": [5, 6]}],
    ],
    ids=lambda deltas: "+".join(delta["name"] for delta in deltas),
)
def test_blocks_before_the_first_trained_parameter_run_once_per_image(
    deltas: list[dict[str, Any]],
) -> None:
    trained = []
    for keep in (True, False):
        L.seed_everything(0)
        task, module = DeltaTuning(deltas=deltas, **BASE), data()
        first = task.model.backbone.layout.blocks[0]
        seen: list[int] = []
        first.register_forward_hook(lambda block, args, out, seen=seen: seen.append(len(out)))
        if not keep:
            module.augmented = True
        trainer(epochs=3, batches=2).fit(task, datamodule=module)
        batches = 3 * 2 * 8 + 3 * 32
        assert sum(seen) < batches if keep else sum(seen) == batches
        trained.append(task.model.owned())
    for key, tensor in trained[0].items():
        torch.testing.assert_close(tensor, trained[1][key], rtol=1e-3, atol=1e-4)


def checkpointed(folder: Path, epochs: int) -> tuple[PromptTuning, Path]:
    L.seed_everything(0)
    task = PromptTuning(**BASE | {"dropout": 0.1})
    run = trainer(folder, epochs=epochs, callbacks=[ModelCheckpoint(dirpath=folder, save_last=True)])
    run.fit(task, datamodule=data())
    return task, folder / "last.ckpt"


def test_checkpoints_hold_trained_tensors_only_and_load_without_pickle(tmp_path: Path) -> None:
    task, path = checkpointed(tmp_path, 1)
    checkpoint = torch.load(path, weights_only=True)
    assert sorted(checkpoint["state_dict"]) == [
        "model.delta.parts.0.tokens",
        "model.head.bias",
        "model.head.weight",
    ]
    loaded = PromptTuning.load_from_checkpoint(path, weights_only=True)
    assert all(torch.equal(loaded.model.owned()[k], v) for k, v in task.model.owned().items())


def test_an_interrupted_run_resumes_to_the_same_numbers(tmp_path: Path) -> None:
    L.seed_everything(0)
    whole = PromptTuning(**BASE)
    trainer(epochs=3).fit(whole, datamodule=data())

    class Stop(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 1:
                raise RuntimeError("killed")

    L.seed_everything(0)
    first = trainer(epochs=3, callbacks=[ModelCheckpoint(dirpath=tmp_path, save_last=True), Stop()])
    with pytest.raises(RuntimeError, match="killed"):
        first.fit(PromptTuning(**BASE), datamodule=data())
    L.seed_everything(1)
    resumed = PromptTuning(**BASE)
    trainer(epochs=3).fit(resumed, datamodule=data(seed=0), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    for key, tensor in whole.model.owned().items():
        assert torch.equal(resumed.model.owned()[key], tensor), key


def test_a_checkpoint_of_other_weights_or_with_a_hole_is_refused(tmp_path: Path) -> None:
    _, path = checkpointed(tmp_path, 1)
    with pytest.raises(DeltaFileError, match="was trained on vpt/vit_nano_patch8_64"):
        PromptTuning.load_from_checkpoint(path, weights="random", weights_only=True)
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["state_dict"]["model.head.bias"]
    torch.save(checkpoint, path)
    with pytest.raises(DeltaFileError, match=r"head\.bias missing"):
        PromptTuning.load_from_checkpoint(path, weights_only=True)
    del checkpoint["backbone"]
    torch.save(checkpoint, path)
    with pytest.raises(DeltaFileError, match="does not say on which backbone"):
        PromptTuning.load_from_checkpoint(path, weights_only=True)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_answers_that_are_not_finite_are_not_measured(stage: str) -> None:
    task = PromptTuning(**BASE)
    with torch.no_grad():
        task.model.head.bias[3] = float("nan")
    with pytest.raises(DivergedError, match="are not finite: its training diverged"):
        getattr(trainer(batches=1), stage)(task, data())


def test_the_classes_of_a_checkpoint_are_found_by_name(tmp_path: Path) -> None:
    _, path = checkpointed(tmp_path, 1)

    def renamed(names: list[str]) -> DigitsDataModule:
        module = data()
        module.class_names = names
        return module

    def accuracy(module: DigitsDataModule) -> float:
        (metrics,) = trainer(batches=5).test(PromptTuning(**BASE), module, ckpt_path=path, weights_only=True)
        return float(metrics["test/acc"])

    def turned() -> DigitsDataModule:
        module = renamed([str(digit) for digit in reversed(range(10))])
        module.split("test").labels = 9 - module.split("test").labels
        return module

    expected = accuracy(data())
    assert accuracy(turned()) == expected
    with pytest.raises(ConfigError, match="does not know class 'a' of digits"):
        accuracy(renamed(list("abcdefghij")))
    with pytest.raises(ConfigError, match=r"in another order: training goes on with the data that it began with\."):
        trainer(epochs=2).fit(PromptTuning(**BASE | {"dropout": 0.1}), turned(), ckpt_path=path, weights_only=True)


def test_a_trained_model_finds_its_classes_in_other_data_by_name(tmp_path: Path) -> None:
    task, run = PromptTuning(**BASE), trainer(epochs=1, batches=5)
    run.fit(task, datamodule=data())
    labels = np.arange(6) % 3
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 64, 64), dtype=np.uint8)

    def some(names: list[str], numbers: NDArray[np.int64]) -> ImageDataModule:
        split = Split("some/test", [f"{i}" for i in range(6)], numbers, lambda: images)
        return ImageDataModule("some", names, dict.fromkeys(("train", "val", "test"), split), "square", 64, 4)

    every = [str(digit) for digit in range(10)]
    (whole,) = run.test(task, some(every, np.array([7, 2, 5])[labels]), verbose=False)
    (subset,) = run.test(task, some(["7", "2", "5"], labels), verbose=False)
    assert subset == whole
    with pytest.raises(ConfigError, match="does not know class 'seven' of some"):
        run.test(task, some(["seven", "2", "5"], labels), verbose=False)


def test_a_checkpoint_knows_that_validation_images_were_trained_on(tmp_path: Path) -> None:
    task, run = LinearProbe(**BASE), trainer(epochs=1)
    run.fit(task, datamodule=data(train="train800val200"))
    run.save_checkpoint(tmp_path / "all.ckpt")
    for trained in ("train800", "train800val200"):  # what the data say of their training now
        again = trainer()
        again.validate(
            LinearProbe(**BASE), data(train=trained), tmp_path / "all.ckpt", verbose=False, weights_only=True
        )
        assert {"trained/acc", "trained/loss"} <= again.callback_metrics.keys()
        assert "val/acc" not in again.callback_metrics


def test_a_checkpoint_holds_a_head_that_was_frozen(tmp_path: Path) -> None:
    task = PromptTuning(**BASE)
    task.model.head.requires_grad_(False)
    run = trainer(epochs=1)
    run.fit(task, datamodule=data())
    run.save_checkpoint(tmp_path / "frozen.ckpt")
    loaded = PromptTuning.load_from_checkpoint(tmp_path / "frozen.ckpt", weights_only=True)
    assert torch.equal(loaded.model.head.weight, task.model.head.weight)


@pytest.mark.parametrize("kind", [PromptTuning, LinearProbe, FineTuning, partial(DeltaTuning, [{"name": "lora"}])])
def test_one_class_is_no_task(kind: Any) -> None:
    with pytest.raises(ConfigError, match="num_classes is 1"):
        kind(**BASE | {"num_classes": 1})


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    class Break(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 1:
                pl_module.model.head.bias.data.fill_(float("nan"))

    task = PromptTuning(**BASE)
    run = trainer(tmp_path, callbacks=[ModelCheckpoint(dirpath=tmp_path, save_last=True), Break()])
    with pytest.raises(DivergedError, match=r"epoch 1 .*lower base_lr \(0.02\)"):
        run.fit(task, datamodule=data())
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["epoch"] == 0
    assert all(tensor.isfinite().all() for tensor in kept["state_dict"].values())


def test_a_run_leaves_its_record_and_its_delta(tmp_path: Path) -> None:
    L.seed_everything(7)
    task = PromptTuning(**BASE)
    run = trainer(tmp_path, epochs=1, callbacks=[RunRecord(), DeltaWriter()])
    run.fit(task, datamodule=data())
    run.test(task, datamodule=data(), verbose=False)
    folder = tmp_path / "run" / "0"
    record = json.loads((folder / "run.json").read_text())
    assert record["task"] == "PromptTuning"
    assert record["seed"] == 7
    assert record["hyperparameters"]["num_tokens"] == 10
    assert record["backbone"]["weights_id"] == "vpt/vit_nano_patch8_64"
    assert record["data"]["counts"]["test"] == 797
    assert record["read"] == {"train": 3 * 8, "val": 4 * 8, "test": 2 * 8}
    assert epoch_rule(record) == "last"
    assert record["training"]["accumulate_grad_batches"] == 1
    assert {"pillow", "numpy", "albumentations", "opencv-python-headless"} <= record["versions"].keys()
    assert record["parameters"]["trainable"] == 6 * 10 * 192 + 10 * 193
    assert {"val/acc", "test/acc", "test/mean_per_class"} <= record["metrics"].keys()
    model = load_classifier(folder / "delta.safetensors")
    batch = next(iter(run.datamodule.test_dataloader()))  # type: ignore[attr-defined]
    torch.testing.assert_close(model(batch["image"]), task.eval()(batch["image"]))
    assert model.class_names == list("0123456789")


def test_a_record_tells_whatever_of_the_trainer_is_not_known_to_be_indifferent() -> None:
    """Each argument of Lightning's is known by name, so that a new one is noticed here."""
    plain = protocol(trainer(), PromptTuning(**BASE))["training"]
    others: dict[str, Any] = {
        "max_steps": 3,
        "limit_train_batches": 2,
        "gradient_clip_val": 1.0,
        "gradient_clip_algorithm": "value",
        "accumulate_grad_batches": 2,
        "min_epochs": 2,
        "min_steps": 3,
        "overfit_batches": 2,
        "sync_batchnorm": True,
        "use_distributed_sampler": False,
        "reload_dataloaders_every_n_epochs": 1,
    }
    for name, value in others.items():
        changed = protocol(L.Trainer(accelerator="cpu", logger=False, **{name: value}), PromptTuning(**BASE))[
            "training"
        ]
        assert changed != plain, name
        assert changed[name] == value
    assert {*inspect.signature(L.Trainer).parameters} == {*others} | _INDIFFERENT
    waits = (EarlyStopping("val/acc", patience=patience) for patience in (2, 3))
    told = [protocol(trainer(callbacks=[each]), PromptTuning(**BASE))["training"]["callbacks"] for each in waits]
    assert told[0] != told[1]


def test_a_test_on_other_data_leaves_the_record_of_the_run_alone(tmp_path: Path) -> None:
    task = LinearProbe(**BASE)
    run = trainer(tmp_path, epochs=1, callbacks=[RunRecord()])
    run.fit(task, datamodule=data())
    before = (tmp_path / "run" / "0" / "run.json").read_text()
    run.test(task, datamodule=data(train="train800val200"), verbose=False)
    assert (tmp_path / "run" / "0" / "run.json").read_text() == before
    (other,) = (tmp_path / "run" / "0").glob("test-digits-*.json")
    assert "test/acc" in json.loads(other.read_text())["metrics"]


def test_a_record_says_how_many_images_were_read(tmp_path: Path) -> None:
    task = LinearProbe(backbone=BACKBONE, weights="random", num_classes=3, image_size=SIZE)
    run = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path, name="run", version="0"),
        callbacks=[RunRecord()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    few = fake_task(shift=None)  # in batches of 4
    run.fit(task, datamodule=few)
    run.test(task, datamodule=few, verbose=False)
    record = json.loads((tmp_path / "run" / "0" / "run.json").read_text())
    assert record["read"] == {"train": 6, "val": 6, "test": 10} == record["data"]["counts"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": None}, ConfigError, "num_classes is not known"),
        ({"num_classes": 1}, ConfigError, "num_classes is 1: it must be at least 2"),
        ({"optimizer": "adam"}, UnknownNameError, "did you mean 'adamw'"),
        ({"base_lr": 0.0}, ConfigError, "base_lr is positive"),
        ({"warmup": 1.0}, ConfigError, "warmup and momentum lie in"),
        ({"momentum": 5.0}, ConfigError, "warmup and momentum lie in"),
        ({"base_lr": float("nan")}, ConfigError, "base_lr of PromptTuning must be a number, got nan"),
        ({"weight_decay": float("inf")}, ConfigError, "weight_decay of PromptTuning must be a number, got inf"),
        ({"base_lr": "0.1"}, ConfigError, "base_lr of PromptTuning must be a number, got '0.1'"),
        ({"backbone": "vit_nano_patch8"}, UnknownNameError, "vit_nano_patch8_64"),
        ({"normalization": "imagnet"}, UnknownNameError, "did you mean 'imagenet'"),
    ],
)
def test_bad_hyperparameters_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PromptTuning(**BASE | options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": "lbfg"}, UnknownNameError, "did you mean 'lbfgs'"),
        ({"solver": "lbfgs", "l2": 0.0}, ConfigError, "l2 must be positive"),
        ({"solver": "lbfgs", "l2": []}, ConfigError, "l2 must be positive"),
        ({"solver": "ridge", "l2": [0.1, 0.0]}, ConfigError, "l2 must be positive"),
        ({"solver": "ridge", "targets": "multilabel"}, ConfigError, "solver ridge is of images with one class each"),
        ({"solver": "ncm", "ema_decay": 0.9}, ConfigError, "ema_decay has no effect with solver ncm"),
    ],
)
def test_bad_solvers_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LinearProbe(**BASE | options)


def probe(folder: Path, **options: Any) -> Path:
    L.seed_everything(1)
    task = LinearProbe(**BASE | options)
    trainer(folder, epochs=1, batches=1, callbacks=[DeltaWriter()]).fit(task, datamodule=data())
    return folder / "run" / "0" / "delta.safetensors"


def test_fine_tuning_starts_from_the_head_of_a_linear_probe(tmp_path: Path) -> None:
    path = probe(tmp_path / "probe")
    task = FineTuning(**BASE, init_head=str(path))
    trainer(tmp_path / "tuned", epochs=0, callbacks=[InitWriter()]).fit(task, datamodule=data())
    ours, theirs = task.model.head.state_dict(), load_classifier(path).head.state_dict()
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    assert task.model.head.weight.requires_grad


def test_a_resumed_run_keeps_its_head(tmp_path: Path) -> None:
    options: dict[str, Any] = BASE | {"init_head": str(probe(tmp_path / "probe"))}
    keep = ModelCheckpoint(tmp_path / "kept", filename="last", save_on_train_epoch_end=True)
    trainer(callbacks=[keep], epochs=1).fit(PromptTuning(**options), datamodule=data())
    task = PromptTuning(**options)
    path = tmp_path / "kept" / "last.ckpt"
    trainer(epochs=1).fit(task, datamodule=data(), ckpt_path=path, weights_only=True)
    stored = torch.load(path, weights_only=True)["state_dict"]["model.head.weight"]
    assert torch.equal(task.model.head.weight, stored)


def test_a_head_of_another_backbone_or_of_more_than_a_head_is_no_start(tmp_path: Path) -> None:
    other = probe(tmp_path / "probe", weights="random")
    with pytest.raises(ConfigError, match=r"The init_head .* was trained with other backbone weights"):
        trainer().fit(FineTuning(**BASE, init_head=str(other)), datamodule=data())
    task = PromptTuning(**BASE)
    trainer(tmp_path / "prompts", epochs=1, batches=1, callbacks=[DeltaWriter()]).fit(task, datamodule=data())
    prompts = str(tmp_path / "prompts" / "run" / "0" / "delta.safetensors")
    with pytest.raises(ConfigError, match="not a linear probe"):
        trainer().fit(FineTuning(**BASE, init_head=prompts), datamodule=data())
    with pytest.raises(ConfigError, match="needs a data module"):
        trainer().fit(FineTuning(**BASE, init_head=str(other)), data().train_dataloader())


def test_the_start_of_a_run_is_kept_on_request(tmp_path: Path) -> None:
    L.seed_everything(0)
    task = PromptTuning(**BASE)
    first = {key: tensor.clone() for key, tensor in task.model.owned().items()}
    trainer(tmp_path, epochs=1, callbacks=[InitWriter()]).fit(task, datamodule=data())
    header, tensors = read_delta(tmp_path / "run" / "0" / "init.safetensors")
    assert all(torch.equal(tensors[key], tensor) for key, tensor in first.items())
    assert header["info"] == {"random_head": True}
    assert not torch.equal(task.model.owned()["head.weight"], first["head.weight"])


def test_data_and_model_must_agree_on_classes() -> None:
    with pytest.raises(ConfigError, match="The data has num_classes 10, the model 7"):
        trainer().fit(PromptTuning(**BASE | {"num_classes": 7}), datamodule=data())


def test_mean_per_class_counts_only_classes_that_occur() -> None:
    metric = MeanPerClass(4)
    metric.update(torch.tensor([0, 0, 1, 3]), torch.tensor([0, 0, 1, 1]))
    assert float(metric.compute()) == pytest.approx((1 + 0.5) / 2)  # class 3 is predicted but never occurs


def test_a_pool_is_a_hyperparameter_and_part_of_the_record() -> None:
    task = LinearProbe(**BASE, pool="avg")
    assert task.hparams["pool"] == task.model.backbone.pool == "avg"
    checkpoint: dict[str, Any] = {"state_dict": {}}
    task.on_save_checkpoint(checkpoint)
    assert checkpoint["backbone"]["pool"] == "avg"
    with pytest.raises(DeltaFileError, match="was trained on"):
        LinearProbe(**BASE).on_load_checkpoint(checkpoint)
