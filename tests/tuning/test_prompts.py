"""Prompts equal the paper's concatenation, exactly, on every supported kind of ViT."""

from __future__ import annotations

from typing import Any, cast

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.tuning.oracle import concatenated_features
from vpt.backbones.factory import Backbone
from vpt.errors import ConfigError, UnknownNameError, UnsupportedBackboneError
from vpt.tuning import attach

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", TINY),
    "qk-norm": ("vit_tiny_patch16_224", TINY | {"qk_norm": True}),
    "scale-norm": ("vit_tiny_patch16_224", TINY | {"scale_attn_norm": True}),
    "avg-pool": ("vit_tiny_patch16_224", TINY | {"global_pool": "avg", "class_token": False}),
    "layer-scale": ("deit3_small_patch16_224", TINY | {"init_values": 1e-6}),
    "deit": ("deit_tiny_patch16_224", TINY),
    "distilled": ("deit_tiny_distilled_patch16_224", TINY),
    "dinov2": ("vit_small_patch14_dinov2", TINY),
    "dinov2-reg": ("vit_small_patch14_reg4_dinov2", TINY),
    "clip": ("vit_base_patch32_clip_224", TINY),
    "siglip": ("vit_base_patch16_siglip_224", TINY),
}


def make(family: str) -> tuple[Backbone, nn.Module]:
    """A float64 backbone whose every parameter is drawn anew, and an untouched twin of its timm model."""
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    model, twin = (timm.create_model(name, num_classes=0, **options).double() for _ in range(2))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            scale = 0.5 if key.endswith(("weight", "gamma")) and parameter.ndim == 1 else 0.0
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.2) + scale)
    twin.load_state_dict(model.state_dict())
    return Backbone(model, name, "random", "random", 32, "none").double(), twin.eval()


def images() -> Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
@pytest.mark.parametrize("family", FAMILIES)
def test_features_and_gradients_equal_the_concatenation(family: str, deep: bool) -> None:
    backbone, twin = make(family)
    bare = backbone(images())
    delta = attach(backbone, [{"name": "prompt", "num_tokens": 5, "deep": deep}])
    (tokens,) = delta.parameters()
    head = torch.randn(24, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours = backbone(images()) @ head
    assert relative(ours, bare @ head) > 1e-3, "the prompts must matter for the comparison to mean anything"
    theirs = concatenated_features(twin, images(), tokens, deep=deep) @ head
    assert relative(ours, theirs) <= 1e-10
    (grad,) = torch.autograd.grad(ours.square().sum(), tokens)
    (expected,) = torch.autograd.grad(theirs.square().sum(), tokens)
    assert relative(grad, expected) <= 1e-10


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
@pytest.mark.parametrize("mode", ["sample", "shared"])
def test_dropout_on_prompts_equals_the_concatenation_with_equal_masks(
    mode: str, deep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, twin = make("vit")
    spec = {"name": "prompt", "num_tokens": 5, "deep": deep, "dropout": 0.4, "dropout_mode": mode}
    delta = attach(backbone, [spec]).train()
    (tokens,) = delta.parameters()
    drawn: list[Tensor] = []

    def dropout(x: Tensor, p: float) -> Tensor:
        mask = (torch.rand_like(x) >= p).to(x.dtype) / (1 - p)
        drawn.append(mask)
        return x * mask

    monkeypatch.setattr("vpt.tuning.prompts.drop", dropout)
    ours = backbone(images())
    assert drawn[0].shape[0] == (3 if mode == "sample" else 1)
    masks = torch.stack([mask.expand(3, -1, -1) for mask in drawn])
    theirs = concatenated_features(twin, images(), tokens, masks, deep=deep)
    assert relative(ours, theirs) <= 1e-10
    (grad,) = torch.autograd.grad(ours.square().sum(), tokens)
    (expected,) = torch.autograd.grad(theirs.square().sum(), tokens)
    assert relative(grad, expected) <= 1e-10


def test_key_value_dropout_zeroes_channels_of_keys_and_values_per_image(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, _ = make("vit")
    spec = {"name": "prompt", "num_tokens": 5, "dropout": 0.5, "dropout_mode": "key_value"}
    attach(backbone, [spec]).train()
    shapes: list[tuple[int, ...]] = []

    def record(x: Tensor, p: float) -> Tensor:
        shapes.append(tuple(x.shape))
        return x

    monkeypatch.setattr("vpt.tuning.prompts.drop", record)
    backbone(images())
    assert shapes == [(3, 2, 5, 12)] * 6  # keys and values of three layers


def test_whole_prompt_dropout_equals_removing_those_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, twin = make("vit")
    spec = {"name": "prompt", "num_tokens": 5, "dropout": 0.5, "dropout_mode": "prompt"}
    delta = attach(backbone, [spec]).train()
    (tokens,) = delta.parameters()
    x = images()
    uniform = torch.tensor([0.9, 0.1, 0.8, 0.2, 0.7]).view(1, 1, 1, 5)
    monkeypatch.setattr("torch.rand", lambda *size, **options: uniform.expand(size))
    ours = backbone(x)
    monkeypatch.undo()
    assert relative(ours, concatenated_features(twin, x, tokens[:, [0, 2, 4]])) <= 1e-10


@pytest.mark.parametrize("mode", ["sample", "shared", "key_value", "prompt"])
def test_dropout_is_off_in_eval_mode(mode: str) -> None:
    backbone, twin = make("vit")
    spec = {"name": "prompt", "num_tokens": 5, "dropout": 0.5, "dropout_mode": mode}
    delta = attach(backbone, [spec]).eval()
    (tokens,) = delta.parameters()
    assert relative(backbone(images()), concatenated_features(twin, images(), tokens)) <= 1e-10


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
@pytest.mark.parametrize("family", FAMILIES)
def test_strength_0_and_detach_restore_the_backbone_bit_for_bit(family: str, deep: bool) -> None:
    backbone, twin = make(family)
    before = backbone(images())
    delta = attach(backbone, [{"name": "prompt", "num_tokens": 5, "deep": deep}])
    tuned = backbone(images())
    delta.set_strength(0.0)
    assert torch.equal(backbone(images()), before)
    delta.set_strength(1.0)
    assert torch.equal(backbone(images()), tuned)
    delta.detach()
    assert torch.equal(backbone(images()), before)
    assert torch.equal(backbone.tokens(images()), cast("Any", twin).forward_features(images()))
    state = backbone.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in twin.state_dict().items())


def test_strength_scales_the_odds_of_attending_to_prompts() -> None:
    backbone, _ = make("vit")
    delta = attach(backbone, [{"name": "prompt", "num_tokens": 5}])
    attention = backbone.layout.attentions[0]
    x = torch.randn(2, 17, 24, dtype=torch.float64)

    def odds() -> Tensor:
        share = attention.weights(x)[..., 17:].sum(-1)
        return share / (1 - share)

    full = odds()
    delta.set_strength(0.25)
    assert relative(odds(), 0.25 * full) <= 1e-12


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_two_prompts_of_n_equal_one_of_2n(deep: bool) -> None:
    backbone, twin = make("dinov2-reg")
    spec = {"name": "prompt", "num_tokens": 3, "deep": deep}
    delta = attach(backbone, [spec, spec])
    both = torch.cat(list(delta.parameters()), dim=1)
    assert relative(backbone(images()), concatenated_features(twin, images(), both, deep=deep)) <= 1e-10


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_whole_tokens_hold_no_prompt_and_agree_with_the_pooled_features(deep: bool) -> None:
    backbone, _ = make("dinov2-reg")
    attach(backbone, [{"name": "prompt", "num_tokens": 5, "deep": deep}])
    tokens = backbone.tokens(images())
    assert tokens.shape == (3, 5 + 16, 24)
    assert relative(cast("Any", backbone.model).fc_norm(tokens[:, 0]), backbone(images())) <= 1e-12


def test_initial_bound_is_the_papers() -> None:
    model = timm.create_model("vit_base_patch16_224", num_classes=0, depth=1)
    backbone = Backbone(model, "vit_base_patch16_224", "random", "random", 224, "none")
    (tokens,) = attach(backbone, [{"name": "prompt", "num_tokens": 50}]).parameters()
    assert 0.062 < float(tokens.abs().max()) <= 0.0625  # √(6/1536): facts/vpt.md §2.1


def test_only_the_prompts_train() -> None:
    backbone, _ = make("vit")
    delta = attach(backbone, [{"name": "prompt", "num_tokens": 5}])
    backbone(images()).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())
    assert sum(p.numel() for p in delta.parameters()) == 3 * 5 * 24


@pytest.mark.parametrize("name", ["vit_base_patch16_rpn_224", "swin_tiny_patch4_window7_224", "resnet18"])
def test_unsupported_backbones_are_refused(name: str) -> None:
    model = timm.create_model(name, num_classes=0)
    backbone = Backbone(model, name, "random", "random", 224, "none")
    with pytest.raises(UnsupportedBackboneError, match="supported"):
        attach(backbone, [{"name": "prompt", "num_tokens": 5}])


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ({"name": "promt", "num_tokens": 5}, UnknownNameError, "did you mean 'prompt'"),
        ({"name": "prompt", "num_token": 5}, UnknownNameError, "did you mean 'num_tokens'"),
        ({"name": "prompt"}, ConfigError, "needs num_tokens"),
        ({"name": "prompt", "num_tokens": 0}, ConfigError, "at least 1"),
        ({"name": "prompt", "num_tokens": 1, "dropout": 1.0}, ConfigError, r"\[0, 1\)"),
        ({"name": "prompt", "num_tokens": 1, "dropout_mode": "shard"}, UnknownNameError, "'shared'"),
        ({"name": "prompt", "num_tokens": 1, "deep": False, "dropout_mode": "prompt"}, ConfigError, "deep"),
    ],
)
def test_bad_specs_are_refused_in_one_sentence(spec: dict[str, Any], error: type[Exception], message: str) -> None:
    backbone, _ = make("vit")
    with pytest.raises(error, match=message):
        attach(backbone, [spec])


def test_strength_outside_0_and_1_is_refused() -> None:
    backbone, _ = make("vit")
    delta = attach(backbone, [{"name": "prompt", "num_tokens": 5}])
    with pytest.raises(ConfigError, match="between 0"):
        delta.set_strength(1.5)
