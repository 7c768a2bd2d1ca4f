"""Attention maps are the softmax that the fused path computes."""

from __future__ import annotations

import pytest
import timm
import torch

from vpt.backbones import class_attention
from vpt.backbones.factory import Backbone
from vpt.deltas import attach


def make(**options: object) -> Backbone:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, **options
    )
    return Backbone(model.double(), "vit_tiny_patch16_224", "random", "random", 32, "none").double()


IMAGES = torch.rand(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_shares_sum_to_one_and_prompts_take_some(deep: bool) -> None:
    backbone = make()
    attach(backbone, [{"name": "prompt", "num_tokens": 5, "deep": deep}])
    layers = class_attention(backbone, IMAGES)
    assert len(layers) == 3
    for layer in layers:
        assert layer.prefix.shape == (2, 2, 1)
        assert layer.patches.shape == (2, 2, 16)
        assert layer.prompts.shape == (2, 2, 5)
        total = layer.prefix.sum(-1) + layer.patches.sum(-1) + layer.prompts.sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


def test_weights_reproduce_the_fused_output() -> None:
    backbone = make()
    attach(backbone, [{"name": "prompt", "num_tokens": 5}])
    attention = backbone.layout.attentions[0]
    x = torch.randn(2, 17, 24, dtype=torch.float64)
    _, keys, values = attention.project(x)
    _, values, _ = attention.edited(keys, values, None)
    expected = attention.proj((attention.weights(None, x) @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x), expected, rtol=1e-10, atol=1e-12)


def test_at_strength_0_no_prompt_is_seen() -> None:
    backbone = make()
    bare = class_attention(backbone, IMAGES)
    delta = attach(backbone, [{"name": "prompt", "num_tokens": 5}])
    delta.set_strength(0.0)
    for layer, expected in zip(class_attention(backbone, IMAGES), bare, strict=True):
        assert layer.prompts.shape == (2, 2, 0)
        assert torch.equal(layer.patches, expected.patches)


def test_without_class_token_the_average_over_patches_is_shown() -> None:
    layers = class_attention(make(class_token=False, global_pool="avg"), IMAGES)
    assert all(layer.prefix.shape == (2, 2, 0) and layer.patches.shape == (2, 2, 16) for layer in layers)
    torch.testing.assert_close(layers[0].patches.sum(-1), torch.ones(2, 2, dtype=torch.float64))


def test_recording_leaves_no_hook_and_no_change() -> None:
    backbone = make()
    before = backbone(IMAGES)
    class_attention(backbone, IMAGES)
    assert torch.equal(backbone(IMAGES), before)
    assert all(not attention._forward_pre_hooks for attention in backbone.layout.attentions)
