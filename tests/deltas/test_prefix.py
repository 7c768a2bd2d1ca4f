"""A prefix is what attention sees of a prompt, freed from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.deltas.families import FAMILIES, images, make, relative
from vpt.deltas import attach
from vpt.deltas.base import pick
from vpt.deltas.prefix import Prefix
from vpt.deltas.prompts.prompt import Prompt
from vpt.errors import ConfigError, UnknownNameError


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_of_the_keys_and_values_of_prompts_is_the_prompts(family: str) -> None:
    backbone, _ = make(family)
    prompted = attach(backbone, [{"name": "prompt", "num_tokens": 3}])
    (prompt,) = prompted.parts
    assert isinstance(prompt, Prompt)
    ours = backbone(images(family))
    pairs = [prompt.keys_values(i, attention, 1) for i, attention in enumerate(backbone.layout.attentions)]
    prompted.detach()
    assert relative(backbone(images(family)), ours) > 1e-5
    (prefix,) = attach(backbone, [{"name": "prefix", "num_tokens": 3}]).parts
    assert isinstance(prefix, Prefix)
    with torch.no_grad():
        for layer, pair in enumerate(pairs):
            for store, part in zip((prefix.keys, prefix.values), pair, strict=True):
                pick(store, layer).copy_(part[0].transpose(0, 1).flatten(1))
    assert torch.equal(backbone(images(family)), ours)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_tokens": 0}, ConfigError, "at least 1"),
        ({"num_tokens": 2, "hidden": 0}, ConfigError, "hidden needs to be at least 1"),
        ({"num_tokens": [1, 2, 1], "hidden": 4}, ConfigError, "one num_tokens for all layers"),
        ({"num_tokens": 2, "dropout_mode": "sample"}, UnknownNameError, "dropout_mode"),
        ({"num_tokens": 2, "layers": [2, 2]}, ConfigError, "of 3 blocks"),
    ],
)
def test_bad_prefixes_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    backbone, _ = make("vit")
    with pytest.raises(error, match=message):
        attach(backbone, [{"name": "prefix", **options}])
