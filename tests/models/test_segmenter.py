"""The map of patches has a token for each patch, whatever is tuned, and delta files of its models come back whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.deltas.families import images as float_images
from tests.deltas.families import make
from tests.deltas.test_deltas import SEQUENCES_ONLY, SPECS
from vpt.backbones import create_backbone
from vpt.deltas import attach
from vpt.errors import ConfigError, DeltaFileError, UnknownNameError, UnsupportedBackboneError, VPTError
from vpt.models.classifier import TunedModel
from vpt.models.delta_file import load_classifier, load_segmentation, save_delta, start_from
from vpt.models.delta_format import read_delta
from vpt.models.segmenter import DenseModel, feature_map, map_size
from vpt.robustness.soups.model_soups import uniform

NANO = "vit_nano_patch8_64"
PROMPT: dict[str, Any] = {"name": "prompt", "num_tokens": 7}
REGISTERS = ("vit_small_patch14_reg4_dinov2.lvd142m", 56)
AVERAGED = ("vit_small_patch16_dinov3.lvd1689m", 64)


def images(size: int = 64, count: int = 2) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
@pytest.mark.parametrize(("name", "size", "side"), [(NANO, 64, 8), (*REGISTERS, 4), (*AVERAGED, 4)])
def test_the_map_is_that_of_the_patches_at_any_number_of_prompts(name: str, size: int, side: int, deep: bool) -> None:
    backbone = create_backbone(name, "pretrained" if name == NANO else "random", size)
    plain = feature_map(backbone, images(size))
    assert plain.shape == (2, backbone.num_features, side, side)
    for number in (1, 7):
        delta = attach(backbone, [PROMPT | {"num_tokens": number, "deep": deep}])
        found = feature_map(backbone, images(size))
        assert map_size(backbone) == (side, side)
        assert found.shape == plain.shape
        assert not torch.equal(found, plain)
        delta.detach()
    assert torch.equal(feature_map(backbone, images(size)), plain)


def test_the_map_is_timms_patch_features_in_their_places() -> None:
    name, size = REGISTERS
    backbone = create_backbone(name, "random", size)
    model: Any = backbone.model
    (expected,) = model.forward_intermediates(
        backbone.normalize(images(size)), indices=1, norm=True, intermediates_only=True
    )
    torch.testing.assert_close(feature_map(backbone, images(size)), expected)


def test_a_patch_of_the_map_lies_where_its_pixels_are() -> None:
    backbone = create_backbone(NANO)
    grey = torch.full((1, 3, 64, 64), 127, dtype=torch.uint8)
    changed = grey.clone()
    changed[:, :, 8:16, 40:48] = 255  # row 1, column 5
    moved = (feature_map(backbone, changed) - feature_map(backbone, grey)).square().sum(dim=1)[0]
    assert int(moved.argmax()) == 1 * 8 + 5


def test_shallow_prompts_are_cut_out_and_not_patches() -> None:
    """The oracle: tokens put into the sequence by hand, and taken out again by hand."""
    backbone = create_backbone(NANO)
    model: Any = backbone.model
    delta = attach(backbone, [PROMPT | {"deep": False}])
    found = feature_map(backbone, images())
    prompts = delta.parts[0].tokens[0].detach()  # type: ignore[index]
    delta.detach()
    with torch.no_grad():
        x = model.norm_pre(model._pos_embed(model.patch_embed(backbone.normalize(images()))))
        prefix = backbone.layout.num_prefix
        x = torch.cat([x[:, :prefix], prompts.expand(2, -1, -1), x[:, prefix:]], dim=1)
        for block in model.blocks:
            x = block(x)
        patches = model.norm(x)[:, -64:]
    torch.testing.assert_close(found, patches.mT.reshape(2, -1, 8, 8), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
@pytest.mark.parametrize("name", [NANO, "swin_nano_patch4_window8_64"])
def test_at_strength_0_the_map_is_the_untuned_backbones(name: str, deep: bool) -> None:
    plain = feature_map(create_backbone(name), images())
    model = DenseModel(create_backbone(name), 5, [PROMPT | {"deep": deep}])
    assert not torch.equal(model.encode(images()), plain)
    model.set_strength(0.0)
    assert torch.equal(model.encode(images()), plain)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("name", [NANO, "swin_nano_patch4_window8_64"])
def test_logits_have_the_size_of_the_images(name: str, kind: str) -> None:
    model = DenseModel(create_backbone(name), 5, [PROMPT], kind=kind, width=16)
    assert model(images()).shape == (2, 5, 64, 64)


def test_the_linear_head_is_one_linear_layer_for_every_patch() -> None:
    model = DenseModel(create_backbone(NANO), 3)
    weight, bias = model.head.state_dict().values()
    features = model.encode(images())
    expected = torch.einsum("kc,bchw->bkhw", weight[:, :, 0, 0], features) + bias[:, None, None]
    torch.testing.assert_close(model.classify(features), expected)
    assert weight.numel() + bias.numel() == 3 * 193


def test_heads_have_the_parameters_that_they_say() -> None:
    model = DenseModel(create_backbone(NANO), 3, kind="conv", width=16)
    assert model.parameter_counts()[0] == 192 * 16 * 9 + 16 + 16 * 3 + 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "linaer"}, UnknownNameError, "did you mean 'linear'"),
        ({"width": 0}, ConfigError, "width of the head must be at least 1"),
        ({"specs": [{"name": "mlp_head"}]}, ConfigError, "does not read: leave out mlp_head"),
        ({"num_classes": 0}, ConfigError, "num_classes must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"backbone": create_backbone(NANO), "num_classes": 3}
    with pytest.raises(error, match=message):
        DenseModel(**given | options)


def test_a_backbone_without_patches_is_refused() -> None:
    with pytest.raises(UnsupportedBackboneError, match="resnet18 has no known map of patches: segmentation takes"):
        DenseModel(create_backbone("resnet18", "random"), 3)


def saved(path: Path, **options: Any) -> DenseModel:
    torch.manual_seed(0)
    model = DenseModel(create_backbone(NANO), 3, [PROMPT], ["sky", "sea", "land"], {"name": "square"}, **options)
    save_delta(path, model)
    return model.eval()


@pytest.mark.parametrize("options", [{}, {"kind": "conv", "width": 8}], ids=["linear", "conv"])
def test_a_delta_file_comes_back_as_the_same_model(tmp_path: Path, options: dict[str, Any]) -> None:
    model = saved(tmp_path / "delta.safetensors", **options)
    loaded = load_segmentation(tmp_path / "delta.safetensors")
    assert torch.equal(loaded(images()), model(images()))
    assert loaded.class_names == ["sky", "sea", "land"]
    assert loaded.preset == {"name": "square"}
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert (tmp_path / "delta.safetensors").stat().st_size < 150_000


def test_classifiers_and_segmentation_models_are_told_apart(tmp_path: Path) -> None:
    saved(tmp_path / "dense.safetensors")
    save_delta(tmp_path / "classifier.safetensors", TunedModel(create_backbone(NANO), 3, [PROMPT]))
    with pytest.raises(DeltaFileError, match="holds a segmentation model, and a classifier is needed here"):
        load_classifier(tmp_path / "dense.safetensors")
    with pytest.raises(DeltaFileError, match="holds a classifier, and a segmentation model is needed here"):
        load_segmentation(tmp_path / "classifier.safetensors")
    with pytest.raises(DeltaFileError, match="holds a segmentation model"):  # every command reads by `read_delta`
        uniform([tmp_path / "dense.safetensors"] * 2, tmp_path / "soup.safetensors")


def test_a_delta_file_on_other_weights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    saved(path)
    with pytest.raises(DeltaFileError, match="was trained on vpt/vit_nano_patch8_64"):
        load_segmentation(path, weights="random")


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_prompts_of_a_classifier_may_start_a_segmentation_and_the_other_way_round(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    classifier = TunedModel(create_backbone(NANO), 3, [PROMPT])
    save_delta(tmp_path / "classifier.safetensors", classifier)
    dense = DenseModel(create_backbone(NANO), 4, [PROMPT], kind=kind)
    head = {key: tensor.clone() for key, tensor in dense.head.state_dict().items()}
    start_from(tmp_path / "classifier.safetensors", dense)
    tokens = "delta.parts.0.tokens"
    assert torch.equal(dense.owned()[tokens], classifier.owned()[tokens])
    assert all(torch.equal(dense.head.state_dict()[key], tensor) for key, tensor in head.items())
    save_delta(tmp_path / "dense.safetensors", dense)
    other = TunedModel(create_backbone(NANO), 3, [PROMPT])
    start_from(tmp_path / "dense.safetensors", other)
    assert torch.equal(other.owned()[tokens], dense.owned()[tokens])
    assert read_delta(tmp_path / "dense.safetensors", ("vpt-dense/1",))[0]["head"]["kind"] == kind


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("family", ["vit", "siglip", "avg-pool", "dinov3", "beit", "swin"])
def test_everything_that_trains_has_a_gradient_from_the_map(family: str, name: str) -> None:
    backbone, _ = make(family)
    if name in ("sidetune", "mlp-head", "attention-pool", "attention-pool-plain"):
        with pytest.raises(ConfigError, match="does not read"):
            DenseModel(backbone, 3, [SPECS[name]])
        return
    if family == "swin" and name in SEQUENCES_ONLY:
        with pytest.raises(VPTError, match=r"of a ViT|give pfeiffer, houlsby or parallel|use adapter there"):
            DenseModel(backbone, 3, [SPECS[name]])
        return
    model = DenseModel(backbone, 3, [SPECS[name]])
    model(float_images(family)).square().sum().backward()
    assert not [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("family", ["vit", "siglip", "avg-pool", "dinov3", "beit", "swin"])
def test_full_fine_tuning_trains_what_the_map_reads(family: str) -> None:
    backbone, _ = make(family)
    model = DenseModel(backbone, 3)
    backbone.unfreeze()
    model(float_images(family)).square().sum().backward()
    assert not [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    frozen = {key.split(".")[2] for key, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"siglip": {"attn_pool"}, "avg-pool": {"fc_norm"}, "beit": {"fc_norm"}}.get(family, set())
