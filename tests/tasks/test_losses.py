"""Training losses equal their formulas, mixing from a seed and rates by layer timm's, named metrics torchmetrics'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from numpy.typing import NDArray
from scipy.special import log_softmax
from timm.data import Mixup
from timm.optim import param_groups_layer_decay
from torch import nn
from torchmetrics.functional.classification import multiclass_auroc, multiclass_cohen_kappa, multiclass_f1_score

from tests.tasks.test_tasks import BASE, data, trainer
from vpt.backbones import create_backbone
from vpt.backbones.mixup import mix
from vpt.backbones.target_modules import layer_numbers
from vpt.errors import ConfigError, UnknownNameError
from vpt.models import load_classifier
from vpt.run_record import cell_protocol, epoch_rule, training_protocol
from vpt.tasks import DeltaTuning, DeltaWriter, FineTuning, LinearProbe, PromptTuning, RunRecord, SegmentationTask
from vpt.tasks.classification import ClassificationTask
from vpt.tasks.run_protocol import protocol
from vpt.tasks.targets.losses import class_weights, weighted_loss
from vpt.tasks.targets.scores import KNOWN, named_metrics

_OF_SEVERAL = {
    *(
        f"Multiclass{name}"
        for name in ("ConfusionMatrix", "EER", "LogAUC", "PrecisionRecallCurve", "ROC", "StatScores")
    ),
    *("MulticlassPrecisionAtFixedRecall", "MulticlassRecallAtFixedPrecision"),  # and without what they are fixed at
    *("MulticlassSensitivityAtSpecificity", "MulticlassSpecificityAtSensitivity"),
}
COUNTS = np.array([8, 2, 10])


def answers(images: int = 7, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(0)
    logits = torch.from_numpy(random.normal(size=(images, classes)) * 3).requires_grad_()
    return logits, torch.from_numpy(random.integers(classes, size=images))


def test_rules_of_class_weights_are_their_formulas() -> None:
    names = ["a", "b", "c"]
    found = {rule: class_weights(rule, names, COUNTS).tolist() for rule in ("balanced", "inv", "inv_sqrt")}
    assert found["balanced"] == pytest.approx([20 / 24, 20 / 6, 20 / 30])
    for rule, power in (("inv", 1), ("inv_sqrt", 0.5)):
        raw = np.array([count**-power for count in (8, 2, 10)])
        assert found[rule] == pytest.approx(raw / np.abs(raw).sum() * 3)
    assert class_weights({"b": 4.0}, names, COUNTS).tolist() == [1, 4, 1]
    with pytest.raises(UnknownNameError, match="did you mean 'b'"):
        class_weights({"bb": 1.0}, names, COUNTS)
    with pytest.raises(ConfigError, match="no weight for class 'b', of which there are no training images"):
        class_weights("balanced", names, np.array([1, 0, 2]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_weighted_smoothed_loss_is_that_of_torch_for_shares_as_for_labels(smoothing: float) -> None:
    logits, labels = answers()
    weight = class_weights("inv_sqrt", ["a", "b", "c"], COUNTS)
    expected = nn.functional.cross_entropy(logits, labels, weight, label_smoothing=smoothing)
    shares = nn.functional.one_hot(labels, 3).double()
    assert torch.equal(weighted_loss(logits, labels, weight, smoothing), expected)
    torch.testing.assert_close(weighted_loss(logits, shares, weight, smoothing), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_the_focal_loss_is_its_formula(gamma: float) -> None:
    logits, labels = answers()
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    log_p = log_softmax(logits.detach().numpy(), axis=1)[np.arange(7), labels]
    alpha = weight.numpy()[labels]
    each = -((1 - np.exp(log_p)) ** gamma) * log_p
    assert float(weighted_loss(logits, labels, None, 0.0, gamma).detach()) == pytest.approx(each.mean(), rel=1e-12)
    weighted = weighted_loss(logits, labels, weight, 0.0, gamma)
    assert float(weighted.detach()) == pytest.approx((alpha * each).sum() / alpha.sum(), rel=1e-12)


def test_the_focal_loss_has_a_gradient_where_an_image_is_certain() -> None:
    logits = torch.tensor([[200.0, 0.0], [0.0, 0.0]], requires_grad=True)
    weighted_loss(logits, torch.tensor([0, 1]), gamma=0.5).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert not logits.grad[0].any()


def test_the_loss_of_mixed_images_is_the_mixture_of_those_of_their_labels() -> None:
    logits, labels = answers(6)
    weight, share = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64), 0.3
    rows = nn.functional.one_hot(labels, 3).double()
    for gamma in (0.0, 2.0):
        first, second = (weighted_loss(logits, each, weight, gamma=gamma) for each in (labels, labels.flip(0)))
        mixed = weighted_loss(logits, share * rows + (1 - share) * rows.flip(0), weight, gamma=gamma)
        torch.testing.assert_close(mixed, share * first + (1 - share) * second, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.2, 1.0)])
def test_mixing_is_that_of_timm_and_follows_from_its_seed(mixup: float, cutmix: float) -> None:
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 3, 4])
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    found = [mix(images, labels, 5, mixup, cutmix, seed) for seed in ([7, 0, 0, 1], [7, 0, 0, 1], [7, 0, 0, 2])]
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]  # noqa: NPY002
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], found[2][0])
    np.random.seed(np.random.SeedSequence([7, 0, 0, 1]).generate_state(4))  # noqa: NPY002
    theirs = Mixup(mixup, cutmix, label_smoothing=0.0, num_classes=5)(images[:4] / 255, labels[:4])
    for ours, expected in zip(found[0], theirs, strict=True):
        assert torch.equal(ours[:4], expected)
    assert torch.equal(found[0][0][4], images[4] / 255)  # an odd one stays as it is
    assert found[0][1][4].tolist() == [0, 0, 0, 0, 1]
    assert torch.equal(mix(images[:1], labels[:1], 5, mixup, cutmix, [0])[0], images[:1] / 255)


def fitted(task: ClassificationTask, **options: Any) -> tuple[ClassificationTask, list[float]]:
    L.seed_everything(0)
    losses: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, idx: int) -> None:
            losses.append(float(outputs["loss"]))

    trainer(epochs=1, batches=2, callbacks=[Watch()]).fit(task, datamodule=data(**options))
    return task, losses


def test_counts_are_of_the_images_that_are_trained_on_and_validation_is_plain() -> None:
    L.seed_everything(0)
    module, task = data(), DeltaTuning([{"name": "bias"}], **BASE, class_weights="inv_sqrt", label_smoothing=0.1)
    first = next(iter(module.train_dataloader()))
    logits = task.eval()(first["image"]).detach()
    counts = np.bincount(module.split("train").labels, minlength=10)
    weight = class_weights("inv_sqrt", module.class_names, counts)
    expected = nn.functional.cross_entropy(logits, first["label"], weight.float(), label_smoothing=0.1)
    run = trainer(epochs=1, batches=1)
    run.fit(task, datamodule=module)
    assert float(run.callback_metrics["train/loss"]) == pytest.approx(float(expected), rel=1e-5)
    batch = module.split("val").batch(range(32))
    plain = nn.functional.cross_entropy(task.eval()(batch["image"]), batch["label"])
    assert float(run.callback_metrics["val/loss"]) == pytest.approx(float(plain), rel=1e-4)
    assert not [key for key in task.state_dict() if "weight" in key and "head" not in key and "model." not in key]


def test_micro_batches_have_the_weighted_mean_of_the_whole_batch() -> None:
    options: dict[str, Any] = {"class_weights": "balanced", "mixup": 0.5, "head_lr_scale": 3.0}
    found = [fitted(DeltaTuning([{"name": "bias"}], **BASE, **options, micro_batch=size)) for size in (None, 3)]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


@pytest.mark.parametrize("size", [5, 7])  # of 800 and 160 images: a last batch of fewer, and odd ones
def test_mixed_images_are_not_kept_and_every_batch_is_trained_on(size: int) -> None:
    task = LinearProbe(**BASE, cutmix=1.0)
    run = trainer(epochs=1, batches=3)
    L.seed_everything(0)
    run.fit(task, datamodule=data(batch_size=size, shots=1))
    assert task._kept is None or "train" not in task._kept[1]._stores
    assert run.global_step == -(-10 // size)


def test_mixing_is_the_same_in_a_run_that_is_repeated() -> None:
    first, second = (fitted(LinearProbe(**BASE, mixup=0.5, cutmix=1.0))[1] for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": "focall"}, UnknownNameError, "did you mean 'focal'"),
        ({"loss": "focal", "label_smoothing": 0.1}, ConfigError, "no part in the focal loss"),
        ({"loss": "focal", "focal_gamma": -1.0}, ConfigError, "focal_gamma must be a number of at least 0"),
        ({"label_smoothing": 1.0}, ConfigError, "leaves nothing of the labels"),
        ({"class_weights": "balance"}, UnknownNameError, "did you mean 'balanced'"),
        ({"class_weights": {"0": 0.0}}, ConfigError, "The class weight of '0' must be"),
        ({"mixup": -1.0}, ConfigError, "mixup must be a number of at least 0"),
        ({"mixup": 1e-9}, ConfigError, r"mixup must be a number of at least 0\.001"),
        ({"head_lr_scale": 0.0}, ConfigError, "head_lr_scale is positive"),
        ({"layer_decay": 1.5}, ConfigError, "layer_decay lies in"),
        ({"metrics": ["MulticlassF1"]}, UnknownNameError, "did you mean 'MulticlassF1Score'"),
        ({"metrics": [{"weights": "quadratic"}]}, ConfigError, "is a name, or has one"),
        ({"metrics": ["MulticlassF1Score"] * 2}, ConfigError, "MulticlassF1Score twice"),
        ({"metrics": [{"name": "MulticlassCohenKappa", "weights": "x"}]}, ConfigError, "refuses its arguments"),
        ({"metrics": [{"name": "MulticlassF1Score", "average": None}]}, ConfigError, "more than one number"),
        ({"metrics": ["MulticlassROC"]}, ConfigError, "more than one number"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PromptTuning(**BASE | options)


@pytest.mark.parametrize("options", [{"mixup": 0.5}, {"label_smoothing": 0.1}, {"loss": "focal"}], ids=str)
def test_the_exact_probe_refuses_other_losses_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(options))} has no effect with solver lbfgs"):
        LinearProbe(**BASE, solver="lbfgs", **options)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (lambda: LinearProbe(**BASE, head_lr_scale=2.0), "nothing trains besides the head: set base_lr"),
        (lambda: PromptTuning(**BASE, layer_decay=0.7), "not fine-tuned"),
        (lambda: LinearProbe(**BASE, class_weights={"ten": 2.0}), "Unknown class in class_weights 'ten'"),
    ],
)
def test_what_has_no_effect_is_refused_before_training(task: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, UnknownNameError), match=message):
        trainer(tmp_path).fit(task(), datamodule=data())


def test_rates_fall_from_head_to_embeddings_as_those_of_timm() -> None:
    task = FineTuning(**BASE | {"warmup": 0.0}, layer_decay=0.5, head_lr_scale=10.0)
    run = trainer(epochs=1, batches=1)
    run.fit(task, datamodule=data(batch_size=16))
    groups = run.optimizers[0].param_groups
    rates = {parameter: group["initial_lr"] / (0.02 * 16 / 256) for group in groups for parameter in group["params"]}
    model = task.model.backbone.model
    named = dict(model.named_parameters())
    assert rates[named["pos_embed"]] == rates[named["patch_embed.proj.weight"]] == pytest.approx(0.5**7)
    for block in range(6):
        assert rates[named[f"blocks.{block}.attn.qkv.weight"]] == pytest.approx(0.5 ** (6 - block))
    assert rates[task.model.head.weight] == rates[task.model.head.bias] == pytest.approx(10)
    model.head = nn.Linear(model.num_features, 10)  # type: ignore[arg-type]  # timm's own groups count it
    theirs = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=())
    for group in theirs:
        for parameter in group["params"]:
            if parameter in rates:
                assert rates[parameter] == pytest.approx(group["lr_scale"])
    decayed = {parameter for group in groups if group["weight_decay"] for parameter in group["params"]}
    assert all((parameter in decayed) == (parameter.ndim >= 2) for parameter in rates)


def test_layers_of_a_swin_are_numbered_too() -> None:
    numbers, last = layer_numbers(create_backbone("swin_nano_patch4_window8_64"))
    assert min(numbers.values()) == 0
    assert max(number for name, number in numbers.items() if name != "of the head") == last - 1


def test_segmentation_takes_rates() -> None:
    task = SegmentationTask(**BASE, full=True, layer_decay=0.5, head_lr_scale=2.0)
    task.check_fit(None)
    with pytest.raises(ConfigError, match="not fine-tuned"):
        SegmentationTask(**BASE, layer_decay=0.5).check_fit(None)


def test_named_metrics_are_those_of_torchmetrics_and_stand_in_the_record(tmp_path: Path) -> None:
    L.seed_everything(0)
    kappa = {"name": "MulticlassCohenKappa", "weights": "quadratic"}
    task = LinearProbe(**BASE, metrics=["MulticlassF1Score", kappa, "MulticlassAUROC"])
    run, module = trainer(tmp_path, epochs=1, batches=5, callbacks=[RunRecord()]), data()
    run.fit(task, datamodule=module)
    run.test(task, datamodule=module, verbose=False)
    batch = module.split("test").batch(range(16))
    logits = task.eval()(batch["image"]).detach()
    expected = {
        "test/f1_score": multiclass_f1_score(logits, batch["label"], 10),
        "test/cohen_kappa": multiclass_cohen_kappa(logits, batch["label"], 10, weights="quadratic"),
        "test/auroc": multiclass_auroc(logits.softmax(dim=1), batch["label"], 10),
    }
    record = json.loads((tmp_path / "run" / "0" / "run.json").read_text())
    assert {key: record["metrics"][key] for key in expected} == pytest.approx(
        {key: float(value) for key, value in expected.items()}, rel=1e-5
    )
    assert {"val/f1_score", "val/cohen_kappa", "val/auroc"} <= record["metrics"].keys()
    assert not [key for key in cell_protocol(record) if "metrics" in key or "mixup" in key]


def test_the_best_epoch_is_stamped_as_such(tmp_path: Path) -> None:
    """The best by the largest loss is the first epoch, where training lowers it."""
    L.seed_everything(0)
    keep = ModelCheckpoint(monitor="train/loss", mode="max", save_top_k=1)
    stop = EarlyStopping("val/loss", patience=5)
    writers = [RunRecord(), DeltaWriter(), keep, stop]
    task, run = LinearProbe(**BASE), trainer(tmp_path, epochs=3, batches=10, callbacks=writers)
    run.fit(task, datamodule=data())
    folder, last = tmp_path / "run" / "0", task.model.head.weight.detach().clone()
    run.test(task, datamodule=data(), ckpt_path="best", weights_only=True, verbose=False)
    record = json.loads((folder / "run.json").read_text())
    assert record["best"] == {"train/loss": Path(keep.best_model_path).name}
    assert (epoch_rule(record), record["evaluated"]["test"]["epochs"]) == ("best train/loss", 1)
    assert not torch.equal(task.model.head.weight, last)
    files = {name: load_classifier(folder / f"{name}.safetensors") for name in ("delta", "delta-best-train_loss")}
    assert torch.equal(files["delta"].head.weight, last)
    best = files["delta-best-train_loss"]
    assert torch.equal(best.head.weight, task.model.head.weight)
    assert (best.info["epoch_rule"], best.info["epochs"]) == ("best train/loss", 1)
    assert "metrics" not in best.info
    assert cell_protocol(record) | {"epoch rule": "last"} == cell_protocol({**record, "evaluated": {}, "best": {}})


def test_resuming_compares_with_checkpoints_from_before_these_options() -> None:
    record = protocol(trainer(), PromptTuning(**BASE))
    new = {"loss", "focal_gamma", "label_smoothing", "class_weights", "mixup", "cutmix", "metrics"}
    new |= {"head_lr_scale", "layer_decay", "ema_decay"}
    old = {**record, "hyperparameters": {k: v for k, v in record["hyperparameters"].items() if k not in new}}
    assert training_protocol(old) == training_protocol(record)
    assert cell_protocol(old) == cell_protocol(record)
    for name, value in {"mixup": 0.1, "loss": "focal", "class_weights": {"3": 2.0}, "ema_decay": 0.9}.items():
        changed = {**record, "hyperparameters": record["hyperparameters"] | {name: value}}
        assert training_protocol(changed) != training_protocol(record)


class Keep(L.Callback):
    """The head's bias after each step, before it is averaged."""

    def __init__(self) -> None:
        self.biases: list[NDArray[np.float64]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.biases.append(pl_module.model.head.bias.detach().double().numpy().copy())


@pytest.mark.parametrize("decay", [0.15, 0.9])
def test_the_average_of_weights_is_its_formula_and_what_is_validated_and_kept(decay: float, tmp_path: Path) -> None:
    L.seed_everything(0)
    task, keep = DeltaTuning([{"name": "bias"}], **BASE, ema_decay=decay), Keep()
    run = trainer(tmp_path, epochs=2, callbacks=[keep, RunRecord(), DeltaWriter()])
    run.fit(task, datamodule=data())
    average = np.zeros(10)  # where a head begins
    for step, bias in enumerate(keep.biases, start=1):
        share = min(decay, (1 + step) / (10 + step))
        average = share * average + (1 - share) * bias
    np.testing.assert_allclose(task.model.head.bias.detach().numpy(), average, rtol=1e-4, atol=1e-7)
    assert not np.allclose(average, keep.biases[-1], rtol=1e-3)
    kept = load_classifier(tmp_path / "run" / "0" / "delta.safetensors")
    assert all(torch.equal(tensor, task.model.owned()[name]) for name, tensor in kept.owned().items())
    batch = data().split("val").batch(range(32))
    expected = nn.functional.cross_entropy(task.eval()(batch["image"]), batch["label"])
    assert float(run.callback_metrics["val/loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_a_training_with_an_average_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    options: dict[str, Any] = BASE | {"ema_decay": 0.5}

    def leg(epochs: int, stop: int, checkpoint: Path | None = None) -> PromptTuning:
        L.seed_everything(0)
        task = PromptTuning(**options)
        keep = ModelCheckpoint(dirpath=tmp_path / str(stop), save_last=True)
        run = trainer(epochs=epochs, callbacks=[keep, _Stop(stop)])
        run.fit(task, datamodule=data(), ckpt_path=checkpoint, weights_only=True)
        return task

    whole, first = leg(3, 3), leg(3, 1)
    stored = torch.load(tmp_path / "1" / "last.ckpt", weights_only=True)["state_dict"]["model.head.weight"]
    assert torch.equal(stored, first.model.head.weight)
    resumed = leg(3, 3, tmp_path / "1" / "last.ckpt")
    for key, tensor in whole.model.owned().items():
        assert torch.equal(resumed.model.owned()[key], tensor), key


class _Stop(L.Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


@pytest.mark.parametrize("name", sorted(KNOWN["multiclass"]))
def test_every_name_gives_a_number_or_is_refused_in_a_sentence(name: str) -> None:
    given: Any = [{"name": name, "beta": 0.5} if "FBeta" in name else name]
    if name in _OF_SEVERAL:
        with pytest.raises(ConfigError, match=rf"^metrics: {name} "):
            named_metrics(given, 3)
        return
    (metric,) = named_metrics(given, 3).values()
    metric.update(torch.rand(2, 3), torch.tensor([0, 2]))
    assert metric.compute().ndim == 0
