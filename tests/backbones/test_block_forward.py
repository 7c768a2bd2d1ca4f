"""Both halves of a forward pass together are the backbone, and block by block it is timm's."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from tests.deltas.families import FAMILIES, SWINS, images, make, relative
from vpt.deltas import attach


@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_before_and_after_a_cut_make_the_whole(family: str, cut: int) -> None:
    backbone, _ = make(family)
    pooled = {"reference_pooling": True} if family in SWINS else {}
    attach(backbone, [{"name": "prompt", "num_tokens": 3, "layers": [cut, len(backbone.layout.blocks)], **pooled}])
    attach(backbone, [{"name": "mlp_head"}])
    tokens = backbone.before_block(images(family), cut)
    assert relative(backbone.from_block(tokens, cut), backbone(images(family))) <= 1e-12


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_bare_it_is_timms_own_forward_pass(family: str, checkpointing: bool) -> None:
    backbone, twin = make(family)
    cast("Any", backbone.model).set_grad_checkpointing(checkpointing)
    backbone.trim = False
    assert torch.equal(backbone(images(family)), cast("Any", twin)(images(family)))
    assert torch.equal(backbone.tokens(images(family)), cast("Any", twin).forward_features(images(family)))
