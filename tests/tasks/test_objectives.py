"""Several labels an image, and numbers: losses and scores are their formulas, units are kept, files say what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from scipy.special import expit
from sklearn.metrics import average_precision_score, f1_score, r2_score
from torch import distributed, multiprocessing
from torchmetrics import Metric

from tests.fakes_targets import COLOURS, colour_table
from tests.tasks.test_tasks import trainer
from vpt.data import DigitsDataModule, FolderDataModule
from vpt.errors import ConfigError, DeltaFileError, UnknownNameError
from vpt.metrics.multilabel import f1_thresholds
from vpt.models import load_classifier, save_delta
from vpt.models.calibration import LabelThresholds, Residuals
from vpt.models.classifier import ValueHead
from vpt.models.delta_format import about, model_digest, read_calibration, read_delta, read_header, write_delta
from vpt.reports.evaluation import score_lines
from vpt.robustness.soups.model_soups import uniform
from vpt.run_record import cell_protocol
from vpt.tasks import DeltaTuning, DeltaWriter, FineTuning, LinearProbe, PromptTuning, RunRecord
from vpt.tasks.classification import ClassificationTask
from vpt.tasks.run_protocol import protocol
from vpt.tasks.targets.objectives import OBJECTIVES

TAGS: dict[str, Any] = {"label_column": list(COLOURS), "targets": "multilabel"}
LIGHT: dict[str, Any] = {"label_column": ["light", "share"], "targets": "regression"}


def data(folder: Path, **options: Any) -> FolderDataModule:
    return FolderDataModule(colour_table(folder), **{"image_size": 64, "batch_size": 8} | options)


def task(module: FolderDataModule, kind: type[ClassificationTask] = LinearProbe, **options: Any) -> ClassificationTask:
    defaults: dict[str, Any] = {"backbone": "vit_nano_patch8_64", "base_lr": 0.3, "num_classes": module.num_classes}
    return kind(**defaults | {"targets": module.targets} | options)


def trained(
    folder: Path, options: dict[str, Any], **more: Any
) -> tuple[ClassificationTask, FolderDataModule, L.Trainer]:
    L.seed_everything(0, verbose=False)
    module = data(folder, **options)
    own = task(module, **more)
    running = trainer(folder, epochs=4, batches=4, callbacks=[RunRecord(), DeltaWriter()])
    running.fit(own, datamodule=module)
    return own, module, running


def test_losses_are_their_formulas(tmp_path: Path) -> None:
    labels = task(data(tmp_path, **TAGS))
    outputs, truth = torch.randn(5, 3), torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    shares = expit(outputs.double().numpy())
    expected = -(truth.numpy() * np.log(shares) + (1 - truth.numpy()) * np.log(1 - shares)).mean()
    batch = {"label": truth.to(torch.uint8)}
    assert float(labels.loss(outputs, batch)) == pytest.approx(expected, rel=1e-5)
    numbers = task(data(tmp_path, **LIGHT))
    assert isinstance(numbers.model.head, ValueHead)
    numbers.model.head.scale.copy_(torch.tensor([2.0, 0.5]))
    values, right = torch.randn(5, 2), torch.randn(5, 2)
    missed = (((values - right) / torch.tensor([2.0, 0.5])) ** 2).mean()
    torch.testing.assert_close(numbers.loss(values, {"label": right}), missed)


@pytest.mark.parametrize("kind", [PromptTuning, LinearProbe, FineTuning])
def test_every_method_learns_several_labels(tmp_path: Path, kind: type[ClassificationTask]) -> None:
    own, module, running = trained(tmp_path, TAGS, kind=kind, base_lr=0.03 if kind is FineTuning else 0.3)
    running.test(own, datamodule=module, verbose=False)
    split = module.split("test")
    with torch.inference_mode():
        outputs = own.eval()(split.batch(range(len(split)))["image"]).numpy()[: 8 * 2]
    truth = split.labels[: len(outputs)]
    metrics = running.callback_metrics
    assert float(metrics["test/mean_ap"]) == pytest.approx(
        average_precision_score(truth, outputs, average="macro"), abs=1e-5
    )
    assert float(metrics["test/f1"]) == pytest.approx(f1_score(truth, outputs > 0, average="macro"), abs=1e-5)
    assert float(metrics["test/mean_ap"]) > truth.mean() + 0.1  # that of a random order
    kept = own.tally.compute()
    np.testing.assert_allclose(kept[0].numpy(), outputs, atol=1e-4)
    np.testing.assert_array_equal(kept[1].numpy(), truth)


def test_numbers_are_learned_in_their_own_units(tmp_path: Path) -> None:
    own, module, running = trained(tmp_path, LIGHT)
    running.test(own, datamodule=module, verbose=False)
    split = module.split("test")
    with torch.inference_mode():
        outputs = own.eval()(split.batch(range(len(split)))["image"]).numpy()
    metrics = running.callback_metrics
    assert float(metrics["test/mae"]) == pytest.approx(np.abs(outputs - split.labels).mean(), rel=1e-5)
    assert float(metrics["test/r2"]) == pytest.approx(r2_score(split.labels, outputs), abs=1e-5)
    assert float(metrics["test/r2"]) > 0.2
    mean, scale = module.value_scale()
    head = own.model.head
    assert isinstance(head, ValueHead)
    assert (head.offset.tolist(), head.scale.tolist()) == (mean.tolist(), scale.tolist())


def test_other_units_train_the_same_head(tmp_path: Path) -> None:
    found = []
    for name, scale, offset in (("one", 1.0, 0.0), ("other", 4096.0, 65536.0)):
        L.seed_everything(0, verbose=False)
        file = colour_table(tmp_path / name, scale=scale, offset=offset)
        module = FolderDataModule(file, image_size=64, batch_size=8, label_column="light", targets="regression")
        own = task(module)
        running = trainer(epochs=2, batches=4)
        running.fit(own, datamodule=module)
        outputs = own.eval()(module.split("test").batch([0, 1])["image"]).detach()
        found.append((own.model.head.weight.detach(), outputs, float(running.callback_metrics["val/r2"])))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=2e-3)
    torch.testing.assert_close(65536 + 4096 * found[0][1], found[1][1], rtol=0, atol=20)
    assert found[0][2] == pytest.approx(found[1][2], abs=0.01)


def test_a_run_and_its_file_say_what_an_image_is_labelled_with(tmp_path: Path) -> None:
    own, module, running = trained(tmp_path, TAGS, kind=DeltaTuning, deltas=[{"name": "lora", "rank": 2}])
    folder = Path(str(running.log_dir))
    record = json.loads((folder / "run.json").read_text())
    assert record["data"]["targets"] == record["hyperparameters"]["targets"] == "multilabel"
    assert cell_protocol(record)["data.targets"] == "multilabel"
    header, tensors = read_delta(folder / "delta.safetensors")
    assert header["targets"] == "multilabel"
    assert about(own.model)["targets"] == "multilabel"
    loaded = load_classifier(folder / "delta.safetensors")
    images = module.split("test").batch([0, 1, 2])["image"]
    assert torch.equal(loaded(images), own.eval()(images))
    assert model_digest(header, tensors) != model_digest({k: v for k, v in header.items() if k != "targets"}, tensors)
    found = loaded.predict(images)
    assert isinstance(found, list)
    shares = expit(loaded(images).double().numpy())
    for each, row in zip(found, shares, strict=True):
        assert set(each.labels or ()) == {name for name, share in zip(COLOURS, row, strict=True) if share >= 0.5}
        assert each.probability == pytest.approx(row.max(), rel=1e-12)
    with pytest.raises(ConfigError, match="max_risk is not known of a model of multilabel targets"):
        loaded.predict(images, max_risk=0.1)


def test_numbers_are_saved_and_loaded_with_their_units(tmp_path: Path) -> None:
    own, module, running = trained(tmp_path, LIGHT)
    loaded = load_classifier(Path(str(running.log_dir)) / "delta.safetensors")
    images = module.split("test").batch([0, 1, 2])["image"]
    assert torch.equal(loaded(images), own.eval()(images))
    first = loaded.predict(images[0])
    assert not isinstance(first, list)
    assert list(first.values or ()) == ["light", "share"]
    assert list((first.values or {}).values()) == pytest.approx(loaded(images)[0].tolist(), rel=1e-5)
    assert read_header(save_delta(tmp_path / "again.safetensors", loaded))["targets"] == "regression"
    probe = task(
        module, init_head=str(Path(str(running.log_dir)) / "delta.safetensors"), kind=PromptTuning, base_lr=1e-9
    )
    trainer(epochs=1, batches=1).fit(probe, datamodule=module)
    torch.testing.assert_close(probe.model.head.weight, loaded.head.weight, rtol=0, atol=1e-6)


def test_thresholds_and_margins_are_kept_in_the_file_and_used(tmp_path: Path) -> None:
    _, module, running = trained(tmp_path, TAGS)
    path = Path(str(running.log_dir)) / "delta.safetensors"
    header, tensors = read_delta(path)
    said = {"model": model_digest(header, tensors), "data": {}}
    limits = torch.tensor([-100.0, 100.0, 0.0])
    write_delta(path, header, tensors, LabelThresholds(said, {"thresholds": limits}))
    loaded = load_classifier(path)
    images = module.split("test").batch([0, 1])["image"]
    for each in loaded.predictions(images):
        assert "red" in (each.labels or ())
        assert "green" not in (each.labels or ())
    assert about(loaded)["calibration"]["label_thresholds"] == pytest.approx([0.0, 1.0, 0.5])
    for odd in ({"thresholds": torch.tensor([0.5, 0.5])}, {"residuals": torch.ones(3, 3)}):
        with pytest.raises(DeltaFileError, match="cannot be read"):
            write_delta(path, header, tensors, LabelThresholds(said, odd))
    assert isinstance(read_calibration(path), LabelThresholds)
    residuals = Residuals({}, {"residuals": torch.arange(1.0, 20.0)[:, None].expand(19, 2)})
    assert residuals.margins(0.9).tolist() == [18.0, 18.0]  # the ⌈20 · 0.9⌉-th smallest
    assert "0.99" not in residuals.told()["margins"]
    with pytest.raises(ConfigError, match=r"do not suffice for a coverage of 0\.99"):
        residuals.margins(0.99)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mixup": 0.2}, "mixup is of images with one class each, and the targets are multilabel"),
        ({"label_smoothing": 0.1}, "label_smoothing is of images with one class each"),
        ({"class_weights": "balanced"}, "class_weights is of images with one class each"),
        ({"loss": "focal"}, "loss is of images with one class each"),
        ({"solver": "lbfgs"}, "solver lbfgs is of images with one class each"),
        ({"num_classes": 0}, "it must be at least 1 for this task"),
    ],
)
def test_options_of_one_class_an_image_are_refused(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        task(data(tmp_path, **TAGS), **options)


def test_targets_that_do_not_exist_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Unknown targets 'several'"):
        task(data(tmp_path, **TAGS), targets="several")


def test_data_and_model_agree_about_the_targets(tmp_path: Path) -> None:
    module = data(tmp_path, **TAGS)
    with pytest.raises(ConfigError, match="The data have multilabel targets, the model multiclass"):
        trainer().fit(task(module, targets=None), datamodule=module)
    with pytest.raises(ConfigError, match="The data have multiclass targets, the model regression"):
        trainer().fit(task(module, targets="regression", num_classes=10), datamodule=DigitsDataModule())


def test_metrics_by_name_are_of_the_targets(tmp_path: Path) -> None:
    _, module, running = trained(tmp_path, TAGS, metrics=["MultilabelHammingDistance"])
    assert 0 < float(running.callback_metrics["val/hamming_distance"]) < 0.5
    numbers, _, running = trained(
        tmp_path / "n", {"label_column": "light", "targets": "regression"}, metrics=["SpearmanCorrCoef"]
    )
    assert float(running.callback_metrics["val/spearman_corr_coef"]) > 0
    with pytest.raises(UnknownNameError, match="MulticlassF1Score"):
        task(module, metrics=["MulticlassF1Score"])
    assert protocol(running, numbers)["data"]["targets"] == "regression"


def test_the_determination_of_one_image_is_not_recorded(tmp_path: Path) -> None:
    module = data(tmp_path, **LIGHT, batch_size=1)
    own = task(module)
    running = L.Trainer(
        accelerator="cpu", max_epochs=1, limit_train_batches=2, limit_val_batches=1, logger=False, barebones=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    running.fit(own, datamodule=module)
    assert bool(running.callback_metrics["val/r2"].isnan())
    assert float(running.callback_metrics["val/mae"]) > 0


def test_a_threshold_of_the_validation_images_is_between_two_of_them() -> None:
    logits = np.array([[20.0], [18.0], [16.5], [5.0]], dtype=np.float32)  # probabilities of 1 in single precision
    assert f1_thresholds(logits, np.array([[1], [1], [0], [0]])).tolist() == [17.25]


def test_a_class_without_images_does_not_count_and_half_precision_ranks_as_single() -> None:
    scores = OBJECTIVES["multilabel"].metrics(3, [])
    logits, labels = torch.randn(50, 3) * 8, torch.randint(0, 2, (50, 3))
    labels[:, 1] = 0
    for metric in scores.values():
        assert isinstance(metric, Metric)
        metric.update(logits.bfloat16()[:30], labels[:30])
        metric.update(logits.bfloat16()[30:], labels[30:])
    rounded, there = logits.bfloat16().double().numpy()[:, [0, 2]], labels.numpy()[:, [0, 2]]
    found = {name: float(metric.compute()) for name, metric in scores.items() if isinstance(metric, Metric)}
    assert found["mean_ap"] == pytest.approx(average_precision_score(there, rounded, average="macro"), abs=1e-6)
    assert found["f1"] == pytest.approx(f1_score(there, rounded >= 0, average="macro"), abs=1e-6)
    (line,) = score_lines({"test/mean_ap": found["mean_ap"]}, (logits.bfloat16().float().numpy(), labels.numpy()))
    low, high = (float(each) for each in line.partition("95 %: ")[2].rstrip(")").split(" to "))
    assert low <= 100 * found["mean_ap"] <= high


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-3, 0.0), (1.0, 1e5), (1e6, 1.7e9)])
def test_the_determination_does_not_depend_on_units(scale: float, offset: float) -> None:
    metric = OBJECTIVES["regression"].metrics(1, [])["r2"]
    assert isinstance(metric, Metric)
    truth = torch.randn(200, 1)
    guess = truth + 0.6 * torch.randn(200, 1)
    as_given = [(scale * each.double() + offset).float() for each in (guess, truth)]
    metric.update(*as_given)
    assert float(metric.compute()) == pytest.approx(r2_score(*(each.double() for each in reversed(as_given))), abs=1e-6)


def test_one_label_alone_is_learned(tmp_path: Path) -> None:
    own, module, running = trained(tmp_path, {"label_column": ["red"], "targets": "multilabel"})
    running.test(own, datamodule=module, verbose=False)
    assert float(running.callback_metrics["test/mean_ap"]) > 0.5


def test_a_checkpoint_of_other_targets_is_refused(tmp_path: Path) -> None:
    own, _, running = trained(tmp_path, TAGS)
    running.save_checkpoint(tmp_path / "tags.ckpt")
    other = LinearProbe(backbone="vit_nano_patch8_64", num_classes=3)
    with pytest.raises(ConfigError, match="The checkpoint is of multilabel targets, the model of multiclass"):
        other.on_load_checkpoint(torch.load(tmp_path / "tags.ckpt", weights_only=True))
    assert own.targets == "multilabel"


def test_labels_that_are_none_of_the_targets_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"The labels of digits/.* are not multilabel"):
        DigitsDataModule(targets="multilabel")


def test_units_are_not_rounded(tmp_path: Path) -> None:
    own, _, _ = trained(tmp_path, LIGHT)
    for call in (own.model.half, own.model.bfloat16):
        with pytest.raises(ConfigError, match="has single precision at least"):
            call()
    assert own.model.double().head.weight.dtype == torch.float64


def test_soups_are_of_one_kind_of_targets(tmp_path: Path) -> None:
    own, _, _ = trained(tmp_path, TAGS)
    own.model.info = {}
    one = save_delta(tmp_path / "a.safetensors", own.model)
    header, tensors = read_delta(one)
    two = write_delta(tmp_path / "b.safetensors", {k: v for k, v in header.items() if k != "targets"}, tensors)
    with pytest.raises(ConfigError, match="differ in their targets"):
        uniform([one, two], tmp_path / "out.safetensors")


def test_what_is_watched_must_be_measured(tmp_path: Path) -> None:
    module = data(tmp_path, **LIGHT)
    for watching in (EarlyStopping("val/acc"), ModelCheckpoint(monitor="val/acc", dirpath=tmp_path)):
        with pytest.raises(UnknownNameError, match=r"watches 'val/acc'.*val/mae"):
            trainer(callbacks=[watching]).fit(task(module), datamodule=module)


def test_a_file_that_contradicts_its_run_is_refused(tmp_path: Path) -> None:
    _, _, running = trained(tmp_path, TAGS)
    path = Path(str(running.log_dir)) / "delta.safetensors"
    header, tensors = read_delta(path)
    write_delta(path, {key: value for key, value in header.items() if key != "targets"}, tensors)
    with pytest.raises(DeltaFileError, match="no valid targets"):
        load_classifier(path)
    _, _, running = trained(tmp_path / "n", LIGHT)
    path = Path(str(running.log_dir)) / "delta.safetensors"
    header, tensors = read_delta(path)
    write_delta(path, header, tensors | {"head.scale": torch.tensor([1.0, 0.0])})
    with pytest.raises(DeltaFileError, match="units that are not positive"):
        load_classifier(path)


def test_metrics_of_several_numbers_are_means_over_them(tmp_path: Path) -> None:
    _, module, running = trained(tmp_path, LIGHT, metrics=["MeanSquaredError"])
    assert float(running.callback_metrics["val/mean_squared_error"]) > 0
    with pytest.raises(ConfigError, match="PearsonCorrCoef"):
        task(module, metrics=["PearsonCorrCoef"])


def scores_of_two(rank: int, folder: str) -> None:
    """Answers in shares of 4 and 2, then all of them in the first process, by each of two."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {}
    for kind in ("multilabel", "regression"):
        generator = torch.Generator().manual_seed(0)
        outputs = torch.randn(6, 2, generator=generator)
        labels = torch.randn(6, 2, generator=generator)
        labels = (labels > 0).long() if kind == "multilabel" else labels
        for name, metric in OBJECTIVES[kind].metrics(2, []).items():
            for way, shares in {"both": (slice(4), slice(4, 6)), "one": (slice(6), None)}.items():
                assert isinstance(metric, Metric)
                metric.reset()
                if (own := shares[rank]) is not None:
                    metric.update(outputs[own], labels[own])
                found[f"{kind} {name} {way}"] = float(metric.compute())
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def test_processes_agree_also_where_one_has_no_images(tmp_path: Path) -> None:
    multiprocessing.spawn(scores_of_two, (str(tmp_path),), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    for name, value in first.items():
        assert value == first[name.replace("one", "both")]
