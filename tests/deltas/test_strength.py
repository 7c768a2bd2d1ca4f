"""A strength for each layer, against models whose tensors are weakened layer by layer by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.deltas.families import images, make, relative
from vpt.backbones import create_backbone
from vpt.backbones.strength import times
from vpt.backbones.target_modules import layer_numbers
from vpt.deltas import attach
from vpt.deltas.composition import Delta
from vpt.errors import ConfigError
from vpt.export.onnx_torch import fold
from vpt.models import TunedModel

DELTAS: dict[str, list[dict[str, Any]]] = {
    "deep": [{"name": "prompt", "num_tokens": 3}],
    "shallow": [{"name": "prompt", "num_tokens": 3, "deep": False}],
    "prefix": [{"name": "prefix", "num_tokens": 2}],
    "lora": [{"name": "lora", "rank": 2, "targets": ["q", "v", "fc1"]}],
    "dora": [{"name": "dora", "rank": 2, "targets": ["q", "v", "fc1"]}],
    "vera": [{"name": "vera", "rank": 4, "targets": ["q", "v", "fc1"]}],
    "mlae": [{"name": "mlae", "rank": 2, "targets": ["q", "v", "fc1"]}],
    "pvera": [{"name": "pvera", "rank": 4, "targets": ["q", "v", "fc1"]}],
    "glora": [{"name": "glora", "rank": 2, "targets": ["q", "v", "fc1"]}],
    "ssf": [{"name": "ssf"}],
    "adapter": [{"name": "adapter", "rank": 2, "placement": "houlsby"}],
    "fact": [{"name": "fact", "rank": 2}],
    "rep-adapter": [{"name": "rep_adapter", "rank": 2}],
    "bias": [{"name": "bias"}],
    "full": [{"name": "full"}],
    "gps": [{"name": "gps"}],
    "spt": [{"name": "spt_lora", "rank": 2, "budget": 0.06}],
    "added": [{"name": "prompt_add", "deep": True}],
    "frame": [{"name": "prompt_pad", "width": 2}],
    "mlp": [{"name": "mlp_head", "layers": 2}],
    "pool": [{"name": "attention_pool", "queries": 4}],
    "recipe": [
        {"name": "prompt", "num_tokens": 2},
        {"name": "bias"},
        {"name": "norm", "bias": False},
        {"name": "lora", "rank": 2},
    ],
}
SCHEDULE = (0.3, 0.0, 0.5, 1.0, 0.7)
"""Of a vision transformer of three blocks: embeddings, blocks, the last one with the norm behind it, head."""


def drawn(family: str, specs: list[dict[str, Any]]) -> Delta:
    """A delta on a backbone, with tensors far from its start."""
    backbone, _ = make(family)
    delta = attach(backbone, specs)
    generator = torch.Generator().manual_seed(0)
    for parameter in delta.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return delta.eval()


def features(delta: Delta, family: str = "vit") -> Tensor:
    part: Any = delta.parts[0]
    with torch.no_grad():
        found: Tensor = part.backbone.eval()(images(family))
    return found


@pytest.mark.parametrize("family", ["vit", "swin", "beit"])
@pytest.mark.parametrize("kind", DELTAS)
def test_equal_strengths_are_one_strength_bit_for_bit(kind: str, family: str) -> None:
    delta = drawn(family, DELTAS[kind])
    part: Any = delta.parts[0]
    number = layer_numbers(part.backbone)[1] + 1
    for alpha in (0.0, 0.4, 1.0):
        delta.set_strength(alpha)
        one = features(delta, family)
        delta.set_strength([alpha] * number)
        assert torch.equal(features(delta, family), one)
        assert delta.strength == alpha
        delta.set_strength([alpha, alpha])
        assert torch.equal(features(delta, family), one)
    delta.set_strength([0.0] * number)
    weak = features(delta, family)
    delta.detach()
    assert torch.equal(features(delta, family), weak)


@pytest.mark.parametrize("family", ["vit", "swin", "swinv2", "beit", "siglip"])
@pytest.mark.parametrize("kind", DELTAS)
def test_nearly_equal_strengths_are_nearly_one(kind: str, family: str) -> None:
    delta = drawn(family, DELTAS[kind])
    part: Any = delta.parts[0]
    number = layer_numbers(part.backbone)[1] + 1
    delta.set_strength(0.4)
    one = features(delta, family)
    delta.set_strength([0.4 + 1e-9 * layer for layer in range(number)])
    assert not isinstance(delta.strength, float)
    assert relative(features(delta, family), one) <= 1e-6
    delta.set_strength([0.4] * (number - 1) + [0.5])
    readout = kind in ("mlp", "pool")
    if not readout and family in ("vit", "swin", "swinv2"):  # elsewhere the pool has weights, with the head
        assert torch.equal(features(delta, family), one)


@pytest.mark.parametrize("kind", ["lora", "adapter", "ssf", "bias", "full", "added"])
def test_each_layer_is_weakened_by_its_own_strength(kind: str) -> None:
    delta, weakened = drawn("vit", DELTAS[kind]), drawn("vit", DELTAS[kind])
    part: Any = weakened.parts[0]
    own = dict(part.backbone.model.named_parameters())
    for name, tensor in part.named_parameters():
        name = name.removeprefix("values.").removeprefix("scale.").removeprefix("shift.")
        if kind in ("lora", "adapter"):
            block = int(name.split(".")[1].split("_")[0])
            if name.startswith("up."):
                tensor.data *= SCHEDULE[1 + block]
        elif kind == "added":
            tensor.data *= torch.tensor(SCHEDULE[1:-1]).view(-1, 1, 1).double()
        else:
            path = name.split("/")
            alpha = SCHEDULE[1 + int(path[1])] if path[0] == "blocks" else SCHEDULE[0 if "embed" in name else 3]
            alpha = SCHEDULE[0] if path[0] in ("cls_token", "pos_embed") else alpha
            start = own[".".join(path)].data if kind in ("bias", "full") else torch.ones_like(tensor.data)
            if kind == "ssf" and tensor is not part.scale[name]:
                start = torch.zeros_like(tensor.data)
            tensor.data = start + alpha * (tensor.data - start)
    delta.set_strength(SCHEDULE)
    assert delta.strength == SCHEDULE
    assert relative(features(delta), features(weakened)) <= 1e-12


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_the_strength_of_prompts_is_a_gate_of_each_block(name: str) -> None:
    delta = drawn("vit", [{"name": name, "num_tokens": 3}])
    alphas = (0.2, 0.9, 0.05)
    gated = drawn("vit", [{"name": name, "num_tokens": 3, "gate": {"init": 0, "per": "block"}}])
    part: Any = gated.parts[0]
    part.load_state_dict(
        {**delta.parts[0].state_dict(), "gate": torch.tensor([math.log(each) for each in alphas], dtype=torch.float64)}
    )
    delta.set_strength((0.0, *alphas, 1.0))
    assert relative(features(delta), features(gated)) <= 1e-12


@contextmanager
def tokens_before(blocks: nn.ModuleList) -> Iterator[list[Tensor]]:
    found: list[Tensor] = []
    handles = [block.register_forward_pre_hook(lambda _, args: found.append(args[0].clone())) for block in blocks]
    yield found
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", ["deep", "prefix", "lora", "adapter", "ssf", "bias", "full", "recipe"])
def test_what_lies_before_the_first_strength_above_0_is_the_backbone_bit_for_bit(kind: str) -> None:
    delta = drawn("vit", DELTAS[kind])
    part: Any = delta.parts[0]
    delta.set_strength((0.0, 0.0, 0.0, 0.6, 1.0))
    with tokens_before(part.backbone.model.blocks) as ours:
        changed = features(delta)
    delta.set_strength(0.0)
    with tokens_before(part.backbone.model.blocks) as bare:
        plain = features(delta)
    assert all(torch.equal(one, other) for one, other in zip(ours, bare, strict=True))
    assert relative(changed, plain) > 1e-6


def test_a_line_has_the_two_numbers_of_the_first_and_the_last_layer() -> None:
    delta = drawn("vit", DELTAS["lora"])
    delta.set_strength([0.2, 1.0])
    assert delta.strength == pytest.approx((0.2, 0.4, 0.6, 0.8, 1.0), abs=1e-15)
    delta.set_strength((0.0, 1.0))
    assert delta.strength == pytest.approx((0.0, 0.25, 0.5, 0.75, 1.0), abs=1e-15)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([0.5] * 4, "one for each of the 5 layers"),
        ([0.1, 0.2, 1.5, 1, 1], "between 0"),
        (["a", "b"], "between 0"),
        ([], "got 0"),
        ("linear", "between 0"),
    ],
)
def test_strengths_of_another_number_are_refused_and_nothing_moves(given: Any, said: str) -> None:
    delta = drawn("vit", DELTAS["recipe"])
    delta.set_strength(0.5)
    with pytest.raises(ConfigError, match=said):
        delta.set_strength(given)
    assert delta.strength == 0.5


def test_the_head_has_the_last_strength_and_a_folded_model_keeps_all() -> None:
    torch.manual_seed(0)
    backbone = create_backbone("vit_nano_patch8_64", "pretrained", 64)
    model = TunedModel(backbone, 3, [{"name": "prompt", "num_tokens": 2}, {"name": "lora", "rank": 2}]).eval()
    anchor = nn.Linear(backbone.num_features, 3)
    model.set_anchor(anchor)
    for parameter in model.delta.parameters() if model.delta is not None else ():
        parameter.data += 0.1 * torch.randn_like(parameter)
    depth = len(backbone.layout.blocks)
    photos = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        model.set_strength([0.0] * (depth + 1) + [0.25])
        expected = torch.lerp(anchor(model.encode(photos)), model.head(model.encode(photos)), 0.25)
        torch.testing.assert_close(model(photos), expected, atol=1e-5, rtol=1e-5)
        model.set_strength([0.0, *[0.5] * (depth - 1), 1.0, 0.25])
        small = fold(model)
        torch.testing.assert_close(small(photos), model(photos), atol=1e-5, rtol=1e-5)
        assert small.strength == model.strength


@given(st.floats(0, 1), st.lists(st.floats(0, 1), min_size=3, max_size=6).map(tuple))
def test_a_share_of_strengths(alpha: float, strength: tuple[float, ...]) -> None:
    assert times(1.0, strength) == strength
    assert times(0.0, strength) == 0.0
    assert times(alpha, 0.5) == alpha * 0.5
    found = times(alpha, strength)
    assert found == 0.0 or found == tuple(alpha * each for each in strength)
