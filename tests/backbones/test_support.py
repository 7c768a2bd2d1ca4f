"""Which of timm's models take what, as a command and as a page says it."""

from __future__ import annotations

import pytest
import timm

from benchmarks.backbones import OURS, kept
from vpt.backbones import create_backbone
from vpt.backbones.support import count, model_names, support
from vpt.deltas import attach
from vpt.errors import UnknownNameError, UnsupportedBackboneError


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet18", "convnext_atto"])
def test_what_is_said_to_take_prompts_takes_them(name: str) -> None:
    found = support(name)
    backbone = create_backbone(name, "random")
    assert found.parameters == sum(each.numel() for each in backbone.model.parameters())
    assert found.image_size == backbone.image_size
    assert found.builds
    if found.prompts:
        attach(backbone, [{"name": "prompt", "num_tokens": 2}])
        return
    with pytest.raises(UnsupportedBackboneError) as refused:
        attach(backbone, [{"name": "prompt", "num_tokens": 2}])
    assert found.refused in str(refused.value)


def test_the_default_weights_come_first() -> None:
    found = support("vit_tiny_patch16_224")
    assert found.checkpoints == ("augreg_in21k_ft_in1k", "augreg_in21k")
    assert (found.family, found.licence) == ("vision_transformer", "apache-2.0")
    with pytest.raises(UnknownNameError, match="did you mean 'resnet18'"):
        support("resnet18x")


def test_a_page_says_what_was_counted_with_this_timm() -> None:
    rows = kept().rows()
    if rows[0]["timm"] != timm.__version__:
        pytest.skip(f"docs/backbones.md counts timm {rows[0]['timm']}, this is {timm.__version__}")
    ours = [name for name in model_names("*nano*") if support(name).family == OURS]
    assert sum(row["names"] + len(row["unbuilt"]) for row in rows) == len(model_names()) - len(ours)
    for row in rows[::12]:
        if row["refused"]:
            assert not support(row["refused"][0]).prompts, row["family"]
    counted = next(row for row in rows if row["family"] == "swin_transformer_v2")
    swins = [each for each in map(support, model_names("swinv2_*")) if each.family == "swin_transformer_v2"]
    assert count(swins).prompted_names == counted["prompted_names"] > 0
