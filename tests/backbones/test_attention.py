"""Fused and open attention are one function; on a CPU in bfloat16 the open one runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.deltas.families import FAMILIES, images, make, relative
from vpt.backbones.attention.base import OpenAttention
from vpt.backbones.factory import Backbone
from vpt.deltas import Delta, attach


class Called(TorchFunctionMode):
    """Counts calls of PyTorch's fused attention."""

    fused = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts and calls."""
        self.fused += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def prompted(family: str, dtype: torch.dtype = torch.float64) -> tuple[Backbone, Delta]:
    """Deep prompts that matter, in all blocks but the first, which runs timm's own code."""
    backbone, _ = make(family)
    delta = attach(backbone, [{"name": "prompt", "num_tokens": 3, "layers": [1, len(backbone.layout.blocks)]}])
    for parameter in delta.parameters():
        nn.init.normal_(parameter, std=3.0)
    delta.to(dtype)
    return backbone.to(dtype), delta


@pytest.mark.parametrize("family", FAMILIES)
def test_open_attention_equals_the_fused_kernel(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, delta = prompted(family)
    parameters = list(delta.parameters())
    features, gradients = [], []
    for slow in (False, True):
        monkeypatch.setattr(OpenAttention, "_fused_is_slow", lambda _, slow=slow: slow)
        features.append(backbone(images(family)))
        gradients.append(torch.autograd.grad(features[-1].square().sum(), parameters))
    assert relative(*features) <= 1e-12
    assert all(relative(one, other) <= 1e-10 for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_on_a_cpu_is_not_fused(family: str) -> None:
    backbone, _ = prompted(family, torch.float32)
    with torch.no_grad(), Called() as single:
        expected = backbone(images(family).float())
    with torch.no_grad(), Called() as half, torch.autocast("cpu", torch.bfloat16):
        found = backbone(images(family).float())
    pools = family == "siglip"  # its pool is timm's own, with a single query
    assert single.fused > pools
    assert half.fused == pools
    assert relative(found.float(), expected) < 0.05


def test_a_model_in_bfloat16_is_not_fused_and_drops_attention_only_in_training() -> None:
    backbone, _ = prompted("vit", torch.bfloat16)
    with torch.no_grad(), Called() as called:
        one, other = (backbone(images("vit").bfloat16()) for _ in range(2))
    assert called.fused == 0
    assert torch.equal(one, other)
    backbone.unfreeze()
    backbone.train()
    for attention in backbone.layout.attentions:
        attention.attn_drop.p = 0.5
    with torch.no_grad():
        assert not torch.equal(backbone(images("vit").bfloat16()), one)


@pytest.mark.parametrize("family", ["vit", "eva02-split", "beit", "swin", "swinv2"])
def test_attention_that_is_not_to_be_fused_is_not(family: str) -> None:
    backbone, _ = prompted(family)
    with torch.no_grad(), Called() as before:
        expected = backbone(images(family))
    for attention in backbone.layout.attentions:
        attention.fused_attn = False
    with torch.no_grad(), Called() as after:
        found = backbone(images(family))
    assert before.fused > 0
    assert after.fused == 0
    assert relative(found, expected) <= 1e-12


def test_a_prefix_keeps_the_precision_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, _ = make("vit")
    attach(backbone.float(), [{"name": "prefix", "num_tokens": 3}])
    seen: list[torch.dtype] = []
    attend = OpenAttention.attend

    def noted(self: OpenAttention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        seen.extend((q.dtype, k.dtype, v.dtype))
        return attend(self, q, k, v, bias)

    monkeypatch.setattr(OpenAttention, "attend", noted)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        backbone(images("vit").float())
    assert len(seen) == 3 * len(backbone.layout.blocks)
    assert set(seen) == {torch.bfloat16}
