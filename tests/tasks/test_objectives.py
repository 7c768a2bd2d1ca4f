"""Several labels an image, and numbers: losses and scores are their formulas, units are kept, files say what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.metrics import average_precision_score, f1_score, r2_score

from tests.fakes_targets import COLOURS, colour_table
from tests.tasks.test_tasks import trainer
from vpt.data import DigitsDataModule, FolderDataModule
from vpt.errors import ConfigError, DeltaFileError, UnknownNameError
from vpt.metrics.multilabel import f1_thresholds
from vpt.models import load_classifier, save_delta
from vpt.models.calibration import LabelThresholds, Residuals
from vpt.models.classifier import ValueHead
from vpt.models.delta_format import about, model_digest, read_calibration, read_delta, read_header, write_delta
from vpt.run_record import cell_protocol
from vpt.tasks import DeltaTuning, DeltaWriter, FineTuning, LinearProbe, PromptTuning, RunRecord
from vpt.tasks.classification import ClassificationTask
from vpt.tasks.run_protocol import protocol

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
        trainer(epochs=2, batches=4).fit(own, datamodule=module)
        found.append((own.model.head.weight.detach(), own.eval()(module.split("test").batch([0, 1])["image"]).detach()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=2e-3)
    torch.testing.assert_close(65536 + 4096 * found[0][1], found[1][1], rtol=0, atol=20)


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
    write_delta(path, header, tensors, LabelThresholds(said, {"thresholds": torch.tensor([0.0, 1.0, 0.5])}))
    loaded = load_classifier(path)
    images = module.split("test").batch([0, 1])["image"]
    for each in loaded.predictions(images):
        assert "red" in (each.labels or ())
        assert "green" not in (each.labels or ())
    assert about(loaded)["calibration"]["label_thresholds"] == [0.0, 1.0, 0.5]
    fewer, larger = torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.5, 2.0])
    for odd in ({"thresholds": fewer}, {"thresholds": larger}, {"residuals": torch.ones(3, 3)}):
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
        ({"num_classes": 0}, "a task has at least one class"),
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
    shares = np.array([[0.9], [0.6], [0.4], [0.1]])
    assert f1_thresholds(shares, np.array([[1], [1], [0], [0]])).tolist() == [pytest.approx(0.5)]
