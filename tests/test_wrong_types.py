"""The table of wrong arguments in Python: one sentence each that says what is wanted, and no error of another library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
from torch import nn

import vpt
from tests.fakes import make_task
from vpt import backbones, data, deltas, export, hub, metrics, models, robustness, visualize
from vpt.backbones import create_backbone
from vpt.errors import (
    ConfigError,
    DataError,
    DeltaFileError,
    ExportError,
    HubError,
    UnknownNameError,
    UnsupportedBackboneError,
    VPTError,
    WeightsError,
)
from vpt.hub import client
from vpt.metrics import accuracy, calibration, effective_robustness, logits, summary
from vpt.models.logistic_regression import choose_l2, fit_logistic
from vpt.models.segmenter import DenseModel
from vpt.reports.style import save_figure

NANO = "vit_nano_patch8_64"


class Given(NamedTuple):
    """What the calls of the table are made with."""

    here: Path
    backbone: backbones.Backbone
    model: models.TunedModel
    delta: Path
    digits: data.DigitsDataModule


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    here = tmp_path_factory.mktemp("types")
    backbone = create_backbone(NANO, "random")
    model = models.TunedModel(create_backbone(NANO, "random"), 3, [{"name": "prompt", "num_tokens": 2}]).eval()
    file = vpt.save_delta(here / "delta.safetensors", model)
    return Given(here, backbone, model, file, data.DigitsDataModule())


class Wrong(NamedTuple):
    """A call, what is wrong with it, and the class of the error and what its sentence says."""

    call: Callable[[Given], Any]
    wrong: str
    error: type[VPTError]
    says: str


def make(*args: Any, **options: Any) -> Callable[[Given], Any]:
    return lambda given: create_backbone(*args, **options)


def images(value: Any) -> Callable[[Given], Any]:
    return lambda given: given.backbone(value)


def attached(specs: Any) -> Callable[[Given], Any]:
    return lambda given: vpt.attach(given.backbone, specs)


def loaded(path: Any, **options: Any) -> Callable[[Given], Any]:
    return lambda given: vpt.load(path, **options)


TABLE, LABELS = np.array([[0.1, 0.9], [0.8, 0.2]], dtype=np.float32), np.array([1, 0])
SURE, RIGHT = np.array([0.9, 0.6]), np.array([True, False])
UINT8 = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
PATH = "a path that can exist"

BACKBONES = [
    Wrong(make(None), "no name", ConfigError, "name of create_backbone must be text, got None"),
    Wrong(make(3), "a number as name", ConfigError, "name of create_backbone must be text, got 3"),
    Wrong(make(["vit"]), "a list as name", ConfigError, "name of create_backbone must be text"),
    Wrong(make(nn.Linear(2, 2)), "a layer as name", ConfigError, "must be text, got a Linear"),
    Wrong(make(""), "an empty name", UnknownNameError, "Unknown backbone ''"),
    Wrong(make("vit_nano_patch8"), "a name misspelt", UnknownNameError, "did you mean 'vit_nano_patch8_64'"),
    Wrong(make(NANO, None), "no weights", ConfigError, "weights of create_backbone must be text or a path"),
    Wrong(make(NANO, 3), "a number as weights", ConfigError, "weights of create_backbone must be text or a path"),
    Wrong(make(NANO, "a\0b"), "a NUL in a path", ConfigError, PATH),
    Wrong(make(NANO, "n" * 300), "a path too long", ConfigError, PATH),
    Wrong(make(NANO, "random:x"), "a seed that is none", WeightsError, "whole number N as seed"),
    Wrong(make(NANO, "/"), "a folder as weights", WeightsError, "No weights file /, which is a folder"),
    Wrong(make(NANO, image_size=64.5), "half a pixel", ConfigError, "image_size of create_backbone must be a whole"),
    Wrong(make(NANO, image_size="64"), "a size as text", ConfigError, "must be a whole number or None, got '64'"),
    Wrong(make(NANO, image_size=True), "a size that is true", ConfigError, "must be a whole number or None, got True"),
    Wrong(make(NANO, image_size=0), "no pixels", ConfigError, "at least 1, or None, got 0"),
    Wrong(make(NANO, image_size=-64), "less than none", ConfigError, "at least 1, or None, got -64"),
    Wrong(make(NANO, image_size=(64, 64)), "two sizes", ConfigError, "must be a whole number or None, got (64, 64)"),
    Wrong(make(NANO, image_size=float("nan")), "NaN pixels", ConfigError, "must be a whole number or None, got nan"),
    Wrong(make(NANO, normalization=None), "no statistics", ConfigError, "normalization of create_backbone must be"),
    Wrong(make(NANO, pool=3), "a pool that is a number", ConfigError, "pool of create_backbone must be text or None"),
    Wrong(lambda _: backbones.input_size(None), "no name", ConfigError, "name of input_size must be text"),  # type: ignore[arg-type]
    Wrong(lambda _: backbones.pretrained_head(3), "a number", ConfigError, "name of pretrained_head must be text"),  # type: ignore[arg-type]
    Wrong(lambda _: backbones.pretrained_head(NANO, "random"), "random", WeightsError, "no pretrained classifier"),
    Wrong(lambda g: backbones.class_attention(g.model, UINT8), "a model", ConfigError, "must be a Backbone, which vpt"),  # type: ignore[arg-type]
    Wrong(lambda _: backbones.recording("x"), "a text", ConfigError, "backbone of recording must be a Backbone"),  # type: ignore[arg-type]
]

IMAGES = [
    Wrong(images(np.zeros((2, 3, 64, 64), np.uint8)), "NumPy", ConfigError, "Images are a tensor (B, 3, H, W), got a nd"),
    Wrong(images([UINT8[0], UINT8[1]]), "a list", ConfigError, "Images are a tensor (B, 3, H, W), got"),
    Wrong(images([]), "an empty list", ConfigError, "Images are a tensor (B, 3, H, W), got []"),
    Wrong(images(None), "nothing", ConfigError, "Images are a tensor (B, 3, H, W), got None"),
    Wrong(images(UINT8[0]), "one image", ConfigError, "(B, 3, 64, 64), got (3, 64, 64)"),
    Wrong(images(UINT8.permute(0, 2, 3, 1)), "channels last", ConfigError, "(B, 3, 64, 64), got (2, 64, 64, 3)"),
    Wrong(images(UINT8[:, :, :32]), "half images", ConfigError, "(B, 3, 64, 64), got (2, 3, 32, 64)"),
    Wrong(images(UINT8.float() + 255), "floats to 255", ConfigError, "divide them by 255"),
    Wrong(images(UINT8.float() - 1), "negative floats", ConfigError, "Images of floats lie in [0, 1]"),
    Wrong(images(UINT8.float() / 0), "NaN", ConfigError, "Images hold NaN"),
    Wrong(images(UINT8.long() + 256), "integers above 255", ConfigError, "Images of integers lie in [0, 255]"),
    Wrong(images(UINT8.bool()), "bool", ConfigError, "got torch.bool: convert them"),
    Wrong(images(UINT8.to("meta")), "another device", ConfigError, "Images lie on meta, the backbone on cpu"),
    Wrong(lambda g: g.model([1]), "a list for a model", ConfigError, "Images are a tensor (B, 3, H, W), got [1]"),
]

DELTAS = [
    Wrong(lambda _: vpt.attach(timm.create_model("vit_tiny_patch16_224"), "lora"), "a timm model", ConfigError, "must be a Backbone, which vpt.create_backbone makes, got a VisionTransformer"),  # type: ignore[arg-type]
    Wrong(lambda _: vpt.attach(nn.Linear(2, 2), "lora"), "a layer", ConfigError, "makes, got a Linear"),  # type: ignore[arg-type]
    Wrong(lambda _: vpt.attach(NANO, "lora"), "a name", ConfigError, f"makes, got '{NANO}'"),  # type: ignore[arg-type]
    Wrong(lambda _: vpt.attach(None, "lora"), "nothing", ConfigError, "makes, got None"),  # type: ignore[arg-type]
    Wrong(lambda g: vpt.attach(g.model, "lora"), "a model", ConfigError, "makes, got a TunedModel"),  # type: ignore[arg-type]
    Wrong(attached(None), "no parts", ConfigError, "A delta is a list of its parts"),
    Wrong(attached([]), "an empty list", ConfigError, "An empty delta changes nothing"),
    Wrong(attached({}), "an empty dict", ConfigError, "A part of a delta is a dict with a name"),
    Wrong(attached("prompts"), "a name misspelt", UnknownNameError, "did you mean 'prompt'"),
    Wrong(attached(["lora", 3]), "a number among names", ConfigError, "A part of a delta is a dict with a name"),
    Wrong(attached("prompt"), "a name without its number", ConfigError, "Delta 'prompt' needs num_tokens"),
    Wrong(attached({"name": "prompt", "num_tokens": "4"}), "text", ConfigError, "num_tokens of delta 'prompt' must be"),
    Wrong(attached({"name": "prompt", "num_tokens": 0}), "no prompts", ConfigError, "num_tokens must be at least 1"),
    Wrong(attached({"name": "lora", "scale": float("nan")}), "NaN", ConfigError, "scale of delta 'lora' must be a num"),
    Wrong(lambda _: deltas.Delta(None, ["lora"]), "nothing", ConfigError, "must be a Backbone"),  # type: ignore[arg-type]
    Wrong(lambda _: deltas.DeltaSpec.read(3), "a number", ConfigError, "A part of a delta is a dict with a name"),
    Wrong(lambda _: deltas.register_delta("x")(nn.Linear), "a layer", ConfigError, "is no class that is derived"),  # type: ignore[type-var]
    Wrong(lambda _: deltas.register_delta(3), "a number", ConfigError, "name of register_delta must be text"),  # type: ignore[arg-type]
    Wrong(lambda g: g.model.set_strength("0.5"), "text", ConfigError, "strength is a number between 0"),  # type: ignore[arg-type]
    Wrong(lambda g: g.model.set_strength(float("nan")), "NaN", ConfigError, "strength is a number between 0"),
    Wrong(lambda g: g.model.set_strength(2), "two", ConfigError, "strength is a number between 0"),
    Wrong(lambda g: g.model.set_strength(None), "nothing", ConfigError, "strength is a number between 0"),  # type: ignore[arg-type]
    Wrong(lambda g: g.model.set_strength(True), "true", ConfigError, "strength is a number between 0"),
]

MODELS = [
    Wrong(loaded(None), "no file", ConfigError, "path of load must be text or a path that can exist, got None"),
    Wrong(loaded(3), "a number", ConfigError, "path of load must be text or a path"),
    Wrong(loaded(b"x"), "bytes", ConfigError, "path of load must be text or a path"),
    Wrong(loaded(""), "an empty path", ConfigError, PATH),
    Wrong(loaded("a\0b"), "a NUL", ConfigError, PATH),
    Wrong(loaded(Path("a\0b")), "a NUL in a Path", ConfigError, PATH),
    Wrong(loaded("n" * 300), "a path too long", ConfigError, PATH),
    Wrong(loaded("\ud800"), "half a letter", ConfigError, PATH),
    Wrong(loaded("/nowhere"), "no such file", DeltaFileError, "No delta file /nowhere"),
    Wrong(loaded("/"), "a folder", DeltaFileError, "/ is a folder: name the delta.safetensors of a run"),
    Wrong(loaded(__file__), "another file", DeltaFileError, "is not a delta file"),
    Wrong(loaded("hf://ann"), "half an address", HubError, "is no address on the hub"),
    Wrong(lambda g: vpt.load(g.delta, 3), "a number as weights", ConfigError, "weights of load must be text or a path"),  # type: ignore[arg-type]
    Wrong(lambda g: vpt.load(g.delta, "/"), "a folder as weights", WeightsError, "No weights file /, which is a folder"),
    Wrong(lambda g: vpt.load_segmentation(g.delta), "a classifier", DeltaFileError, "holds a classifier"),
    Wrong(lambda _: vpt.load_segmentation(None), "no file", ConfigError, "path of load_segmentation must be"),  # type: ignore[arg-type]
    Wrong(lambda _: models.load_classifier(None), "no file", ConfigError, "path of load_classifier must be"),  # type: ignore[arg-type]
    Wrong(lambda g: vpt.save_delta(None, g.model), "no file", ConfigError, "path of save_delta must be"),  # type: ignore[arg-type]
    Wrong(lambda g: vpt.save_delta("", g.model), "an empty path", ConfigError, PATH),
    Wrong(lambda g: vpt.save_delta(g.here / "x", nn.Linear(2, 2)), "a layer", ConfigError, "must be an AdaptedModel"),  # type: ignore[arg-type]
    Wrong(lambda g: vpt.save_delta(g.here / "x", g.backbone), "a backbone", ConfigError, "must be an AdaptedModel"),  # type: ignore[arg-type]
    Wrong(lambda _: models.TunedModel(NANO, 3), "a name", ConfigError, "backbone of TunedModel must be a Backbone"),  # type: ignore[arg-type]
    Wrong(lambda g: models.TunedModel(g.backbone, 2.5), "half a class", ConfigError, "num_classes of TunedModel must"),  # type: ignore[arg-type]
    Wrong(lambda g: models.TunedModel(g.backbone, 0), "no class", ConfigError, "num_classes must be at least 1, got 0"),
    Wrong(lambda g: models.TunedModel(g.backbone, 2, (), "ab"), "text", ConfigError, "class_names of TunedModel must be"),
    Wrong(lambda g: models.TunedModel(g.backbone, 2, (), [1, 2]), "numbers", ConfigError, "a list (each text)"),  # type: ignore[list-item]
    Wrong(lambda g: models.TunedModel(g.backbone, 2, (), ["a"]), "a name too few", ConfigError, "1 class names were"),
    Wrong(lambda g: models.TunedModel(g.backbone, 2, 3), "a number", ConfigError, "specs of TunedModel must be"),  # type: ignore[arg-type]
    Wrong(lambda g: DenseModel(g.backbone, 2, kind=None), "no head", ConfigError, "kind of DenseModel must be text"),  # type: ignore[arg-type]
    Wrong(lambda g: vpt.PromptBank([g.delta]), "no names", ConfigError, "must be a mapping from text to text or a path"),  # type: ignore[arg-type]
    Wrong(lambda g: vpt.PromptBank([("a", g.delta), ("a", g.delta)]), "doubled", ConfigError, "must be a mapping"),  # type: ignore[arg-type]
    Wrong(lambda g: vpt.PromptBank({1: g.delta}), "a number as name", ConfigError, "must be a mapping from text"),  # type: ignore[dict-item]
    Wrong(lambda _: vpt.PromptBank({}), "no file", ConfigError, "A bank needs at least one delta file"),
    Wrong(lambda _: vpt.PromptBank({"a": None}), "None as file", ConfigError, "must be a mapping from text"),  # type: ignore[dict-item]
    Wrong(lambda g: vpt.PromptBank({"a": g.delta})(UINT8, ["b", "a"]), "no such task", UnknownNameError, "Unknown task"),
    Wrong(lambda g: vpt.PromptBank({"a": g.delta})(UINT8, "a"), "text", ConfigError, "tasks is a list with the name"),
    Wrong(lambda g: vpt.PromptBank({"a": g.delta})([1], ["a"]), "a list", ConfigError, "Images are a tensor"),  # type: ignore[arg-type]
    Wrong(lambda _: fit_logistic([1], torch.zeros(1), 2, 0.1), "a list", ConfigError, "features of fit_logistic must be"),  # type: ignore[arg-type]
    Wrong(lambda _: fit_logistic(torch.eye(2), torch.tensor([0, 2]), 2, 0.1), "a label", ConfigError, "in [0, 2)"),
    Wrong(lambda _: fit_logistic(torch.eye(2), torch.tensor([0]), 2, 0.1), "one label", ConfigError, "one label a row"),
    Wrong(lambda _: client.push("x", "ann"), "half a name", HubError, "is no name of a repository"),
    Wrong(lambda _: client.push(None, "ann/x"), "no file", ConfigError, "delta of push must be"),  # type: ignore[arg-type]
]

DATA = [
    Wrong(lambda _: vpt.DigitsDataModule(image_size=64.5), "half a pixel", ConfigError, "image_size of DigitsDataModule"),  # type: ignore[arg-type]
    Wrong(lambda _: vpt.DigitsDataModule(batch_size="8"), "text", ConfigError, "batch_size of DigitsDataModule must be"),
    Wrong(lambda _: vpt.DigitsDataModule(preset="x"), "no preset", UnknownNameError, "Unknown preset 'x'"),
    Wrong(lambda _: vpt.DigitsDataModule(shots=2.5), "half a shot", ConfigError, "shots of DigitsDataModule must be"),
    Wrong(lambda _: vpt.ShapesDataModule(3), "a number", ConfigError, "label of ShapesDataModule must be text"),  # type: ignore[arg-type]
    Wrong(lambda _: vpt.ShapeScenesDataModule(seed=-1), "a seed", ConfigError, "seed is -1; it must be at least 0"),
    Wrong(lambda _: vpt.FolderDataModule(None), "no folder", ConfigError, "root of FolderDataModule must be text or"),  # type: ignore[arg-type]
    Wrong(lambda _: vpt.FolderDataModule("a\0"), "a NUL", ConfigError, PATH),
    Wrong(lambda _: vpt.FolderDataModule(""), "an empty path", ConfigError, PATH),
    Wrong(lambda _: vpt.VTABDataModule(3), "a number", ConfigError, "task of VTABDataModule must be text"),  # type: ignore[arg-type]
    Wrong(lambda _: vpt.FGVCDataModule("x"), "no dataset", UnknownNameError, "'x'"),
    Wrong(lambda _: vpt.FGVCDataModule(None), "no name", ConfigError, "dataset of FGVCDataModule must be text"),  # type: ignore[arg-type]
    Wrong(lambda _: vpt.ImageNetDataModule(shifts="v2"), "text", ConfigError, "shifts of ImageNetDataModule must be"),  # type: ignore[arg-type]
    Wrong(lambda _: vpt.ShapeTextureDataModule(3), "a number", ConfigError, "root of ShapeTextureDataModule must be"),  # type: ignore[arg-type]
    Wrong(lambda _: vpt.PetTrimapsDataModule(3), "a number", ConfigError, "root of PetTrimapsDataModule must be"),  # type: ignore[arg-type]
    Wrong(lambda g: g.digits.split("x"), "no split", UnknownNameError, "'x'"),
    Wrong(lambda _: data.Preset("x", "square", "x", "imagenet"), "a name", UnknownNameError, "Unknown interpolation"),
]

TASKS = [
    Wrong(lambda _: vpt.PromptTuning(backbone=None, num_classes=3), "no name", ConfigError, "backbone of PromptTuning"),
    Wrong(lambda _: vpt.PromptTuning(backbone=NANO, num_classes=2.5), "half a class", ConfigError, "num_classes of"),
    Wrong(lambda _: vpt.PromptTuning("3", backbone=NANO, num_classes=2), "text", ConfigError, "num_tokens of Prompt"),  # type: ignore[arg-type]
    Wrong(lambda _: vpt.LinearProbe(l2="x", backbone=NANO, num_classes=2), "text", ConfigError, "l2 of LinearProbe must"),  # type: ignore[arg-type]
    Wrong(lambda _: vpt.FineTuning(backbone=NANO, num_classes=2, base_lr="x"), "text", ConfigError, "base_lr of FineT"),
    Wrong(lambda _: vpt.DeltaTuning(3, backbone=NANO, num_classes=2), "a number", ConfigError, "deltas of DeltaTuning"),  # type: ignore[arg-type]
    Wrong(lambda _: vpt.SegmentationTask(backbone=NANO, num_classes="2"), "text", ConfigError, "num_classes of Segm"),
]

METRICS = [
    Wrong(lambda _: accuracy.top1([[1.0]], LABELS), "a list", ConfigError, "logits of correct must be a NumPy array"),  # type: ignore[arg-type]
    Wrong(lambda _: accuracy.top1(TABLE[:0], LABELS[:0]), "no images", DataError, "at least one of each"),
    Wrong(lambda _: accuracy.top1(TABLE[0], LABELS), "one row", DataError, "Logits are a table of images"),
    Wrong(lambda _: accuracy.top1(TABLE, LABELS[:1]), "one label", DataError, "give one label a row"),
    Wrong(lambda _: accuracy.top1(TABLE, LABELS + 1), "a label outside", DataError, "Label 2 is none of 2 classes"),
    Wrong(lambda _: accuracy.top1(TABLE, LABELS / 2), "half a label", DataError, "Labels are whole numbers"),  # type: ignore[arg-type]
    Wrong(lambda _: accuracy.top1(TABLE * np.nan, LABELS), "NaN", DataError, "Row 0 of the logits"),
    Wrong(lambda _: accuracy.top1(TABLE - np.inf, LABELS), "all masked", DataError, "Row 0 of the logits"),
    Wrong(lambda _: accuracy.top1(TABLE.astype(str), LABELS), "text", DataError, "Logits are numbers"),  # type: ignore[arg-type]
    Wrong(lambda _: accuracy.mean_per_class(TABLE, LABELS - 1), "a label below", DataError, "Label -1 is none"),
    Wrong(lambda _: accuracy.wilson(3, 2), "too many hits", ConfigError, "no more hits than images"),
    Wrong(lambda _: accuracy.wilson(0.5, 2), "half a hit", ConfigError, "hits of wilson must be a whole number"),  # type: ignore[arg-type]
    Wrong(lambda _: accuracy.difference(RIGHT, RIGHT[:1]), "other images", ConfigError, "of the same images"),
    Wrong(lambda _: accuracy.difference(RIGHT[:0], RIGHT[:0]), "no images", ConfigError, "N of at least 1"),
    Wrong(lambda _: accuracy.difference(SURE, RIGHT), "numbers", ConfigError, "bool (N,)"),  # type: ignore[arg-type]
    Wrong(lambda _: calibration.equal_width(SURE, RIGHT, 0), "no bins", ConfigError, "at least one bin, got 0"),
    Wrong(lambda _: calibration.equal_width(SURE[:0], RIGHT[:0]), "no images", ConfigError, "N at least 1"),
    Wrong(lambda _: calibration.equal_mass(SURE, RIGHT[:1]), "other images", ConfigError, "(2,) and (1,)"),
    Wrong(lambda _: calibration.aurc(SURE * 2, RIGHT), "confidence above 1", ConfigError, "Confidences lie in (0, 1]"),
    Wrong(lambda _: calibration.risk_at(0.0, SURE, RIGHT), "no coverage", ConfigError, "Coverage is a share"),
    Wrong(lambda _: calibration.risk_at("x", SURE, RIGHT), "text", ConfigError, "coverage of risk_at must be a number"),  # type: ignore[arg-type]
    Wrong(lambda _: calibration.temperature(TABLE * np.inf, LABELS), "infinity", DataError, "Row 0 of the logits"),
    Wrong(lambda _: logits.predictions(TABLE, LABELS, 0.0), "no temperature", ConfigError, "temperature is above 0"),
    Wrong(lambda _: logits.predictions(TABLE, LABELS, float("nan")), "NaN", ConfigError, "temperature of predictions"),
    Wrong(lambda _: logits.matched(TABLE, LABELS, [[0], [5]]), "no column", ConfigError, "names column 5"),
    Wrong(lambda _: logits.matched(TABLE, LABELS, [[0], []]), "no columns", ConfigError, "A class mask is empty"),
    Wrong(lambda _: summary.summary(TABLE, None), "no labels", ConfigError, "labels of summary must be a NumPy array"),  # type: ignore[arg-type]
    Wrong(lambda _: effective_robustness.effective_robustness("x", 0.5, {}), "no set", UnknownNameError, "'x'"),
    Wrong(lambda _: effective_robustness.effective_robustness("imagenet_v2", "x", {}), "text", ConfigError, "accuracy of effective_robustness must be a number"),  # type: ignore[arg-type]
    Wrong(lambda _: effective_robustness.logit(0.5, 0), "no images", ConfigError, "at least one image, got 0"),
]

OTHERS = [
    Wrong(lambda g: robustness.run(3, g.digits, [1.0], g.here), "a number", ConfigError, "delta of run must be a path"),  # type: ignore[arg-type]
    Wrong(lambda g: robustness.run(g.delta, None, [1.0], g.here), "no data", ConfigError, "data of run must be"),  # type: ignore[arg-type]
    Wrong(lambda g: robustness.run(g.delta, g.digits, 1.0, g.here), "one α", ConfigError, "alphas of run must be a list"),  # type: ignore[arg-type]
    Wrong(lambda g: robustness.run(g.delta, g.digits, [2.0], g.here), "α = 2", ConfigError, "alphas are distinct"),
    Wrong(lambda g: robustness.run(g.delta, g.digits, ["x"], g.here), "text", ConfigError, "a list (each a number)"),  # type: ignore[list-item]
    Wrong(lambda _: robustness.RobustnessResult.read("nowhere"), "no folder", DataError, "holds no evaluation"),  # type: ignore[arg-type]
    Wrong(lambda _: robustness.RobustnessResult.read(3), "a number", ConfigError, "out of read must be a path"),  # type: ignore[arg-type]
    Wrong(lambda _: robustness.choose_alpha([]), "no rows", ConfigError, "α is chosen on a validation set"),
    Wrong(lambda _: robustness.choose_alpha([1]), "numbers", ConfigError, "rows of choose_alpha must be a list"),  # type: ignore[list-item]
    Wrong(lambda g: export.fold(g.backbone), "a backbone", ConfigError, "model of fold must be a TunedModel"),  # type: ignore[arg-type]
    Wrong(lambda g: export.export_onnx(g.model, 3), "a number", ConfigError, "path of export_onnx must be"),  # type: ignore[arg-type]
    Wrong(lambda g: export.export_torch(g.model, "x.onnx"), "another suffix", ExportError, "ends in .pt2"),
    Wrong(lambda g: export.export_peft(g.model, "x"), "prompts", ConfigError, "a model with one LoRA"),
    Wrong(lambda _: export.export_peft(None, "x"), "no model", ConfigError, "model of export_peft must be a TunedModel"),  # type: ignore[arg-type]
    Wrong(lambda _: visualize.attention_maps(None, UINT8), "no model", ConfigError, "model of attention_maps must be"),  # type: ignore[arg-type]
    Wrong(lambda g: visualize.attention_maps(g.model, [1]), "a list", ConfigError, "images of attention_maps must be"),  # type: ignore[arg-type]
    Wrong(lambda g: visualize.attention_maps(g.model, UINT8[:0]), "no images", ConfigError, "at least one image"),
    Wrong(lambda g: visualize.scene_from_files(g.delta, "x.png"), "text", ConfigError, "images of scene_from_files must"),  # type: ignore[arg-type]
    Wrong(lambda g: visualize.scene_from_data(g.delta, None), "no data", ConfigError, "data of scene_from_data must be"),  # type: ignore[arg-type]
    Wrong(lambda _: visualize.draw(None, "compare"), "no scene", ConfigError, "scene of draw must be a Scene"),  # type: ignore[arg-type]
    Wrong(lambda _: visualize.write_gallery(3, Path("x")), "a number", ConfigError, "scene of write_gallery must be"),  # type: ignore[arg-type]
    Wrong(lambda _: visualize.FigureLogger("4"), "text", ConfigError, "num_images of FigureLogger must be"),  # type: ignore[arg-type]
    Wrong(lambda _: visualize.AttentionLogger(0), "no epochs", ConfigError, "numbers of at least 1"),
    Wrong(lambda _: visualize.confusion_figure([[1]], ["a"]), "a list", ConfigError, "matrix of confusion_figure must"),  # type: ignore[arg-type]
    Wrong(lambda _: visualize.confusion_figure(np.eye(2, dtype=int), ["a"]), "a name", ConfigError, "does not fit 1"),
    Wrong(lambda _: save_figure(None, Path("x.png")), "no figure", ConfigError, "figure of save_figure must be"),  # type: ignore[arg-type]
]

ROWS = [*BACKBONES, *IMAGES, *DELTAS, *MODELS, *DATA, *TASKS, *METRICS, *OTHERS]


@pytest.mark.parametrize("row", [pytest.param(row, id=f"{row.wrong}: {row.says:.50}") for row in ROWS])
def test_a_wrong_argument_gets_one_sentence(given: Given, row: Wrong) -> None:
    with pytest.raises(row.error) as caught:
        row.call(given)
    sentence = str(caught.value)
    assert row.says in sentence
    assert "\n" not in sentence
    assert len(sentence) < 500
    assert not given.backbone.attached
