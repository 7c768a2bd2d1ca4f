"""Saving and loading are inverse to each other, whatever the model is made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import vpt
from tests.deltas.test_deltas import SPECS
from vpt.backbones import create_backbone
from vpt.deltas import DeltaPart
from vpt.errors import ConfigError, DeltaFileError, WeightsError
from vpt.export import fold
from vpt.models import TunedModel, save_delta
from vpt.models.classifier import AdaptedModel
from vpt.models.delta_file import unfilled
from vpt.models.delta_format import read_delta, read_header, write_delta
from vpt.models.segmenter import DenseModel

NANO, SWIN = "vit_nano_patch8_64", "swin_nano_patch4_window8_64"
Specs = list[dict[str, Any]]
Model = TypeVar("Model", bound=AdaptedModel)
COMPOSITIONS: dict[str, Specs] = {key: [spec] for key, spec in SPECS.items()} | {
    "head-alone": [],
    "linear": [{"name": "linear"}],
    "by-layer": [{"name": "prompt", "num_tokens": [1, 2, 2, 3, 1, 1]}],
    "several": [{"name": "bias"}, {"name": "prompt", "num_tokens": 2}, {"name": "lora", "layers": (0, 3)}],
    "twice": [{"name": "prompt", "num_tokens": 2}, {"name": "prompt", "num_tokens": 3, "deep": False}],
}
FOLDED = {"prompt-projected", "prefix-mlp"}


def moved(model: Model) -> Model:
    """A model all of whose own tensors have left where they started."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.owned().values():
            if tensor.is_floating_point():
                tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator).to(tensor))
    model.info, model.preset = {"seed": 3, "rate": 0.1}, {"name": "square"}
    return model.eval()


def logits(model: AdaptedModel) -> torch.Tensor:
    shape = (2, *model.backbone.input_shape)
    ramp = torch.linspace(0, 255, math.prod(shape)).round().to(torch.uint8).view(shape)
    with torch.no_grad():
        answers: torch.Tensor = model(ramp)
    return answers


def come_back(folder: Path, model: AdaptedModel, folded: bool = False) -> AdaptedModel:
    first = save_delta(folder / "first.safetensors", model)
    loaded = vpt.load(first)
    again = save_delta(folder / "again.safetensors", loaded)
    assert again.read_bytes() == first.read_bytes()
    assert torch.equal(logits(vpt.load(again)), logits(loaded))
    if folded:
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(logits(loaded), logits(model))
    return loaded


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_every_delta_comes_back(tmp_path: Path, name: str) -> None:
    come_back(tmp_path, moved(TunedModel(create_backbone(NANO), 3, COMPOSITIONS[name])), name in FOLDED)


@pytest.mark.parametrize("name", ["prompt", "prompt-shallow", "prefix-mlp", "lora", "by-layer-swin"])
def test_deltas_of_another_family_come_back(tmp_path: Path, name: str) -> None:
    specs: Specs = [SPECS[name]] if name in SPECS else [{"name": "prompt", "num_tokens": [1, 2, 2, 3]}]
    backbone = create_backbone(SWIN)
    if name not in SPECS:
        specs[0]["num_tokens"] = [1 + block % 3 for block in range(len(backbone.layout.blocks))]
    come_back(tmp_path, moved(TunedModel(backbone, 3, specs)), name in FOLDED)


@pytest.mark.parametrize("options", [{}, {"kind": "conv", "width": 5}], ids=["linear", "conv"])
@pytest.mark.parametrize("full", [False, True], ids=["frozen", "full"])
def test_segmentation_models_come_back(tmp_path: Path, options: dict[str, Any], full: bool) -> None:
    model = DenseModel(create_backbone(NANO), 3, [] if full else [SPECS["prompt"]], **options)
    if full:
        model.backbone.unfreeze()
    assert isinstance(come_back(tmp_path, moved(model)), DenseModel)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("full", [False, True], ids=["frozen", "full"])
def test_another_precision_comes_back(tmp_path: Path, dtype: torch.dtype, full: bool) -> None:
    model = TunedModel(create_backbone(NANO), 3, [] if full else [SPECS["prompt"], SPECS["norm"]])
    if full:
        model.backbone.unfreeze()
    loaded = come_back(tmp_path, moved(model.to(dtype)))
    assert loaded.backbone.mean.dtype == dtype


def test_what_does_not_train_belongs_to_the_file_too(tmp_path: Path) -> None:
    model = TunedModel(create_backbone(NANO), 3, [SPECS["prompt"]])
    model.head.requires_grad_(False)
    loaded = come_back(tmp_path, moved(model))
    assert set(loaded.owned()) == {"head.weight", "head.bias", "delta.parts.0.tokens"}


def fine_tuned(weights: str) -> TunedModel:
    model = TunedModel(create_backbone(NANO, weights), 3)
    model.backbone.unfreeze()
    return moved(model)


def test_a_tuned_backbone_needs_nothing_but_its_file(tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(create_backbone(NANO).model.state_dict(), weights)
    model = fine_tuned(str(weights))
    path = save_delta(tmp_path / "full.safetensors", model)
    weights.unlink()
    loaded = vpt.load(path)
    assert torch.equal(logits(loaded), logits(model))
    for key in ("name", "weights", "weights_id", "fingerprint", "image_size", "normalization"):
        assert getattr(loaded.backbone, key) == getattr(model.backbone, key), key
    assert loaded.backbone.tuned
    with pytest.raises(WeightsError, match="No weights file"):  # where interpolation needs what it started from
        unfilled(path)


def test_fine_tuning_from_random_weights_loads_anywhere(tmp_path: Path) -> None:
    come_back(tmp_path, fine_tuned("random"))


def test_a_tuned_backbone_without_all_of_its_tensors_is_refused(tmp_path: Path) -> None:
    header, tensors = read_delta(save_delta(tmp_path / "full.safetensors", fine_tuned("pretrained")))
    del tensors["backbone.model.norm.bias"]
    write_delta(tmp_path / "less.safetensors", header, tensors)
    with pytest.raises(DeltaFileError, match=r"is incomplete: backbone\.model\.norm\.bias missing"):
        vpt.load(tmp_path / "less.safetensors")


@pytest.mark.parametrize("name", ["norm", "lora", "full"])
def test_a_delta_on_a_backbone_that_was_tuned_comes_back(tmp_path: Path, name: str) -> None:
    model = TunedModel(create_backbone(NANO), 3, [SPECS[name]])
    model.backbone.unfreeze()
    assert come_back(tmp_path, moved(model)).backbone.tuned


@pytest.mark.parametrize("full", [False, True], ids=["frozen", "full"])
def test_loading_leaves_the_random_state_alone(tmp_path: Path, full: bool) -> None:
    model = fine_tuned("pretrained") if full else moved(TunedModel(create_backbone(NANO), 3, [SPECS["prompt"]]))
    path = save_delta(tmp_path / "delta.safetensors", model)
    before = torch.get_rng_state()
    vpt.load(path)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_would_be_another_model_is_not_saved(tmp_path: Path) -> None:
    model = moved(TunedModel(create_backbone(NANO), 3, [SPECS["ssf"]]))
    folded = fold(model)
    assert torch.equal(logits(fold(folded)), logits(folded))
    with pytest.raises(DeltaFileError, match="save the model that it was folded from"):
        save_delta(tmp_path / "delta.safetensors", folded)
    with pytest.raises(ConfigError, match="has its strength for good"):
        folded.set_strength(0.0)
    model.requires_grad_(True)
    with pytest.raises(DeltaFileError, match=r"call model\.backbone\.unfreeze\(\) before"):
        save_delta(tmp_path / "delta.safetensors", model)
    model.backbone.unfreeze()
    come_back(tmp_path, model.eval())


def changed_backbone(model: TunedModel) -> None:
    with torch.no_grad():
        next(model.backbone.model.parameters()).mul_(2.0)


def diverged(model: TunedModel) -> None:
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")


def named(*names: Any) -> Callable[[TunedModel], None]:
    return lambda model: setattr(model, "class_names", list(names))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_backbone, "no longer those it was made with"),
        (diverged, "NaN or infinity"),
        (lambda model: model.head.double(), "several precisions"),
        (named(1, 2, 3), "no valid class_names"),
        (named("a", "b"), "2 class names"),
        (named("a", "b", "caf\udce9"), "plain JSON values"),
        (lambda model: setattr(model, "info", None), "no valid info"),
        (lambda model: setattr(model, "info", {"data": "x"}), "no valid info \\(data is"),
        (lambda model: setattr(model, "head", nn.Identity()), "its head is not one of 3 classes"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(
    tmp_path: Path, change: Callable[[TunedModel], None], message: str
) -> None:
    model = TunedModel(create_backbone(NANO), 3, [SPECS["prompt"]])
    change(model)
    with pytest.raises(DeltaFileError, match=message):
        save_delta(tmp_path / "delta.safetensors", model)
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_none_are_null_in_a_file(tmp_path: Path) -> None:
    model = moved(TunedModel(create_backbone(NANO), 3))
    model.info = {"metrics": {"loss": float("nan"), "acc": 0.5}}
    path = save_delta(tmp_path / "delta.safetensors", model)
    assert read_header(path)["info"] == {"metrics": {"loss": None, "acc": 0.5}}
    model.info = {"where": tmp_path}
    with pytest.raises(DeltaFileError, match="keeps plain JSON values in info and preset"):
        save_delta(path, model)


def test_the_strength_is_in_one_place() -> None:
    model = TunedModel(create_backbone(NANO), 3, [SPECS["prompt"], SPECS["lora"]])
    assert model.delta is not None
    model.delta.set_strength(0.3)
    assert model.strength == 0.3
    model.set_strength(1)
    assert model.delta.strength == model.strength == 1.0
    cast("DeltaPart", model.delta.parts[0]).strength = 0.5
    for owner in (model, model.delta):
        with pytest.raises(ConfigError, match=r"different strengths, 0\.5, 1\.0: set one"):
            _ = owner.strength
    for alpha in ("0.5", None, float("nan"), 1.1):
        for set_strength in (model.set_strength, model.delta.set_strength):
            with pytest.raises(ConfigError, match="strength is a number between 0"):
                set_strength(alpha)  # type: ignore[arg-type]


def test_the_head_follows_the_strength_of_the_delta() -> None:
    model = TunedModel(create_backbone(NANO), 3, [SPECS["prompt"]]).eval()
    anchor = nn.Linear(model.backbone.num_features, 3)
    model.set_anchor(anchor)
    assert model.delta is not None
    model.delta.set_strength(0.0)
    features = torch.randn(2, model.backbone.num_features)
    assert torch.equal(model.classify(features), anchor(features))


def test_an_anchor_moves_with_its_model_and_is_in_no_file(tmp_path: Path) -> None:
    model = TunedModel(create_backbone(NANO), 3, [SPECS["prompt"]])
    model.set_anchor(nn.Linear(model.backbone.num_features, 3))
    model.double().set_strength(0.5)
    assert model.classify(torch.randn(2, model.backbone.num_features).double()).dtype == torch.float64
    assert not any("anchor" in key for key in [*model.state_dict(), *read_header(save_delta(tmp_path / "a", model))])
    assert read_header(tmp_path / "a")["tensors"] == ["delta.parts.0.tokens", "head.bias", "head.weight"]


def test_a_model_that_kept_nothing_of_where_it_started_cannot_go_back() -> None:
    model = fine_tuned("pretrained")
    model.set_strength(1.0)
    with pytest.raises(ConfigError, match=r"pretrained weights are not kept .* `vpt robustness run --anchor`"):
        model.set_strength(0.5)
    assert model.strength == 1.0


def test_modes_are_told_as_they_are() -> None:
    backbone = create_backbone(NANO)
    assert not any(module.training for module in backbone.modules())
    assert not vpt.attach(backbone, [SPECS["lora"]]).training
    backbone = create_backbone(NANO).train()
    assert vpt.attach(backbone, [SPECS["lora"]]).training
    model = TunedModel(create_backbone(NANO), 3, [SPECS["lora"]])
    modes = {name: module.training for name, module in model.named_modules()}
    assert all(training != name.startswith("backbone.model") for name, training in modes.items())
