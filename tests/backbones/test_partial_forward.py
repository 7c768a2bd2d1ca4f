"""Both halves together are the backbone."""

from __future__ import annotations

import pytest

from tests.deltas.families import FAMILIES, images, make, relative
from vpt.backbones.partial_forward import SplitBackbone
from vpt.deltas import attach


@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_before_and_after_a_cut_make_the_whole(family: str, cut: int) -> None:
    backbone, _ = make(family)
    attach(backbone, [{"name": "prompt", "num_tokens": 3, "layers": [cut, len(backbone.layout.blocks)]}])
    halves = SplitBackbone(backbone, cut)
    tokens = halves.before(images(family))
    assert relative(halves.after(tokens), backbone(images(family))) <= 1e-12
