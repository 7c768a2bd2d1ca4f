"""On a card attention of every family is the concatenation: in single and half precision, and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.deltas.families import FAMILIES, images, make, relative
from tests.deltas.oracle import concatenated_features
from tests.deltas.test_prompts import prompts
from vpt.backbones import create_backbone
from vpt.deltas import attach

# Largest relative errors against double precision, of features and of gradients: some roundings of 24 and 8 bits.
SINGLE, HALF = 1e-5, 0.05
ONE_OF_EACH_CLASS = ("vit", "rope-grouped", "dinov3", "beit", "swin", "swinv2")
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
Features = Callable[[Tensor], Tensor]


def errors(
    family: str, device: torch.device, dtype: torch.dtype, half: bool = False, compiled: bool = False
) -> list[float]:
    """Of the features, and of the gradient of each parameter, against the concatenation in double precision."""
    backbone, twin = make(family)
    delta = attach(backbone, [{"name": "prompt", "num_tokens": 9, "deep": True}])
    for parameter in delta.parameters():
        nn.init.normal_(parameter, std=1.0)
    theirs = concatenated_features(twin, images(family), prompts(delta, len(backbone.layout.blocks)))
    head = torch.randn(theirs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    parameters = list(delta.parameters())
    expected = torch.autograd.grad((theirs * head).sum(), parameters)
    backbone.to(device, dtype)
    delta.to(device, dtype)
    run = cast("Features", backbone)
    if compiled:
        torch.compiler.reset()
        run = cast("Features", torch.compile(run, backend="inductor" if device.type == "cuda" else "eager"))
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        ours = run(images(family).to(device))
    assert ours.device.type == device.type
    found = torch.autograd.grad((ours.double() * head.to(device)).sum(), list(delta.parameters()))
    pairs = [(ours, theirs), *zip(found, expected, strict=True)]
    return [relative(a.double().cpu(), b) for a, b in pairs]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_the_concatenation_in_double_and_single_precision(family: str, device: torch.device) -> None:
    assert max(errors(family, device, torch.float64)) <= 1e-10
    assert max(errors(family, device, torch.float32)) <= SINGLE


def nano(device: torch.device, precision: str, log_bias: bool) -> tuple[Tensor, ...]:
    """Features of the shipped ViT, whose heads have 64 channels as those of all larger ones, and their gradients."""
    backbone = create_backbone("vit_nano_patch8_64")
    torch.manual_seed(0)
    delta = attach(backbone, [{"name": "prompt", "num_tokens": 10, "deep": True, "log_bias": log_bias}])
    dtype = torch.float64 if precision == "double" else torch.float32
    backbone.to(device, dtype)
    delta.to(device, dtype)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "half"):
        features = backbone(backbone.random_images(4).to(device))
    weights = torch.linspace(-1, 1, features.numel(), dtype=torch.float64, device=device).view_as(features)
    gradients = torch.autograd.grad((features.double() * weights).sum(), list(delta.parameters()))
    return tuple(tensor.double().cpu() for tensor in (features, *gradients))


@pytest.mark.parametrize("log_bias", [False, True], ids=["plain", "log-bias"])
@pytest.mark.parametrize(("precision", "bound"), [("single", SINGLE), ("half", HALF)])
def test_a_fused_kernel_computes_it_with_a_bias_on_the_logits_too(
    precision: str, bound: float, log_bias: bool, device: torch.device
) -> None:
    exact = nano(torch.device("cpu"), "double", log_bias)
    with sdpa_kernel(FUSED):  # an error where none of them takes it
        found = nano(device, precision, log_bias)
    assert max(relative(a, b) for a, b in zip(found, exact, strict=True)) <= bound
    other: Any = nano(torch.device("cpu"), "double", not log_bias)
    assert relative(other[0], exact[0]) > SINGLE


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_stays_within_its_bound(family: str, device: torch.device) -> None:
    found = errors(family, device, torch.float32, half=True)
    assert 1e-5 < max(found) <= HALF


@pytest.mark.parametrize("family", ONE_OF_EACH_CLASS)
def test_compiled_prompts_are_the_concatenation(family: str, device: torch.device) -> None:
    assert max(errors(family, device, torch.float32, compiled=True)) <= SINGLE


def test_every_class_of_attention_is_compiled() -> None:
    def classes(family: str) -> set[type]:
        return {type(attention) for attention in make(family)[0].attention_layout.attentions}

    assert set.union(*map(classes, ONE_OF_EACH_CLASS)) == set.union(*map(classes, FAMILIES))
