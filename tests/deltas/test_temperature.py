"""The learned temperature of attention, against queries of timm's own model divided by it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import vpt
from tests.deltas import test_whole_models as whole
from tests.deltas.families import FAMILIES, images, make, relative
from tests.deltas.oracle import concatenated_features
from tests.deltas.test_prompt_options import prompt_on, tokens_of
from tests.deltas.whole_oracle import attentions, concatenate
from tests.tasks.test_tasks import BASE, data, trainer
from vpt.backbones import create_backbone
from vpt.backbones.attention.recording import recording
from vpt.deltas import attach
from vpt.deltas.prompts.prompt import Prompt
from vpt.deltas.prompts.temperature import Temperatures
from vpt.errors import ConfigError, UnknownNameError, UnsupportedBackboneError, VPTError
from vpt.models import TunedModel
from vpt.models.delta_file import save_delta
from vpt.tasks import DeltaTuning
from vpt.tasks.optimizers import rate_scales


@torch.no_grad()
def warm(attn: Any, divisors: Tensor) -> None:
    """Divides the queries of a timm attention, of each head by its divisor or of all by one, in its own weights."""
    if hasattr(attn, "logit_scale"):  # cosine attention
        attn.logit_scale -= divisors.log().reshape(-1, *(1,) * (attn.logit_scale.ndim - 1))
        return
    norm = getattr(attn, "q_norm", None)
    if norm is not None and getattr(norm, "weight", None) is not None:
        assert len(divisors) == 1
        norm.weight /= divisors
        norm.bias /= divisors
        return
    layer = next(each for each in (getattr(attn, name, None) for name in ("q_proj", "q", "qkv")) if each is not None)
    width = len(layer.weight) // (3 if layer is getattr(attn, "qkv", None) else 1)
    rows = divisors.repeat_interleave(width // len(divisors))
    if getattr(attn, "head_first", False):  # queries, keys and values of each head together
        size = width // attn.num_heads
        assert len(divisors) == 1
        rows = torch.cat([divisors.expand(size), torch.ones(2 * size)]).repeat(attn.num_heads)
    for tensor in (layer.weight, layer.bias, getattr(attn, "q_bias", None)):
        if tensor is not None:
            tensor[: len(rows)] /= rows.reshape(-1, *(1,) * (tensor.ndim - 1)) if tensor.ndim > 1 else rows


def blocks_of(twin: Any) -> list[Any]:
    return list(twin.blocks) if hasattr(twin, "blocks") else [block for stage in twin.layers for block in stage.blocks]


@torch.no_grad()
def heat(part: Prompt) -> Tensor:
    """Draws all τ from [0.5, 1.5], in the order of the blocks."""
    own = cast("Temperatures", part.temperature)
    drawn = torch.rand(own.learned.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.5
    own.learned.copy_(drawn - 1)
    return drawn


CASES = [
    *((family, True) for family in FAMILIES),
    *((f, False) for f in ("vit", "eva-token", "beit", "swin", "swinv2")),
]


@pytest.mark.parametrize(("family", "deep"), CASES)
def test_a_temperature_divides_the_products_with_all_keys(family: str, deep: bool) -> None:
    backbone, twin, delta, part = prompt_on(family, deep=deep, temperature={})
    prompts = [each.detach() for each in tokens_of(part)]
    plain = concatenated_features(twin, images(family), prompts, deep=deep)
    assert relative(backbone(images(family)), plain) <= 1e-10, "1 at first"
    blocks = blocks_of(twin)
    taus = heat(part)
    assert len(taus) == len(blocks)
    assert part.expected_parameters() == sum(each.numel() for each in part.parameters())
    for block, tau in zip(blocks, taus, strict=True):
        warm(block.attn, tau[None])
    ours = backbone(images(family))
    assert relative(ours, concatenated_features(twin, images(family), prompts, deep=deep)) <= 1e-10
    assert relative(ours, plain) > 1e-4
    delta.set_strength(0.0)
    off = backbone(images(family))
    delta.detach()
    assert torch.equal(off, backbone(images(family)))
    delta.attach()
    delta.set_strength(1.0)
    assert torch.equal(ours, backbone(images(family)))


@pytest.mark.parametrize("family", ["vit", "beit", "swin"])
def test_each_head_has_its_own_and_its_gradient(family: str) -> None:
    backbone, twin, _, part = prompt_on(family, temperature={"per": "head"})
    prompts = [each.detach() for each in tokens_of(part)]
    blocks = blocks_of(twin)
    taus = heat(part).reshape(len(blocks), 2)
    for block, own in zip(blocks, taus, strict=True):
        warm(block.attn, own)
    ours = backbone(images(family))
    assert relative(ours, concatenated_features(twin, images(family), prompts)) <= 1e-10
    learned = cast("Temperatures", part.temperature).learned
    (grad,) = torch.autograd.grad(ours.square().sum(), learned)
    for place in range(3):
        step = torch.zeros_like(learned)
        step[place] = 1e-6
        with torch.no_grad():
            learned.add_(step)
            above = backbone(images(family)).square().sum()
            learned.sub_(2 * step)
            below = backbone(images(family)).square().sum()
            learned.add_(step)
        assert float(grad[place]) == pytest.approx(float(above - below) / 2e-6, rel=1e-4, abs=1e-8)


def test_heads_that_share_keys_share_a_temperature() -> None:
    _, _, _, part = prompt_on("rope-grouped", temperature={"per": "head"})
    assert cast("Temperatures", part.temperature).learned.shape == (3,)


OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("swin", {"reference_pooling": True}),
    ("vit", {"adaptive": {"dropout": 0.0}, "gate": {"init": -1.0}}),
    ("vit", {"project": 5, "fourier": 0.5}),
    ("beit", {"shared": True, "log_bias": True}),
    ("dinov3", {"num_tokens": [2, 3, 4]}),
]


@pytest.mark.parametrize(("family", "options"), OTHERS, ids=str)
def test_other_options_are_as_on_a_backbone_of_such_queries(family: str, options: dict[str, Any]) -> None:
    backbone, _ = make(family)
    spec = {"name": "prompt", "num_tokens": 4} | options
    hot = cast("Prompt", attach(backbone, [spec | {"temperature": {}}]).parts[0]).eval()
    with torch.no_grad():
        for each in hot.parameters():
            each.normal_()
    taus = heat(hot)
    other, _ = make(family)
    for block, tau in zip(other.layout.blocks, taus, strict=True):
        warm(cast("Any", block).attn, tau[None])
    plain = attach(other, [spec]).parts[0].eval()
    plain.load_state_dict({key: tensor for key, tensor in hot.state_dict().items() if "temperature" not in key})
    assert relative(backbone(images(family)), other(images(family))) <= 1e-10


WHOLE = ["coatnet", "hiera", "pvt", "relpos", "cait", "swin-cr", "differential"]


@pytest.mark.parametrize("family", WHOLE)
def test_models_that_timm_runs_whole_take_it(family: str) -> None:
    backbone, twin = whole.make(family)
    x = whole.images(backbone.input_shape[1])
    bare = backbone(x)
    delta = attach(backbone, [{"name": "prompt", "num_tokens": 2, "temperature": {}}])
    part = cast("Prompt", delta.parts[0])
    runs = part.tokens if isinstance(part.tokens, torch.nn.ParameterList) else [part.tokens]
    with torch.no_grad():
        for run in runs:
            run.normal_()
    prompts = [tokens.detach().clone() for run in runs for tokens in run]
    for attn, tau in zip(attentions(twin), heat(part), strict=True):
        warm(attn, tau[None])
    concatenate(twin, prompts)
    whole.close(backbone(x), whole.features(twin, x))
    delta.set_strength(0.0)
    assert torch.equal(backbone(x), bare)


def test_differential_attention_has_none_for_each_head() -> None:
    with pytest.raises(UnsupportedBackboneError, match="no temperature for each head"):
        attach(whole.make("differential")[0], [{"name": "prompt", "num_tokens": 2, "temperature": {"per": "head"}}])


def logits(attention: Any, x: Tensor, extra: Sequence[Tensor], tau: float) -> Tensor:
    q, k, _ = attention.project(x)
    found: Tensor = q @ torch.cat([k, *extra], dim=2).transpose(2, 3) / 12**0.5 / tau
    return found


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_keys_of_all_deltas_are_divided_and_no_bias_is(order: Sequence[int], alpha: float) -> None:
    backbone, _ = make("vit")
    gated = {"name": "prompt", "num_tokens": 4, "gate": {"init": -1.0}, "temperature": {}, "log_bias": True}
    specs: list[dict[str, Any]] = [gated, {"name": "prefix", "num_tokens": 3}, {"name": "prompt", "num_tokens": 2}]
    delta = attach(backbone, [specs[place] for place in order])
    delta.set_strength(alpha)
    hot = cast("Prompt", delta.parts[order.index(0)])
    tau = 1 / (1 + alpha * (1 / float(heat(hot)[1]) - 1))
    with recording(backbone) as calls:
        backbone(images())
    call, attention = calls[1], backbone.layout.attentions[1]
    number = {0: 4, 1: 3, 2: 2}
    bias = {0: math.log(alpha) - 1 - math.log(4), 1: math.log(alpha), 2: math.log(alpha)}
    extra = [cast("Any", part).keys_values(1, attention, 1)[0].expand(3, -1, -1, -1) for part in delta.parts]
    added = torch.tensor(
        [0.0] * 17 + [bias[place] for place in order for _ in range(number[place])], dtype=torch.float64
    )
    expected = (logits(attention, call.args[0], extra, tau) + added).softmax(dim=-1)
    torch.testing.assert_close(call.weights(), expected.detach(), rtol=1e-10, atol=1e-12)
    asked = call.as_called(hot.queries, 1)
    assert asked is not None
    keys = torch.cat([attention.project(call.args[0])[1], *extra], dim=2)
    own = (asked @ keys.transpose(2, 3) / 12**0.5 / tau + added).softmax(dim=-1)
    torch.testing.assert_close(call.weights_of(asked), own.detach(), rtol=1e-10, atol=1e-12)


def test_temperatures_of_two_deltas_multiply() -> None:
    backbone, _ = make("vit")
    specs: list[dict[str, Any]] = [{"name": "prompt", "num_tokens": size, "temperature": {}} for size in (2, 3)]
    delta = attach(backbone, specs)
    taus = [heat(cast("Prompt", part))[0] for part in delta.parts]
    with recording(backbone) as calls:
        backbone(images())
    attention = backbone.layout.attentions[0]
    extra = [cast("Any", part).keys_values(0, attention, 1)[0].expand(3, -1, -1, -1) for part in delta.parts]
    expected = logits(attention, calls[0].args[0], extra, float(taus[0] * taus[1])).softmax(dim=-1)
    torch.testing.assert_close(calls[0].weights(), expected.detach())


def test_each_layers_strength_is_that_of_its_temperature() -> None:
    backbone, twin, delta, part = prompt_on("vit", deep=False, temperature={})
    taus = heat(part)
    delta.set_strength([1.0, 1.0, 0.0, 0.5, 1.0])  # embeddings, three blocks, head
    third = 1 / (1 + 0.5 * (1 / float(taus[2]) - 1))
    for block, tau in zip(twin.blocks, (float(taus[0]), 1.0, third), strict=True):
        warm(block.attn, torch.tensor([tau], dtype=torch.float64))
    theirs = concatenated_features(twin, images(), [part.prompts(0)], deep=False)
    assert relative(backbone(images()), theirs) <= 1e-10


def test_a_temperature_stays_within_its_bounds_and_can_come_back() -> None:
    _, _, _, part = prompt_on("vit", temperature={})
    own = cast("Temperatures", part.temperature)
    with torch.no_grad():
        own.learned.copy_(torch.tensor([-3.0, 0.5, 20.0]))
    found = torch.cat([own.of(block) for block in range(3)])
    torch.testing.assert_close(found, torch.tensor([0.01, 1.5, 10.0], dtype=torch.float64))
    (grad,) = torch.autograd.grad(found.sum(), own.learned)
    assert grad.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("per", ["block", "head"])
def test_it_counts_its_numbers_and_learns_without_decay(per: str, tmp_path: Path) -> None:
    deltas = [{"name": "prompt", "num_tokens": 2, "gate": {}, "temperature": {"per": per, "lr_scale": 7.0}}]
    task = DeltaTuning(**BASE, deltas=deltas)
    part = cast("Any", task.model.parts()[0])
    own = part.temperature
    assert own.learned.shape == ((6,) if per == "block" else (18,))
    assert rate_scales(task.model, task.hparams) == {part.gate: 10.0, own.learned: 7.0}
    assert {name for name in part.curves() if "temp" in name} == {f"temperature/block_0{b}" for b in range(6)}
    trainer(epochs=1).fit(task, datamodule=data())
    groups = cast("Any", task.optimizers()).param_groups
    (group,) = [group for group in groups if any(each is own.learned for each in group["params"])]
    assert group["weight_decay"] == 0.0
    assert bool((own.learned != 0).any())


@pytest.mark.parametrize("options", [{}, {"project": 5, "gate": {"init": -1.0}}, {"deep": False}], ids=str)
def test_a_file_keeps_it_and_a_bank_refuses_it(options: dict[str, Any], tmp_path: Path) -> None:
    spec = {"name": "prompt", "num_tokens": 3, "temperature": {"per": "head"}} | options
    model = TunedModel(create_backbone("vit_nano_patch8_64"), 4, [spec]).eval()
    with torch.no_grad():
        for parameter in model.owned().values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    file = save_delta(tmp_path / "a.safetensors", model)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(vpt.load(file)(x), model(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="more than to add the same keys"):
        vpt.PromptBank({"a": file})


def test_a_run_goes_on_from_a_file_with_its_temperatures(tmp_path: Path) -> None:
    spec = {"name": "prompt", "num_tokens": 3, "project": 5, "temperature": {}}
    model = TunedModel(create_backbone("vit_nano_patch8_64"), 4, [spec])
    part = cast("Prompt", model.parts()[0])
    taus = heat(part)
    other = TunedModel(create_backbone("vit_nano_patch8_64"), 4, [spec])
    found = cast("Prompt", other.parts()[0])
    found.load_state_dict(found.unfolded(part.folded()[1]))
    own = cast("Temperatures", found.temperature)
    torch.testing.assert_close(torch.cat([own.of(block) for block in range(6)]).double(), taus)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": {"pre": "head"}}, UnknownNameError, "did you mean 'per'"),
        ({"temperature": {"per": "token"}}, UnknownNameError, "block, head"),
        ({"temperature": {"lr_scale": 0}}, ConfigError, "never change"),
        ({"temperature": 1.5}, ConfigError, "a mapping of per, lr_scale"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[VPTError], message: str) -> None:
    with pytest.raises(error, match=message):
        attach(make("vit")[0], [{"name": "prompt", "num_tokens": 4} | options])
