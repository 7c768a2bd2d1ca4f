"""Segmentation trains what it says, measures as its papers do, and resumes to the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from vpt.data import DigitsDataModule, ShapeScenesDataModule
from vpt.errors import ConfigError, DeltaFileError
from vpt.run_record import method_name
from vpt.tasks import LinearProbe, SegmentationTask
from vpt.tasks.build import build

from .test_tasks import trainer

BASE: dict[str, Any] = {"backbone": "vit_nano_patch8_64", "num_classes": 5, "base_lr": 0.04}
PROMPT = [{"name": "prompt", "num_tokens": 4, "dropout": 0.1}]
METHODS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "prompt": {"deltas": PROMPT},
    "full": {"full": True},
    "conv": {"head": "conv", "head_width": 8},
}


def data(**options: Any) -> ShapeScenesDataModule:
    defaults: dict[str, Any] = {"batch_size": 8, "train": "train800"}
    return ShapeScenesDataModule(**defaults | options)


@pytest.mark.parametrize("method", METHODS)
def test_what_trains_moves_and_nothing_else(method: str) -> None:
    L.seed_everything(0)
    task = SegmentationTask(**BASE, **METHODS[method])
    trained = set(task.model.owned())
    before = {key: tensor.clone() for key, tensor in task.model.state_dict().items()}
    trainer(epochs=1, batches=4).fit(task, datamodule=data())
    after = task.model.state_dict()
    moved = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    assert task.model.backbone.frozen == (method != "full")
    assert moved == trained
    assert any(key.startswith("backbone.") for key in trained) == (method == "full")


class Given(SegmentationTask):
    """Answers what it is told to: logits that are certain of ``batch["answer"]``."""

    def logits(self, batch: dict[str, Tensor], split: str) -> Tensor:
        return 20.0 * torch.nn.functional.one_hot(batch["answer"], 5).movedim(-1, 1).float()


def test_miou_is_counted_over_the_whole_set_and_without_ignored_pixels() -> None:
    """By hand: class 0 has 3 of 4, class 1 has 2 of 4, class 2 has 1 of 2 right in union; 3 and 4 never occur."""
    masks = torch.tensor([[[0, 0, 0], [1, 1, 255]], [[1, 2, 0], [255, 255, 255]]], dtype=torch.uint8)
    answers = torch.tensor([[[0, 0, 0], [1, 1, 4]], [[0, 2, 2], [3, 3, 3]]])
    # truth → answer: 0→0 three times, 0→2 once, 1→1 twice, 1→0 once, 2→2 once
    batches = [{"mask": masks[i : i + 1], "answer": answers[i : i + 1], "index": torch.tensor([i])} for i in range(2)]
    run = trainer(epochs=1)
    run.test(Given(**BASE), torch.utils.data.DataLoader(batches, batch_size=None), verbose=False)  # type: ignore[arg-type]
    found = {key: float(value) for key, value in run.callback_metrics.items()}
    iou = {"test/iou/0": 3 / 5, "test/iou/1": 2 / 3, "test/iou/2": 1 / 2}
    assert {key: value for key, value in found.items() if key.startswith("test/iou/")} == pytest.approx(iou)
    assert found["test/miou"] == pytest.approx(sum(iou.values()) / 3)
    assert found["test/pixel_acc"] == pytest.approx(6 / 8)
    assert found["test/n"] == 2


def test_the_loss_is_a_mean_over_pixels_that_count_in_batches_and_in_the_set() -> None:
    task = SegmentationTask(**BASE)
    logits = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.full((2, 4, 4), 255, dtype=torch.uint8)
    assert float(task.loss(logits, {"mask": mask})) == 0.0
    mask[0, 0, :3] = torch.tensor([1, 2, 4], dtype=torch.uint8)
    chosen = logits.log_softmax(dim=1)[0, [1, 2, 4], 0, [0, 1, 2]]
    assert float(task.loss(logits, {"mask": mask})) == pytest.approx(-float(chosen.mean()))


def test_kept_maps_train_the_same_head_as_fresh_ones() -> None:
    heads, seen = [], []
    for keep in (True, False):
        L.seed_everything(0)
        task, module = SegmentationTask(**BASE), data(train="val200", val="train800")
        calls: list[int] = []
        task.model.backbone.layout.blocks[0].register_forward_hook(
            lambda b, a, out, calls=calls: calls.append(len(out))
        )
        module.augmented = not keep  # pretend, so that nothing is kept
        trainer(epochs=3, batches=100).fit(task, datamodule=module)
        heads.append(task.model.head.state_dict()["weight"].clone())
        seen.append(sum(calls))
    assert seen == [200 + 32, 3 * (200 + 32)]
    torch.testing.assert_close(heads[0], heads[1], rtol=1e-3, atol=1e-4)


def test_micro_batches_have_the_gradient_of_the_whole_batch() -> None:
    gradients = []
    for size in (None, 3):
        L.seed_everything(0)
        task = SegmentationTask(**BASE, deltas=[{"name": "prompt", "num_tokens": 4}], micro_batch=size)
        batch = data().split("train").batch(range(8))
        task.trainer = trainer()
        task.loss(task._in_parts(batch), batch).backward()  # type: ignore[no-untyped-call]
        gradients.append(task.model.owned()["delta.parts.0.tokens"].grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


def test_training_makes_the_loss_smaller() -> None:
    L.seed_everything(0)
    task = SegmentationTask(**BASE | {"base_lr": 0.2}, deltas=[{"name": "prompt", "num_tokens": 4}])
    batch = data().split("train").batch(range(8))
    with torch.no_grad():
        before = float(task.loss(task(batch["image"]), batch))
    trainer(epochs=10, overfit_batches=1).fit(task, datamodule=data())
    with torch.no_grad():
        after = float(task.loss(task(batch["image"]), batch))
    assert after < 0.6 * before


def test_checkpoints_hold_trained_tensors_only_and_load_without_pickle(tmp_path: Path) -> None:
    task = SegmentationTask(**BASE, deltas=PROMPT)
    run = trainer(tmp_path, epochs=1, callbacks=[ModelCheckpoint(dirpath=tmp_path, save_last=True)])
    run.fit(task, datamodule=data())
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert sorted(checkpoint["state_dict"]) == ["model.delta.parts.0.tokens", "model.head.bias", "model.head.weight"]
    loaded = SegmentationTask.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert all(torch.equal(loaded.model.owned()[key], tensor) for key, tensor in task.model.owned().items())
    with pytest.raises(DeltaFileError, match="was trained on vpt/vit_nano_patch8_64"):
        SegmentationTask.load_from_checkpoint(tmp_path / "last.ckpt", weights="random", weights_only=True)


@pytest.mark.parametrize("method", ["prompt", "frozen"])
def test_an_interrupted_run_resumes_to_the_same_numbers(tmp_path: Path, method: str) -> None:
    class Stop(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 1:
                raise RuntimeError("killed")

    options = {**BASE, "deltas": [{"name": "prompt", "num_tokens": 4}] if method == "prompt" else []}
    L.seed_everything(0)
    whole, run = SegmentationTask(**options), trainer(epochs=3)
    run.fit(whole, datamodule=data())
    L.seed_everything(0)
    first = trainer(epochs=3, callbacks=[ModelCheckpoint(dirpath=tmp_path, save_last=True), Stop()])
    with pytest.raises(RuntimeError, match="killed"):
        first.fit(SegmentationTask(**options), datamodule=data())
    L.seed_everything(1)
    resumed, again = SegmentationTask(**options), trainer(epochs=3)
    again.fit(resumed, datamodule=data(seed=0), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    # Kept maps are computed again in other batches, which a matrix product rounds in another way.
    slack = 0.0 if method == "prompt" else 1e-5
    for key, tensor in whole.model.owned().items():
        torch.testing.assert_close(resumed.model.owned()[key], tensor, rtol=0, atol=slack)
    for key in ("val/miou", "val/loss", "val/pixel_acc"):
        assert float(again.callback_metrics[key]) == pytest.approx(float(run.callback_metrics[key]), rel=0, abs=slack)


def test_predictions_are_masks_of_class_numbers() -> None:
    task = SegmentationTask(**BASE)
    batch = data().split("test").batch([3, 4])
    found = task.predict_step({"image": batch["image"], "index": batch["index"]}, 0)
    assert found["index"].tolist() == [3, 4]
    assert found["mask"].dtype == torch.uint8
    assert torch.equal(found["mask"].long(), task(batch["image"]).argmax(dim=1))


def test_contradictions_are_refused() -> None:
    with pytest.raises(ConfigError, match="no delta is left to tune"):
        SegmentationTask(**BASE, full=True, deltas=PROMPT)
    with pytest.raises(ConfigError, match="The data has num_classes 5, the model 7"):
        trainer().fit(SegmentationTask(**BASE | {"num_classes": 7}), datamodule=data())


def test_data_without_masks_and_tasks_without_use_for_them_say_so() -> None:
    with pytest.raises(ConfigError, match="'digits' have labels and no masks: segmentation takes"):
        trainer().fit(SegmentationTask(**BASE | {"num_classes": 10}), datamodule=DigitsDataModule())
    with pytest.raises(ConfigError, match="'shape_scenes' have masks and no labels: use SegmentationTask"):
        trainer().fit(LinearProbe(**BASE), datamodule=data())


@pytest.mark.parametrize(
    ("options", "name"),
    [({}, "frozen"), ({"deltas": [{"name": "prompt"}, {"name": "lora"}]}, "prompt+lora"), ({"full": True}, "full")],
)
def test_runs_are_named_by_what_trains(options: dict[str, Any], name: str) -> None:
    assert method_name("SegmentationTask", {"deltas": None, "full": False} | options) == name


def test_what_runs_many_classifiers_takes_no_segmentation() -> None:
    config = {
        "model": {"class_path": "vpt.tasks.SegmentationTask", "init_args": {"backbone": "vit_nano_patch8_64"}},
        "data": {"class_path": "vpt.data.ShapeScenesDataModule"},
    }
    with pytest.raises(ConfigError, match="of classifiers only: run SegmentationTask with `vpt fit`"):
        build(config)
