"""Deltas find what they change where parts have other classes: norms without a bias, a stem of convolutions."""

from __future__ import annotations

from typing import Any, cast

import pytest
import timm
import torch
from torch import nn

from tests.deltas.families import TINY, relative
from tests.deltas.test_deltas import SPECS, same, state
from vpt.backbones.factory import Backbone
from vpt.deltas import attach
from vpt.deltas.base import MergeablePart

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "aimv2": ("aimv2_large_patch14_224", TINY),
    "sapiens2": ("vit_base_patch16_sapiens2", TINY | {"num_kv_heads": 2}),
    "simple-norm": ("vit_tiny_patch16_224", TINY | {"norm_layer": "simplenorm"}),
    "hybrid": ("vit_tiny_r_s16_p8_224", {"img_size": 64, "embed_dim": 24, "depth": 3, "num_heads": 2}),
}


def made(family: str) -> tuple[Backbone, torch.Tensor]:
    name, options = MODELS[family]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    size = options["img_size"]
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)).double()
    return Backbone(model, name, "random", "random", size, "none").double(), images


def norms(model: nn.Module) -> set[str]:
    """By what timm calls them, wherever they are."""
    return {
        name for name, module in model.named_modules() if type(module).__name__.lower().rstrip("2d").endswith("norm")
    }


@pytest.mark.parametrize("family", ["aimv2", "sapiens2", "simple-norm"])
def test_norms_without_a_bias_are_found(family: str) -> None:
    backbone, x = made(family)
    delta = attach(backbone, [{"name": "norm"}])
    trained = {
        name.partition("values.")[2].replace("/", ".").rpartition(".")[0] for name, _ in delta.named_parameters()
    }
    assert trained == norms(backbone.model)
    assert len(trained) >= 7
    delta.detach()
    scales = attach(backbone, [{"name": "ssf"}]).parts[0].scale
    inner = ("q_norm", "k_norm")
    assert {name for name in norms(backbone.model) if not name.endswith(inner)} <= {
        key.replace("/", ".") for key in cast("nn.ParameterDict", scales)
    }
    assert torch.isfinite(backbone(x)).all()


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("family", MODELS)
def test_every_delta_trains_and_merges_there(family: str, name: str) -> None:
    backbone, x = made(family)
    before, bare = state(backbone), backbone(x)
    spec = SPECS[name]
    if "q" in spec.get("targets", ()) and "fc1_x" in str([*dict(backbone.model.named_modules())]):
        spec = spec | {"targets": ["q", "v", "fc2"]}
    delta = attach(backbone, [spec])
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tuned = backbone(x)
    assert relative(tuned, bare) > 1e-5
    tuned.square().sum().backward()
    assert all(parameter.grad is not None for parameter in delta.parameters())
    for part in delta.parts:
        if isinstance(part, MergeablePart):
            part.merge()
            with torch.no_grad():
                assert relative(backbone(x), tuned) <= 1e-10
    delta.set_strength(0.0)
    assert relative(backbone(x), bare) <= 1e-12
    delta.detach()
    assert same(backbone, before)
    assert torch.equal(backbone(x), bare)
