"""The equalities of the tiny families on a real pretrained ViT-Ti/16 and real photographs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.deltas.families import relative
from tests.deltas.oracle import concatenated_features
from vpt.backbones import create_backbone
from vpt.data import VTABDataModule
from vpt.deltas import attach

DATA = os.environ.get("VPT_DATA")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(DATA is None, reason="VPT_DATA names no folder of real data")]
NAME = "vit_tiny_patch16_224"


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_prompts_on_real_weights_equal_the_concatenation(deep: bool) -> None:
    root = Path(str(DATA))
    weights = root / "weights" / f"{NAME}.augreg_in21k_ft_in1k.safetensors"
    backbone, twin = (create_backbone(NAME, str(weights)).double() for _ in range(2))
    batch = VTABDataModule("caltech101", root=root, preset="timm").split("test").images[:4]
    images = torch.from_numpy(batch.copy())
    bare = backbone(images)
    (tokens,) = attach(backbone, [{"name": "prompt", "num_tokens": 10, "deep": deep}]).parameters()
    nn.init.normal_(tokens)
    ours = backbone(images)
    assert relative(ours, bare) > 1e-3
    theirs = concatenated_features(twin.model, twin.normalize(images), tokens, deep=deep)
    assert relative(ours, theirs) <= 1e-10
    (grad,) = torch.autograd.grad(ours.square().sum(), tokens)
    (expected,) = torch.autograd.grad(theirs.square().sum(), tokens)
    assert relative(grad, expected) <= 1e-10
