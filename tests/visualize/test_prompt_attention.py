from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.robustness.fakes import BACKBONE, SIZE, images
from vpt.backbones import create_backbone
from vpt.deltas.prompts.prompt import Prompt
from vpt.errors import ConfigError
from vpt.models import TunedModel
from vpt.visualize.attention_maps import measure_attention

PROMPTS = 4


def make(deep: bool = True) -> TunedModel:
    torch.manual_seed(0)
    backbone = create_backbone(BACKBONE, "random", SIZE)
    model = TunedModel(backbone, 3, [{"name": "prompt", "num_tokens": PROMPTS, "deep": deep}])
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(std=0.3)
    return model


def by_hand(model: TunedModel, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Attention of the class token over [tokens, prompts] written out: logits q·k/√d and a softmax.

    Returns attention to patches without prompts (B, heads, N) and the share of prompts with them (B, heads).
    """
    assert model.delta is not None
    block = model.backbone.layout.blocks[layer]
    attention, norm = cast("nn.Module", block.attn), cast("nn.Module", block.norm1)
    prompts = norm(cast("Prompt", model.delta.parts[0]).tokens[layer])
    heads, width = int(cast("int", attention.num_heads)), x.shape[2]
    weight, bias = cast("nn.Linear", attention.qkv).weight, cast("nn.Linear", attention.qkv).bias

    def split(tokens: Tensor, part: int) -> Tensor:
        rows = slice(part * width, (part + 1) * width)
        return (tokens @ weight[rows].T + bias[rows]).unflatten(-1, (heads, -1))  # type: ignore[no-any-return, no-untyped-call]

    query = split(x[:, 0], 0)
    keys = torch.cat([split(x, 1), split(prompts, 1).expand(len(x), -1, -1, -1)], dim=1)
    logits = torch.einsum("bhd,bnhd->bhn", query, keys) / query.shape[-1] ** 0.5
    share = logits.softmax(dim=-1)[..., x.shape[1] :].sum(dim=-1)
    return logits[..., : x.shape[1]].softmax(dim=-1)[..., 1:], share


def first_block_input(model: TunedModel, batch: Tensor) -> Tensor:
    block = model.backbone.layout.blocks[0]
    seen: list[Tensor] = []
    handle = cast("nn.Module", block.attn).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(batch)
    handle.remove()
    return seen[0]


@torch.no_grad()
def test_the_prompts_share_equals_a_computation_by_hand() -> None:
    model, batch = make().eval(), torch.from_numpy(images(2, 0))
    _, share = by_hand(model, first_block_input(model, batch), 0)
    np.testing.assert_allclose(measure_attention(model, batch).share[0], share.numpy(), rtol=1e-4)


@torch.no_grad()
def test_maps_are_relative_to_the_mean_patch_of_the_last_block_without_prompts() -> None:
    model, batch = make().eval(), torch.from_numpy(images(2, 0))
    last = len(model.backbone.layout.blocks) - 1
    seen: list[Tensor] = []
    attention = cast("nn.Module", model.backbone.layout.blocks[last].attn)
    model.set_strength(0.0)
    handle = attention.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(batch)
    handle.remove()
    model.set_strength(1.0)
    patches, _ = by_hand(model, seen[0], last)
    expected = patches.mean(dim=1) / patches.mean(dim=1).mean(dim=1, keepdim=True)
    measured = measure_attention(model, batch)
    np.testing.assert_allclose(measured.without.reshape(2, -1), expected.numpy(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(measured.with_prompts.mean(axis=(1, 2)), 1, rtol=1e-5)
    assert not np.allclose(measured.without, measured.with_prompts)


@pytest.mark.parametrize("deep", [True, False])
def test_the_uniform_share_counts_all_tokens(deep: bool) -> None:
    measured = measure_attention(make(deep), torch.from_numpy(images(1, 0)))
    tokens = 1 + (SIZE // 16) ** 2
    np.testing.assert_allclose(measured.uniform, PROMPTS / (PROMPTS + tokens), rtol=1e-6)
    assert measured.share.shape == (6, 1, measured.share.shape[2])
    assert np.all((measured.share > 0) & (measured.share < 1))


@torch.no_grad()
def test_guesses_are_those_of_the_bare_and_the_tuned_model() -> None:
    model, batch = make().eval(), torch.from_numpy(images(3, 0))
    without, with_prompts = measure_attention(model, batch).guesses
    assert [label for label, _ in with_prompts] == model(batch).argmax(dim=1).tolist()
    model.set_strength(0.0)
    assert [label for label, _ in without] == model(batch).argmax(dim=1).tolist()


def test_mode_and_strength_are_put_back() -> None:
    model = make().train()
    model.set_strength(0.5)
    measure_attention(model, torch.from_numpy(images(1, 0)))
    assert model.training
    assert not model.backbone.model.training
    assert model.strength == 0.5


def test_a_model_without_prompts_is_refused() -> None:
    model = TunedModel(create_backbone(BACKBONE, "random", SIZE), 3)
    with pytest.raises(ConfigError, match="no prompts"):
        measure_attention(model, torch.from_numpy(images(1, 0)))
