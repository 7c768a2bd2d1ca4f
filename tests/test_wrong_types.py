"""The table of wrong arguments in Python: one sentence each that says what is wanted, and no other library's error."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import vpt
from vpt.errors import (
    ConfigError,
    DataError,
    DeltaFileError,
    ExportError,
    HubError,
    UnknownNameError,
    VPTError,
    WeightsError,
)

NANO = "vit_nano_patch8_64"

NAMES = """
from pathlib import Path
import numpy as np, timm, torch
from torch import nn
import vpt, vpt.backbones, vpt.data, vpt.deltas, vpt.export, vpt.models, vpt.robustness, vpt.visualize
from vpt.hub import client
from vpt.metrics import accuracy, calibration, effective_robustness, logits, summary
from vpt.models.closed_form import fit_class_means, fit_ridge
from vpt.models.logistic_regression import fit_logistic
from vpt.models.segmenter import DenseModel
NANO = "vit_nano_patch8_64"
TABLE, LABELS = np.array([[0.1, 0.9], [0.8, 0.2]], dtype=np.float32), np.array([1, 0])
SURE, RIGHT = np.array([0.9, 0.6]), np.array([True, False])
UINT8 = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
"""


class Wrong(NamedTuple):
    """A call, what is wrong with it, the class of the error, and what its sentence says."""

    call: str
    wrong: str
    error: type[VPTError]
    says: str


ROWS = [
    # backbones
    Wrong("vpt.create_backbone(None)", "no name", ConfigError, "name of create_backbone must be text, got None"),
    Wrong("vpt.create_backbone(3)", "a number as name", ConfigError, "name of create_backbone must be text, got 3"),
    Wrong('vpt.create_backbone(["vit"])', "a list as name", ConfigError, "name of create_backbone must be text"),
    Wrong("vpt.create_backbone(nn.Linear(2, 2))", "a layer as name", ConfigError, "must be text, got a Linear"),
    Wrong('vpt.create_backbone("")', "an empty name", UnknownNameError, "Unknown backbone ''"),
    Wrong(
        'vpt.create_backbone("vit_nano_patch8")',
        "a name misspelt",
        UnknownNameError,
        "did you mean 'vit_nano_patch8_64'",
    ),
    Wrong(
        "vpt.create_backbone(NANO, None)",
        "no weights",
        ConfigError,
        "weights of create_backbone must be text or a path",
    ),
    Wrong(
        "vpt.create_backbone(NANO, 3)",
        "a number as weights",
        ConfigError,
        "weights of create_backbone must be text or a path",
    ),
    Wrong(r'vpt.create_backbone(NANO, "a\0b")', "a NUL in a path", ConfigError, "a path that can exist"),
    Wrong('vpt.create_backbone(NANO, "n" * 300)', "a path too long", ConfigError, "a path that can exist"),
    Wrong('vpt.create_backbone(NANO, "random:x")', "a seed that is none", WeightsError, "whole number N as seed"),
    Wrong(
        'vpt.create_backbone(NANO, "/")', "a folder as weights", WeightsError, "No weights file /, which is a folder"
    ),
    Wrong(
        "vpt.create_backbone(NANO, image_size=64.5)",
        "half a pixel",
        ConfigError,
        "image_size of create_backbone must be a whole",
    ),
    Wrong(
        'vpt.create_backbone(NANO, image_size="64")',
        "a size as text",
        ConfigError,
        "must be a whole number or a list (each a whole number) or None, got '64'",
    ),
    Wrong(
        "vpt.create_backbone(NANO, image_size=True)",
        "a size that is true",
        ConfigError,
        "must be a whole number or a list (each a whole number) or None, got True",
    ),
    Wrong(
        "vpt.create_backbone(NANO, image_size=0)",
        "no pixels",
        ConfigError,
        "whole number of pixels from 1 to 8192, or [height, width] of such, got 0",
    ),
    Wrong(
        "vpt.create_backbone(NANO, image_size=-64)",
        "less than none",
        ConfigError,
        "whole number of pixels from 1 to 8192, or [height, width] of such, got -64",
    ),
    Wrong(
        "vpt.create_backbone(NANO, image_size=(64, 0))",
        "no width",
        ConfigError,
        "[height, width] of such, got [64, 0]",
    ),
    Wrong(
        'vpt.create_backbone(NANO, image_size=float("nan"))',
        "NaN pixels",
        ConfigError,
        "must be a whole number or a list (each a whole number) or None, got nan",
    ),
    Wrong(
        "vpt.create_backbone(NANO, normalization=None)",
        "no statistics",
        ConfigError,
        "normalization of create_backbone must be",
    ),
    Wrong(
        "vpt.create_backbone(NANO, pool=3)",
        "a pool that is a number",
        ConfigError,
        "pool of create_backbone must be text or None",
    ),
    Wrong("vpt.backbones.input_size(None)", "no name", ConfigError, "name of input_size must be text"),
    Wrong("vpt.backbones.pretrained_head(3)", "a number", ConfigError, "name of pretrained_head must be text"),
    Wrong('vpt.backbones.pretrained_head(NANO, "random")', "random", WeightsError, "no pretrained classifier"),
    Wrong("vpt.backbones.class_attention(model, UINT8)", "a model", ConfigError, "must be a Backbone, which vpt"),
    Wrong('vpt.backbones.recording("x")', "a text", ConfigError, "backbone of recording must be a Backbone"),
    # batches
    Wrong(
        "backbone(np.zeros((2, 3, 64, 64), np.uint8))",
        "NumPy",
        ConfigError,
        "Images are a tensor (B, 3, H, W), got a nd",
    ),
    Wrong("backbone([UINT8[0], UINT8[1]])", "a list", ConfigError, "Images are a tensor (B, 3, H, W), got"),
    Wrong("backbone([])", "an empty list", ConfigError, "Images are a tensor (B, 3, H, W), got []"),
    Wrong("backbone(None)", "nothing", ConfigError, "Images are a tensor (B, 3, H, W), got None"),
    Wrong("backbone(UINT8[0])", "one image", ConfigError, "(B, 3, 64, 64), got (3, 64, 64)"),
    Wrong("backbone(UINT8.permute(0, 2, 3, 1))", "channels last", ConfigError, "(B, 3, 64, 64), got (2, 64, 64, 3)"),
    Wrong("backbone(UINT8[:, :, :32])", "half images", ConfigError, "(B, 3, 64, 64), got (2, 3, 32, 64)"),
    Wrong("backbone(UINT8.float() + 255)", "floats to 255", ConfigError, "divide them by 255"),
    Wrong("backbone(UINT8.float() - 1)", "negative floats", ConfigError, "Images of floats lie in [0, 1]"),
    Wrong("backbone(UINT8.float() / 0)", "NaN", ConfigError, "Images hold NaN"),
    Wrong("backbone(UINT8.long() + 256)", "integers above 255", ConfigError, "Images of integers lie in [0, 255]"),
    Wrong("backbone(UINT8.bool())", "bool", ConfigError, "got torch.bool: convert them"),
    Wrong('backbone(UINT8.to("meta"))', "another device", ConfigError, "Images lie on meta, the backbone on cpu"),
    Wrong("model([1])", "a list for a model", ConfigError, "Images are a tensor (B, 3, H, W), got [1]"),
    # deltas
    Wrong(
        'vpt.attach(timm.create_model("vit_tiny_patch16_224"), "lora")',
        "a timm model",
        ConfigError,
        "must be a Backbone, which vpt.create_backbone makes, got a VisionTransformer",
    ),
    Wrong('vpt.attach(nn.Linear(2, 2), "lora")', "a layer", ConfigError, "makes, got a Linear"),
    Wrong('vpt.attach(NANO, "lora")', "a name", ConfigError, "makes, got 'vit_nano_patch8_64'"),
    Wrong('vpt.attach(None, "lora")', "nothing", ConfigError, "makes, got None"),
    Wrong('vpt.attach(model, "lora")', "a model", ConfigError, "makes, got a TunedModel"),
    Wrong("vpt.attach(backbone, None)", "no parts", ConfigError, "A delta is a list of its parts"),
    Wrong("vpt.attach(backbone, [])", "an empty list", ConfigError, "An empty delta changes nothing"),
    Wrong("vpt.attach(backbone, {})", "an empty dict", ConfigError, "A part of a delta is a dict with a name"),
    Wrong('vpt.attach(backbone, "prompts")', "a name misspelt", UnknownNameError, "did you mean 'prompt'"),
    Wrong(
        'vpt.attach(backbone, ["lora", 3])',
        "a number among names",
        ConfigError,
        "A part of a delta is a dict with a name",
    ),
    Wrong(
        'vpt.attach(backbone, "prompt")', "a name without its number", ConfigError, "Delta 'prompt' needs num_tokens"
    ),
    Wrong(
        'vpt.attach(backbone, {"name": "prompt", "num_tokens": "4"})',
        "text",
        ConfigError,
        "num_tokens of delta 'prompt' must be",
    ),
    Wrong(
        'vpt.attach(backbone, {"name": "prompt", "num_tokens": 0})',
        "no prompts",
        ConfigError,
        "num_tokens must be at least 1",
    ),
    Wrong(
        'vpt.attach(backbone, {"name": "prompt", "num_tokens": 2, "relocate": {"warmup": "one"}})',
        "text",
        ConfigError,
        "warmup of relocate must be a whole number",
    ),
    Wrong(
        'vpt.attach(backbone, {"name": "lora", "scale": float("nan")})',
        "NaN",
        ConfigError,
        "scale of delta 'lora' must be a num",
    ),
    Wrong('vpt.deltas.Delta(None, ["lora"])', "nothing", ConfigError, "must be a Backbone"),
    Wrong("vpt.deltas.DeltaSpec.read(3)", "a number", ConfigError, "A part of a delta is a dict with a name"),
    Wrong('vpt.deltas.register_delta("x")(nn.Linear)', "a layer", ConfigError, "is no class that is derived"),
    Wrong("vpt.deltas.register_delta(3)", "a number", ConfigError, "name of register_delta must be text"),
    Wrong('model.set_strength("0.5")', "text", ConfigError, "strength is a number between 0"),
    Wrong('model.set_strength(float("nan"))', "NaN", ConfigError, "strength is a number between 0"),
    Wrong("model.set_strength(2)", "two", ConfigError, "strength is a number between 0"),
    Wrong("model.set_strength(None)", "nothing", ConfigError, "strength is a number between 0"),
    # models and their files
    Wrong("vpt.load(None)", "no file", ConfigError, "path of load must be text or a path that can exist, got None"),
    Wrong("vpt.load(3)", "a number", ConfigError, "path of load must be text or a path"),
    Wrong('vpt.load(b"x")', "bytes", ConfigError, "path of load must be text or a path"),
    Wrong('vpt.load("")', "an empty path", ConfigError, "a path that can exist"),
    Wrong(r'vpt.load("a\0b")', "a NUL", ConfigError, "a path that can exist"),
    Wrong(r'vpt.load(Path("a\0b"))', "a NUL in a Path", ConfigError, "a path that can exist"),
    Wrong('vpt.load("n" * 300)', "a path too long", ConfigError, "a path that can exist"),
    Wrong(r'vpt.load("\ud800")', "half a letter", ConfigError, "a path that can exist"),
    Wrong('vpt.load("/nowhere")', "no such file", DeltaFileError, "No delta file /nowhere"),
    Wrong('vpt.load("/")', "a folder", DeltaFileError, "/ is a folder: name the delta.safetensors of a run"),
    Wrong("vpt.load(np.__file__)", "another file", DeltaFileError, "is not a delta file"),
    Wrong('vpt.load("hf://ann")', "half an address", HubError, "is no address on the hub"),
    Wrong("vpt.load(delta, 3)", "a number as weights", ConfigError, "weights of load must be text or a path"),
    Wrong('vpt.load(delta, "/")', "a folder as weights", WeightsError, "No weights file /, which is a folder"),
    Wrong("vpt.load_segmentation(delta)", "a classifier", DeltaFileError, "holds a classifier"),
    Wrong("vpt.load_segmentation(None)", "no file", ConfigError, "path of load_segmentation must be"),
    Wrong("vpt.models.load_classifier(None)", "no file", ConfigError, "path of load_classifier must be"),
    Wrong("vpt.save_delta(None, model)", "no file", ConfigError, "path of save_delta must be"),
    Wrong('vpt.save_delta("", model)', "an empty path", ConfigError, "a path that can exist"),
    Wrong('vpt.save_delta(here / "x", nn.Linear(2, 2))', "a layer", ConfigError, "must be an AdaptedModel"),
    Wrong('vpt.save_delta(here / "x", backbone)', "a backbone", ConfigError, "must be an AdaptedModel"),
    Wrong("vpt.models.TunedModel(NANO, 3)", "a name", ConfigError, "backbone of TunedModel must be a Backbone"),
    Wrong("vpt.models.TunedModel(backbone, 2.5)", "half a class", ConfigError, "num_classes of TunedModel must"),
    Wrong("vpt.models.TunedModel(backbone, 0)", "no class", ConfigError, "num_classes must be at least 1, got 0"),
    Wrong('vpt.models.TunedModel(backbone, 2, (), "ab")', "text", ConfigError, "class_names of TunedModel must be"),
    Wrong("vpt.models.TunedModel(backbone, 2, (), [1, 2])", "numbers", ConfigError, "a list (each text)"),
    Wrong('vpt.models.TunedModel(backbone, 2, (), ["a"])', "a name too few", ConfigError, "1 class names were"),
    Wrong("vpt.models.TunedModel(backbone, 2, 3)", "a number", ConfigError, "specs of TunedModel must be"),
    Wrong("DenseModel(backbone, 2, kind=None)", "no head", ConfigError, "kind of DenseModel must be text"),
    Wrong("vpt.PromptBank([delta])", "no names", ConfigError, "must be a mapping from text to text or a path"),
    Wrong('vpt.PromptBank([("a", delta), ("a", delta)])', "doubled", ConfigError, "must be a mapping"),
    Wrong("vpt.PromptBank({1: delta})", "a number as name", ConfigError, "must be a mapping from text"),
    Wrong("vpt.PromptBank({})", "no file", ConfigError, "A bank needs at least one delta file"),
    Wrong('vpt.PromptBank({"a": None})', "None as file", ConfigError, "must be a mapping from text"),
    Wrong('vpt.PromptBank({"a": delta})(UINT8, ["b", "a"])', "no such task", UnknownNameError, "Unknown task"),
    Wrong('vpt.PromptBank({"a": delta})(UINT8, "a")', "text", ConfigError, "tasks is a list with the name"),
    Wrong('vpt.PromptBank({"a": delta})([1], ["a"])', "a list", ConfigError, "Images are a tensor"),
    Wrong("fit_logistic([1], torch.zeros(1), 2, 0.1)", "a list", ConfigError, "features of fit_logistic must be"),
    Wrong("fit_logistic(torch.eye(2), torch.tensor([0, 2]), 2, 0.1)", "a label", ConfigError, "in [0, 2)"),
    Wrong("fit_logistic(torch.eye(2), torch.tensor([0]), 2, 0.1)", "one label", ConfigError, "one label a row"),
    Wrong("fit_ridge([1], torch.zeros(1), 2, 0.1)", "a list", ConfigError, "features of fit_ridge must be"),
    Wrong('fit_ridge(torch.eye(2), torch.tensor([0, 1]), 2, "x")', "text", ConfigError, "l2 of fit_ridge must be"),
    Wrong("fit_class_means(torch.eye(2), [0, 1], 2)", "a list", ConfigError, "labels of fit_class_means must be"),
    Wrong('client.push("x", "ann")', "half a name", HubError, "is no name of a repository"),
    Wrong('client.push(None, "ann/x")', "no file", ConfigError, "delta of push must be"),
    # data
    Wrong("vpt.DigitsDataModule(image_size=64.5)", "half a pixel", ConfigError, "image_size of DigitsDataModule"),
    Wrong('vpt.DigitsDataModule(batch_size="8")', "text", ConfigError, "batch_size of DigitsDataModule must be"),
    Wrong('vpt.DigitsDataModule(preset="x")', "no preset", UnknownNameError, "Unknown preset 'x'"),
    Wrong("vpt.DigitsDataModule(shots=2.5)", "half a shot", ConfigError, "shots of DigitsDataModule must be"),
    Wrong("vpt.ShapesDataModule(3)", "a number", ConfigError, "label of ShapesDataModule must be text"),
    Wrong(
        "vpt.ShapeScenesDataModule(seed=-1)", "a seed", ConfigError, "seed must be a whole number of at least 0, got -1"
    ),
    Wrong("vpt.FolderDataModule(None)", "no folder", ConfigError, "root of FolderDataModule must be text or"),
    Wrong(r'vpt.FolderDataModule("a\0")', "a NUL", ConfigError, "a path that can exist"),
    Wrong('vpt.FolderDataModule("")', "an empty path", ConfigError, "a path that can exist"),
    Wrong('vpt.FolderDataModule("x", columns="path")', "text", ConfigError, "columns of FolderDataModule must be"),
    Wrong("vpt.DigitsDataModule(augment=3)", "a number", ConfigError, "must be text or a list (each a mapping"),
    Wrong('vpt.DigitsDataModule(augment=["D4"])', "a list of names", ConfigError, "must be text or a list (each a map"),
    Wrong("vpt.VTABDataModule(3)", "a number", ConfigError, "task of VTABDataModule must be text"),
    Wrong('vpt.FGVCDataModule("x")', "no dataset", UnknownNameError, "'x'"),
    Wrong("vpt.FGVCDataModule(None)", "no name", ConfigError, "dataset of FGVCDataModule must be text"),
    Wrong('vpt.ImageNetDataModule(shifts="v2")', "text", ConfigError, "shifts of ImageNetDataModule must be"),
    Wrong("vpt.ShapeTextureDataModule(3)", "a number", ConfigError, "root of ShapeTextureDataModule must be"),
    Wrong("vpt.PetTrimapsDataModule(3)", "a number", ConfigError, "root of PetTrimapsDataModule must be"),
    Wrong('digits.split("x")', "no split", UnknownNameError, "'x'"),
    Wrong('vpt.data.Preset("x", "square", "x", "imagenet")', "a name", UnknownNameError, "Unknown interpolation"),
    # tasks
    Wrong("vpt.PromptTuning(backbone=None, num_classes=3)", "no name", ConfigError, "backbone of PromptTuning"),
    Wrong("vpt.PromptTuning(backbone=NANO, num_classes=2.5)", "half a class", ConfigError, "num_classes of"),
    Wrong('vpt.PromptTuning("3", backbone=NANO, num_classes=2)', "text", ConfigError, "num_tokens of Prompt"),
    Wrong('vpt.LinearProbe(l2="x", backbone=NANO, num_classes=2)', "text", ConfigError, "l2 of LinearProbe must"),
    Wrong('vpt.NearestNeighbours(k="x", backbone=NANO, num_classes=2)', "text", ConfigError, "k of NearestNeighbours"),
    Wrong('vpt.FineTuning(backbone=NANO, num_classes=2, base_lr="x")', "text", ConfigError, "base_lr of FineT"),
    Wrong("vpt.DeltaTuning(3, backbone=NANO, num_classes=2)", "a number", ConfigError, "deltas of DeltaTuning"),
    Wrong('vpt.SegmentationTask(backbone=NANO, num_classes="2")', "text", ConfigError, "num_classes of Segm"),
    # metrics
    Wrong("accuracy.top1([[1.0]], LABELS)", "a list", ConfigError, "logits of correct must be a NumPy array"),
    Wrong("accuracy.top1(TABLE[:0], LABELS[:0])", "no images", DataError, "at least one of each"),
    Wrong("accuracy.top1(TABLE[0], LABELS)", "one row", DataError, "Logits are a table of images"),
    Wrong("accuracy.top1(TABLE, LABELS[:1])", "one label", DataError, "give one label a row"),
    Wrong("accuracy.top1(TABLE, LABELS + 1)", "a label outside", DataError, "Label 2 is none of 2 classes"),
    Wrong("accuracy.top1(TABLE, LABELS / 2)", "half a label", DataError, "Labels are whole numbers"),
    Wrong("accuracy.top1(TABLE * np.nan, LABELS)", "NaN", DataError, "Row 0 of the logits"),
    Wrong("accuracy.top1(TABLE - np.inf, LABELS)", "all masked", DataError, "Row 0 of the logits"),
    Wrong("accuracy.top1(TABLE.astype(str), LABELS)", "text", DataError, "Logits are numbers"),
    Wrong("accuracy.mean_per_class(TABLE, LABELS - 1)", "a label below", DataError, "Label -1 is none"),
    Wrong("accuracy.wilson(3, 2)", "too many hits", ConfigError, "no more hits than images"),
    Wrong("accuracy.wilson(0.5, 2)", "half a hit", ConfigError, "hits of wilson must be a whole number"),
    Wrong("accuracy.difference(RIGHT, RIGHT[:1])", "other images", ConfigError, "of the same images"),
    Wrong("accuracy.difference(RIGHT[:0], RIGHT[:0])", "no images", ConfigError, "N of at least 1"),
    Wrong("accuracy.difference(SURE, RIGHT)", "numbers", ConfigError, "bool (N,)"),
    Wrong("calibration.equal_width(SURE, RIGHT, 0)", "no bins", ConfigError, "at least one bin, got 0"),
    Wrong("calibration.equal_width(SURE[:0], RIGHT[:0])", "no images", ConfigError, "N at least 1"),
    Wrong("calibration.equal_mass(SURE, RIGHT[:1])", "other images", ConfigError, "(2,) and (1,)"),
    Wrong("calibration.aurc(SURE * 2, RIGHT)", "confidence above 1", ConfigError, "Confidences lie in (0, 1]"),
    Wrong("calibration.risk_at(0.0, SURE, RIGHT)", "no coverage", ConfigError, "Coverage is a share"),
    Wrong('calibration.risk_at(float("nan"), SURE, RIGHT)', "NaN", ConfigError, "coverage of risk_at must be a number"),
    Wrong(
        'effective_robustness.effective_robustness("imagenet_v2", float("nan"), {})',
        "NaN",
        ConfigError,
        "accuracy of effective_robustness must be a number, got nan",
    ),
    Wrong('calibration.risk_at("x", SURE, RIGHT)', "text", ConfigError, "coverage of risk_at must be a number"),
    Wrong("calibration.temperature(TABLE * np.inf, LABELS)", "infinity", DataError, "Row 0 of the logits"),
    Wrong("logits.predictions(TABLE, LABELS, 0.0)", "no temperature", ConfigError, "temperature is above 0"),
    Wrong('logits.predictions(TABLE, LABELS, float("nan"))', "NaN", ConfigError, "temperature of predictions"),
    Wrong("logits.matched(TABLE, LABELS, [[0], [5]])", "no column", ConfigError, "names column 5"),
    Wrong("logits.matched(TABLE, LABELS, [[0], []])", "no columns", ConfigError, "A class mask is empty"),
    Wrong("summary.summary(TABLE, None)", "no labels", ConfigError, "labels of summary must be a NumPy array"),
    Wrong('effective_robustness.effective_robustness("x", 0.5, {})', "no set", UnknownNameError, "'x'"),
    Wrong(
        'effective_robustness.effective_robustness("imagenet_v2", "x", {})',
        "text",
        ConfigError,
        "accuracy of effective_robustness must be a number",
    ),
    # robustness, export, visualize
    Wrong("vpt.robustness.run(3, digits, [1.0], here)", "a number", ConfigError, "delta of run must be a path"),
    Wrong("vpt.robustness.run(delta, None, [1.0], here)", "no data", ConfigError, "data of run must be"),
    Wrong("vpt.robustness.run(delta, digits, 1.0, here)", "one α", ConfigError, "alphas of run must be a list"),
    Wrong("vpt.robustness.run(delta, digits, [2.0], here)", "α = 2", ConfigError, "alphas are distinct"),
    Wrong('vpt.robustness.run(delta, digits, [float("nan")], here)', "NaN", ConfigError, "a list (each a number), got"),
    Wrong('vpt.robustness.run(delta, digits, ["x"], here)', "text", ConfigError, "a list (each a number)"),
    Wrong('vpt.robustness.RobustnessResult.read("nowhere")', "no folder", DataError, "holds no evaluation"),
    Wrong("vpt.robustness.RobustnessResult.read(3)", "a number", ConfigError, "out of read must be a path"),
    Wrong("vpt.robustness.choose_alpha([])", "no rows", ConfigError, "α is chosen on a validation set"),
    Wrong("vpt.robustness.choose_alpha([1])", "numbers", ConfigError, "rows of choose_alpha must be a list"),
    Wrong("vpt.export.fold(backbone)", "a backbone", ConfigError, "model of fold must be a TunedModel"),
    Wrong("vpt.export.export_onnx(model, 3)", "a number", ConfigError, "path of export_onnx must be"),
    Wrong('vpt.export.export_torch(model, "x.onnx")', "another suffix", ExportError, "ends in .pt2"),
    Wrong('vpt.export.export_peft(model, "x")', "prompts", ConfigError, "a model with one LoRA"),
    Wrong('vpt.export.export_peft(None, "x")', "no model", ConfigError, "model of export_peft must be a TunedModel"),
    Wrong("vpt.visualize.attention_maps(None, UINT8)", "no model", ConfigError, "model of attention_maps must be"),
    Wrong("vpt.visualize.attention_maps(model, [1])", "a list", ConfigError, "images of attention_maps must be"),
    Wrong("vpt.visualize.attention_maps(model, UINT8[:0])", "no images", ConfigError, "at least one image"),
    Wrong('vpt.visualize.scene_from_files(delta, "x.png")', "text", ConfigError, "images of scene_from_files must"),
    Wrong("vpt.visualize.scene_from_data(delta, None)", "no data", ConfigError, "data of scene_from_data must be"),
    Wrong('vpt.visualize.draw(None, "compare")', "no scene", ConfigError, "scene of draw must be a Scene"),
    Wrong('vpt.visualize.write_gallery(3, Path("x"))', "a number", ConfigError, "scene of write_gallery must be"),
    Wrong('vpt.visualize.FigureLogger("4")', "text", ConfigError, "num_images of FigureLogger must be"),
    Wrong("vpt.visualize.AttentionLogger(0)", "no epochs", ConfigError, "numbers of at least 1"),
    Wrong('vpt.visualize.confusion_figure([[1]], ["a"])', "a list", ConfigError, "matrix of confusion_figure must"),
    Wrong('vpt.visualize.confusion_figure(np.eye(2, dtype=int), ["a"])', "a name", ConfigError, "does not fit 1"),
]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the calls of the table are made with."""
    names: dict[str, Any] = {"here": tmp_path_factory.mktemp("types")}
    exec(NAMES, names)  # noqa: S102
    names["backbone"] = vpt.create_backbone(NANO, "random")
    names["digits"] = vpt.DigitsDataModule()
    names["model"] = names["vpt"].models.TunedModel(vpt.create_backbone(NANO, "random"), 3, PROMPT).eval()
    names["delta"] = vpt.save_delta(names["here"] / "delta.safetensors", names["model"])
    return names


PROMPT = {"name": "prompt", "num_tokens": 2}


@pytest.mark.parametrize("row", [pytest.param(row, id=f"{row.call:.80}: {row.wrong}") for row in ROWS])
def test_a_wrong_argument_gets_one_sentence(given: dict[str, Any], row: Wrong) -> None:
    with pytest.raises(row.error) as caught:
        eval(row.call, given)  # noqa: S307
    sentence = str(caught.value)
    assert row.says in sentence
    assert "\n" not in sentence
    assert len(sentence) < 500
    assert not given["backbone"].attached


def test_numbers_of_numpy_are_numbers() -> None:
    number: Any = np.int64(96)
    assert type(vpt.create_backbone(NANO, "random", image_size=number).image_size) is int
    assert type(vpt.DigitsDataModule(batch_size=number).batch_size) is int


def test_a_run_folder_is_loaded_by_its_delta(given: dict[str, Any]) -> None:
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    assert torch.equal(vpt.load(given["here"])(images), given["model"](images))


def test_an_empty_batch_has_no_answers(given: dict[str, Any]) -> None:
    assert given["model"](torch.zeros(0, 3, 64, 64, dtype=torch.uint8)).shape == (0, 3)
