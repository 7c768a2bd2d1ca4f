"""What of their attention the blocks give to prompts, also where nothing is known of their tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.deltas.test_whole_models import MODELS, images, make, prompted
from vpt.backbones import create_backbone, extra_shares, recording
from vpt.deltas import attach
from vpt.errors import ConfigError
from vpt.models import TunedModel
from vpt.visualize import Scene, draw, write_gallery
from vpt.visualize.attention_maps import prompt_shares
from vpt.visualize.figure_kinds import KINDS

PROMPTS = 2
FUSED = ["relpos", "sam", "naflex", "hiera", "hieradet", "coatnet", "maxvit", "pvt", "twins-svt", "davit", "qwen3"]


class Watch(TorchFunctionMode):
    """Computes the softmax of every fused call with prompts anew, and keeps what goes to the last keys."""

    def __init__(self) -> None:
        super().__init__()
        self.shares: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k = args[0], args[1]
            scale = kwargs.get("scale") or q.shape[-1] ** -0.5
            logits = torch.einsum("bhqd,bhkd->bhqk", q * scale, k)
            mask = kwargs.get("attn_mask")
            weights = (logits if mask is None else logits + mask).softmax(dim=-1)
            self.shares.append(weights[..., -PROMPTS:].sum(dim=-1).mean(dim=-1))
        return func(*args, **kwargs)


@pytest.mark.parametrize("family", FUSED)
def test_it_is_the_part_of_the_softmax_that_falls_on_prompts(family: str) -> None:
    backbone, _ = make(family)
    delta, _ = prompted(backbone, PROMPTS)
    x = images(backbone.input_shape[1])
    before = backbone(x)
    with Watch() as watch:
        backbone(x)
    found = extra_shares(backbone, x)
    assert len(found) == len(watch.shares) == len(backbone.attention_layout.attentions)
    for own, other in zip(found, watch.shares, strict=True):
        expected = other.reshape(len(x), -1, other.shape[1]).mean(dim=1)
        torch.testing.assert_close(own.share.double(), expected, rtol=1e-6, atol=1e-7)
        assert 0 < own.uniform < 1
    assert torch.equal(backbone(x), before)
    delta.set_strength(0.0)
    assert all(not own.share.any() and own.uniform == 0.0 for own in extra_shares(backbone, x))


@pytest.mark.parametrize("family", [name for name in MODELS if name not in FUSED and name != "crossvit"])
def test_every_model_that_takes_prompts_says_it(family: str) -> None:
    backbone, _ = make(family)
    prompted(backbone, PROMPTS)
    found = extra_shares(backbone, images(backbone.input_shape[1]))
    assert len(found) == len(backbone.attention_layout.attentions)
    assert all(own.share.isfinite().all() and own.uniform > 0 for own in found)


@pytest.mark.parametrize("name", ["vit_nano_patch8_64", "swin_nano_patch4_window8_64"])
def test_where_tokens_are_known_it_is_the_mean_of_all_queries(name: str) -> None:
    backbone = create_backbone(name)
    backbone.trim = False  # in the last block nothing but the class token would ask
    attach(backbone, [{"name": "prompt", "num_tokens": 3}, {"name": "prefix", "num_tokens": 1}])
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with recording(backbone) as calls, torch.no_grad():
        backbone(pixels)
    for call, own in zip(calls, extra_shares(backbone, pixels), strict=True):
        weights = call.weights()
        expected = weights[..., call.tokens :].sum(dim=-1).mean(dim=-1).reshape(2, -1, weights.shape[1]).mean(dim=1)
        torch.testing.assert_close(own.share, expected, rtol=1e-4, atol=1e-6)
        assert own.uniform == pytest.approx(4 / weights.shape[-1])


def whole(*specs: dict[str, Any]) -> Scene:
    backbone = create_backbone("pvt_v2_b0", "random", image_size=None)
    model = TunedModel(backbone, 2, specs).eval()
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    labels = torch.tensor([0, 1])
    return Scene(model, pixels, labels, pixels, labels)


def test_of_a_model_that_timm_runs_whole_the_share_is_drawn_and_nothing_else(tmp_path: Path) -> None:
    scene = whole({"name": "prompt", "num_tokens": 2})
    found = prompt_shares(scene.model, scene.images)
    (table,) = found.tables.values()
    assert table.shape == (8, 8)  # stages of 1, 2, 5 and 8 heads
    assert np.isfinite(table).sum() == 2 * (1 + 2 + 5 + 8)
    paths, left_out = write_gallery(scene, tmp_path)
    assert {path.stem for path in paths} == {"share", "index"}
    assert len(left_out) == len(KINDS) - 1
    with pytest.raises(ConfigError, match="which tokens of pvt_v2_b0 lie where is not known"):
        draw(scene, "compare")
    with pytest.raises(ConfigError, match="'share' cannot be drawn: the model has no prompts"):
        draw(whole(), "share")
