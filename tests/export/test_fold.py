"""Folding keeps the function and computes nothing that does not depend on the image."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.export.models import tuned
from vpt.deltas.extra_key_values import FixedKeys
from vpt.export import fold

VIT, SWIN = "vit_nano_patch8_64", "swin_nano_patch4_window8_64"
DEEP: dict[str, Any] = {"name": "prompt", "num_tokens": 3}
EQUAL: list[tuple[str, list[dict[str, Any]]]] = [
    (VIT, []),
    (VIT, [DEEP]),
    (VIT, [DEEP | {"deep": False}]),
    (VIT, [DEEP | {"project": 8, "log_bias": True}, {"name": "prefix", "num_tokens": 2, "hidden": 8}]),
    (VIT, [DEEP | {"gate": {"init": -1.0}, "fourier": 0.5}, {"name": "prefix", "num_tokens": 2, "shared": True}]),
    (VIT, [DEEP | {"deep": False, "fourier": 0.5}]),
    (VIT, [DEEP | {"adaptive": {}}]),
    (VIT, [DEEP | {"mask": ["xx. ... .x."] * 6}, DEEP | {"deep": False, "mask": ["xx. ... .x."]}]),
    (VIT, [{"name": "adapter", "placement": "post", "channel_scale": True, "std": 0.01}, {"name": "convpass"}]),
    (VIT, [DEEP, {"name": "adapter"}, {"name": "bias"}]),
    (VIT, [{"name": "full"}]),
    (VIT, [{"name": place} for place in ("prompt_add", "prompt_pad", "sidetune", "mlp_head", "linear")]),
    (VIT, [{"name": "attention_pool"}, DEEP]),
    (SWIN, [{"name": "attention_pool", "values": False}, {"name": "mlp_head"}]),
    (SWIN, [DEEP]),
    (SWIN, [{"name": "convpass"}, DEEP | {"deep": False}]),
]
MERGED: list[tuple[str, list[dict[str, Any]]]] = [
    (VIT, [{"name": "lora", "targets": ["q", "v", "fc1"]}]),
    (VIT, [{"name": "lora"}, DEEP, {"name": "bias"}]),
    (SWIN, [{"name": "ssf"}, DEEP]),
    *((VIT, [{"name": name}]) for name in ("dora", "vera", "fact", "glora", "rep_adapter")),
    (SWIN, [{"name": "dora", "targets": ["q", "fc1"]}, DEEP]),
    (SWIN, [{"name": "rep_adapter", "rank": 4}, {"name": "bias"}]),
    (
        VIT,
        [
            {"name": "bias"},
            {"name": "norm", "bias": False},
            {"name": "ssf", "targets": ["attn.proj", "mlp.fc2"], "shift": False},
        ],
    ),
]


def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "deltas"), EQUAL)
@torch.no_grad()
def test_without_a_merge_the_logits_are_equal_bit_for_bit(name: str, deltas: list[dict[str, Any]]) -> None:
    model = tuned(name, "pretrained", deltas)
    assert torch.equal(fold(model)(images()), model(images()))


@pytest.mark.parametrize(("name", "deltas"), MERGED)
@torch.no_grad()
def test_what_can_be_merged_is_and_rounds_otherwise(name: str, deltas: list[dict[str, Any]]) -> None:
    model = tuned(name, "pretrained", deltas)
    folded = fold(model)
    assert folded.delta is None
    torch.testing.assert_close(folded(images()), model(images()), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_prompts_that_travel_stay_beside_constant_ones() -> None:
    """The order of keys, and with it the rounding, changes."""
    model = tuned(SWIN, "pretrained", [DEEP, DEEP | {"deep": False, "reference_pooling": True}])
    torch.testing.assert_close(fold(model)(images()), model(images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("deltas", [[DEEP], [{"name": "bias"}], [DEEP, {"name": "full"}, {"name": "adapter"}]])
@torch.no_grad()
def test_the_strength_is_kept(alpha: float, deltas: list[dict[str, Any]]) -> None:
    model = tuned(VIT, "pretrained", deltas)
    model.set_strength(alpha)
    assert torch.equal(fold(model)(images()), model(images()))


@torch.no_grad()
def test_what_was_trained_since_the_last_forward_pass_counts() -> None:
    model = tuned(VIT, "pretrained", [DEEP, {"name": "bias"}])
    model.set_strength(0.5)
    for parameter in model.parameters():
        parameter.add_(0.1)
    assert torch.equal(fold(model)(images()), model(images()))


def test_a_model_that_has_just_been_trained_can_be_folded() -> None:
    """Prompts on their way through a Swin are a part of the last step's graph."""
    model = tuned(SWIN, "pretrained", [DEEP | {"deep": False}])
    model(images()).sum().backward()
    assert torch.equal(fold(model)(images()), model(images()).detach())


@torch.no_grad()
def test_the_model_itself_stays_as_it_is() -> None:
    model = tuned(VIT, "pretrained", [{"name": "lora"}, DEEP])
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    before = model(images())
    fold(model)
    assert torch.equal(model(images()), before)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_deep_prompts_become_two_constants_a_block() -> None:
    bare, folded = (fold(tuned(VIT, "pretrained", deltas)) for deltas in ([], [DEEP]))
    new = {key: tuple(tensor.shape) for key, tensor in folded.state_dict().items() if key not in bare.state_dict()}
    places = [f"backbone.model.blocks.{block}.attn.fixed_keys_0" for block in range(6)]
    assert new == {f"{place}.{part}": (1, 3, 3, 64) for place in places for part in ("keys", "values")}
    edits = [edit for attention in folded.backbone.layout.attentions for edit in attention.edits.values()]
    assert len(edits) == 6
    assert all(isinstance(edit, FixedKeys) for edit in edits)
