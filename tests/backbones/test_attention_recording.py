"""Recorded attention is the attention of the fused path, and recording is not noticed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.deltas.families import FAMILIES, SWINS, images, make, relative
from vpt.backbones import recording
from vpt.backbones.attention.windows import Places
from vpt.backbones.factory import Backbone
from vpt.deltas import attach
from vpt.deltas.composition import Delta

KINDS = ["deep", "shallow"]


def with_prompts(family: str, kind: str, dtype: torch.dtype = torch.float64) -> tuple[Backbone, Delta, Tensor]:
    backbone, _ = make(family)
    backbone = backbone.to(dtype)
    delta = attach(backbone, [{"name": "prompt", "num_tokens": 3, "deep": kind == "deep"}])
    with torch.no_grad():
        for tensor in delta.parameters():
            tensor.normal_()
    return backbone, delta, images(family).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"])
def test_weights_times_values_are_the_fused_output(
    family: str, kind: str, dtype: torch.dtype, tolerance: float
) -> None:
    backbone, _, batch = with_prompts(family, kind, dtype)
    fused: list[Tensor] = []
    hooks = [
        attention.register_forward_hook(lambda _, __, out: fused.append(out.detach()))
        for attention in backbone.layout.attentions
    ]
    backbone.trim = False
    with recording(backbone) as calls:
        backbone(batch)
    for hook in hooks:
        hook.remove()
    assert len(calls) == len(fused) == len(backbone.layout.blocks)
    for call, expected in zip(calls, fused, strict=True):
        attention, x = call.attention, call.args[0]
        weights = call.weights()
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=0, atol=tolerance)
        _, keys, values, _ = attention.prepare(*call.args, **call.kwargs)
        _, values, _ = call.as_called(attention.edited, keys, values, None)
        values = values.repeat_interleave(weights.shape[1] // values.shape[1], dim=1)
        found = attention.finish(x, (weights @ values).transpose(1, 2).flatten(2))
        assert relative(found, expected) < tolerance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["vit", "dinov3", "beit", "swin", "swinv2"])
def test_outputs_and_gradients_are_bitwise_the_same_before_during_and_after(family: str, kind: str) -> None:
    backbone, delta, batch = with_prompts(family, kind)

    def step() -> list[Tensor]:
        delta.zero_grad()
        out = backbone(batch)
        out.square().sum().backward()
        return [
            out.detach(),
            *(parameter.grad.clone() for parameter in delta.parameters() if parameter.grad is not None),
        ]

    before = step()
    with recording(backbone) as calls:
        during = step()
    for call in calls:
        call.weights()
    after = step()
    assert len(before) > 1
    for one, two, three in zip(before, during, after, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    assert all(not attention._forward_pre_hooks for attention in backbone.layout.attentions)


@pytest.mark.parametrize(
    "places", [Places((6, 8), (3, 4), (1, 2)), Places((5, 7), (3, 3), (1, 1)), Places((4, 4), (4, 4))]
)
def test_windows_are_stitched_as_they_were_cut(places: Places) -> None:
    maps = torch.randn(2, 3, *places.grid)
    windows = places.cut(maps)
    assert windows.shape == (2 * places.windows, 3, places.area)
    assert torch.equal(places.stitch(windows), maps)


@pytest.mark.parametrize("family", SWINS)
def test_places_are_those_of_timms_own_windows(family: str) -> None:
    """A block whose attention hands its input on gives back its input exactly where it was, if stitching is right."""
    backbone, _, batch = with_prompts(family, "deep")
    entered: list[Tensor] = []
    hooks = [
        block._attn.__self__.register_forward_pre_hook(lambda module, args: entered.append(_seen(module, args[0])))  # type: ignore[union-attr]
        for block in backbone.layout.blocks
    ]
    with recording(backbone) as calls:
        backbone(batch)
    for hook in hooks:
        hook.remove()
    shifted = 0
    for call, expected in zip(calls, entered, strict=True):
        found = call.places.stitch(call.args[0].transpose(1, 2))
        assert torch.equal(found, expected.permute(0, 3, 1, 2))
        shifted += any(call.places.shift)
    assert shifted


def _seen(block: torch.nn.Module, x: Tensor) -> Tensor:
    """What a block's attention sees of its input: Swin norms it before, Swin V2 behind."""
    return x if hasattr(block.attn, "logit_scale") else block.norm1(x)  # type: ignore[operator]
