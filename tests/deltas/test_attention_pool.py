"""Learned queries on all patches, against their equations written out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tests.deltas.families import images, make, relative
from vpt.backbones import create_backbone
from vpt.deltas import attach
from vpt.deltas.attention_pool import AttentionPool
from vpt.errors import UnsupportedBackboneError
from vpt.models import TunedModel, load_classifier, save_delta

KINDS = {"values": {"queries": 4}, "plain": {"queries": 6, "values": False}, "one query": {"queries": 1}}


def pool_of(family: str, options: dict[str, Any]) -> tuple[AttentionPool, Any]:
    torch.manual_seed(0)
    backbone, twin = make(family)
    (part,) = attach(backbone, [{"name": "attention_pool", **options}]).parts
    assert isinstance(part, AttentionPool)
    part.queries.data.normal_(std=2.0)
    return part, twin


def written_out(part: AttentionPool, tokens: Tensor) -> Tensor:
    """Features (B, width) of final tokens (B, patches, dim), image by image and query by query."""
    found = []
    for image in tokens:
        outputs = []
        for j, query in enumerate(part.queries):
            weight = torch.stack([math.e ** (query @ token / math.sqrt(len(token))) for token in image])
            values = image if part.values is None else image @ part.values.weight.T
            width = values.shape[1] // len(part.queries)
            outputs.append((weight / weight.sum()) @ values[:, j * width : (j + 1) * width])
        found.append(torch.cat(outputs))
    return torch.stack(found)


@pytest.mark.parametrize("family", ["vit", "qk-norm", "swin", "beit", "siglip", "eva02-fused"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_pool_is_that_of_its_equations(kind: str, family: str) -> None:
    part, twin = pool_of(family, KINDS[kind])
    tokens = twin.forward_features(part.backbone.normalize(images(family)))
    tokens = tokens.flatten(1, 2) if tokens.ndim == 4 else tokens[:, twin.num_prefix_tokens :]
    expected = written_out(part, tokens)
    assert relative(part.backbone(images(family)), expected) <= 1e-12
    bare = twin.forward_head(twin.forward_features(part.backbone.normalize(images(family))), pre_logits=True)
    part.strength = 0.3
    assert relative(part.backbone(images(family)), bare + 0.3 * (expected - bare)) <= 1e-12
    attention = part.attention(tokens)
    torch.testing.assert_close(attention.sum(dim=2), torch.ones_like(attention[..., 0]))


def test_it_has_as_many_parameters_as_in_its_paper() -> None:
    part = AttentionPool(create_backbone("vit_base_patch16_224", "random"))
    own = sum(parameter.numel() for parameter in part.parameters())
    assert own == part.expected_parameters() == 32 * 768 + 768 * 768
    assert 1.3e6 < own + 769 * 1000 < 1.4e6  # with ImageNet's head "less than 1.4M" on ViT-B
    plain = AttentionPool(create_backbone("vit_base_patch16_224", "random"), values=False)
    assert sum(parameter.numel() for parameter in plain.parameters()) == 32 * 768


@torch.no_grad()
def test_all_tokens_are_constant_and_are_kept_before_it() -> None:
    part, _ = pool_of("vit", {"queries": 4})
    model = TunedModel(create_backbone("vit_nano_patch8_64"), 3, [{"name": "attention_pool"}]).eval()
    halves = model.constant_part()
    assert halves is not None
    x = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    tokens = halves[0](x)
    assert tokens.shape == (2, 65, 192)
    torch.testing.assert_close(halves[1](tokens), model.backbone(x))
    blocks = model.backbone.layout.blocks
    calls: list[int] = []
    for block in blocks:
        block.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    halves[1](tokens)
    assert calls == []
    assert part.first_block == len(part.backbone.layout.blocks)


@torch.no_grad()
def test_without_strength_the_last_block_drops_tokens_as_before() -> None:
    part, _ = pool_of("vit", {"queries": 4})
    seen: list[tuple[int, ...]] = []
    part.backbone.model.norm.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))  # type: ignore[union-attr]
    part.backbone(images())
    part.strength = 0.0
    part.backbone(images())
    assert [shape[1] for shape in seen] == [17, 1]


@torch.no_grad()
def test_a_compiled_backbone_follows_its_strength() -> None:
    part, _ = pool_of("vit", {"queries": 4})
    eager = []
    for alpha in (1.0, 0.0, 0.4):
        part.strength = alpha
        eager.append(part.backbone(images()))
    part.backbone.compile(backend="eager")
    for alpha, expected in zip((1.0, 0.0, 0.4), eager, strict=True):
        part.strength = alpha
        assert relative(part.backbone(images()), expected) <= 1e-12


@torch.no_grad()
def test_prompts_before_it_are_no_patches(tmp_path: Path) -> None:
    x = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    specs: list[dict[str, Any]] = [{"name": "prompt", "num_tokens": 3, "deep": False}, {"name": "attention_pool"}]
    model = TunedModel(create_backbone("vit_nano_patch8_64"), 3, specs).eval()
    seen: list[int] = []
    part = cast("AttentionPool", model.parts()[1])
    pool = part.pool

    def watched(tokens: Tensor, pooled: Tensor) -> Tensor:
        seen.append(tokens.shape[1])
        return pool(tokens, pooled)

    part.pool = watched  # type: ignore[method-assign]
    logits = model(x)
    assert seen == [64]
    del part.pool
    assert torch.equal(load_classifier(save_delta(tmp_path / "delta.safetensors", model))(x), logits)


def test_a_backbone_without_known_tokens_is_refused() -> None:
    with pytest.raises(UnsupportedBackboneError, match="resnet18"):
        attach(create_backbone("resnet18", "random"), [{"name": "attention_pool"}])
