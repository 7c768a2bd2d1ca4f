"""Trained copies of parameters are what the backbone computes with whenever they are read, as autograd sees it."""

from __future__ import annotations

import copy
import pickle
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from tests.deltas.families import images, make, relative
from tests.deltas.test_deltas import SPECS, same, state
from vpt.backbones.factory import Backbone
from vpt.deltas import Delta, attach
from vpt.deltas.base import MergeablePart
from vpt.deltas.low_rank.lora import Lora
from vpt.errors import ConfigError

COPIES = ["bias", "norm", "partial", "full"]


class Model(nn.Module):
    def __init__(self, backbone: Backbone, delta: Delta) -> None:
        super().__init__()
        self.backbone, self.delta = backbone, delta

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.backbone(x))


def tuned(name: str, family: str = "beit") -> Model:
    backbone, _ = make(family)
    delta = attach(backbone, [SPECS[name]])
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return Model(backbone, delta)


def moved(model: Model) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {key: p.detach() + 0.05 * torch.randn_like(p) for key, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", SPECS)
def test_values_given_in_any_way_are_those_that_count(name: str) -> None:
    model = tuned(name)
    values = moved(model)
    model.delta.set_strength(0.5)
    for strength in (0.5, 1.0):
        model.delta.set_strength(strength)
        called = functional_call(model, values, (images(),))
        loaded, assigned = copy.deepcopy(model), copy.deepcopy(model)
        loaded.load_state_dict(values, strict=False)
        assigned.load_state_dict(
            {key: nn.Parameter(tensor) for key, tensor in values.items()}, strict=False, assign=True
        )
        with torch.no_grad():
            stepped = copy.deepcopy(model)
            for key, parameter in stepped.named_parameters():
                if key in values:
                    parameter.copy_(values[key])
        assert relative(called, model(images())) > 1e-4
        for other in (loaded, assigned, stepped, pickle.loads(pickle.dumps(loaded))):  # noqa: S301  # our own
            assert relative(other(images()), called) <= 1e-12  # kernels with and without a gradient round differently


# DoRA's is by its paper not that of its function: `tests.deltas.test_low_rank` has it.
@pytest.mark.parametrize("name", [name for name in SPECS if name != "dora"])
def test_gradients_flow_at_every_strength_and_are_those_of_finite_differences(name: str) -> None:
    model = tuned(name)
    parameters = list(model.delta.parameters())
    model.delta.set_strength(0.5)
    gradients = torch.autograd.grad(model(images()).square().sum(), parameters)
    torch.manual_seed(4)
    way = [torch.randn_like(parameter) for parameter in parameters]
    slope = sum(float((g * w).sum()) for g, w in zip(gradients, way, strict=True))
    ends = []
    for sign in (1e-5, -1e-5):
        for parameter, step in zip(parameters, way, strict=True):
            parameter.data.add_(sign * step)
        ends.append(float(model(images()).square().sum().detach()))
        for parameter, step in zip(parameters, way, strict=True):
            parameter.data.sub_(sign * step)
    assert abs((ends[0] - ends[1]) / 2e-5 - slope) <= 1e-4 * abs(slope) + 1e-7


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_inference_mode_and_another_precision_by_replacement(name: str, strength: float) -> None:
    model = tuned(name)
    model.delta.set_strength(strength)
    expected = model(images())
    with torch.inference_mode():
        assert relative(model(images()), expected) <= 1e-12
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.float()
        assert relative(model(images().float()).double(), expected) < 1e-4
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert relative(model(images()), expected) < 1e-4


@pytest.mark.parametrize("name", ["full", "lora", "prompt", "prompt-shallow", "adaptformer-residual"])
def test_gradients_of_each_image_alone(name: str) -> None:
    specs = SPECS | {"adaptformer-residual": {"name": "adapter", "placement": "parallel", "reads": "residual"}}
    backbone, _ = make("vit")
    for attention in backbone.layout.attentions:
        attention.fused_attn = False  # which vmap would run image by image
    model = Model(backbone, attach(backbone, [specs[name]]))
    values = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}

    def loss(given: dict[str, Tensor], image: Tensor) -> Tensor:
        return cast("Tensor", functional_call(model, given, (image[None],)).square().sum())

    together = vmap(grad(loss), in_dims=(None, 0), randomness="different")(values, images())
    for index, image in enumerate(images()):
        alone = grad(loss)(values, image)
        assert all(relative(together[key][index], alone[key]) <= 1e-10 for key in values if alone[key].norm() > 1e-12)


def test_a_second_subset_that_is_refused_leaves_the_first_on() -> None:
    model = tuned("bias", "vit")
    expected = model(images())
    for spec in ({"name": "norm"}, {"name": "full"}, {"name": "partial", "blocks": 9}):
        with pytest.raises(ConfigError):
            attach(model.backbone, [spec])
        assert cast("Any", model.backbone).attached == list(model.delta.parts)
        assert torch.equal(model(images()), expected)
    attach(model.backbone, [{"name": "prompt", "num_tokens": 2}]).detach()
    model.delta.detach()
    assert not torch.equal(model(images()), expected)


@pytest.mark.parametrize("name", COPIES)
def test_the_backbone_itself_never_changes(name: str) -> None:
    backbone, _ = make("vit")
    before, bare = state(backbone), backbone(images())
    classes = [type(module) for module in backbone.modules()]
    delta = attach(backbone, [SPECS[name]])
    for parameter in delta.parameters():
        parameter.data.add_(1.0)
    assert same(backbone, before)
    delta.detach()
    assert [type(module) for module in backbone.modules()] == classes
    assert torch.equal(backbone(images()), bare)


@pytest.mark.parametrize("name", ["lora", "dora", "vera", "fact-tk", "glora", "rep-adapter", "ssf"])
@pytest.mark.parametrize("family", ["vit", "eva02-fused", "swinv2"])
def test_what_is_merged_still_trains_loads_and_is_saved_as_it_is(family: str, name: str) -> None:
    backbone, _ = make(family)
    model = Model(backbone, attach(backbone, [SPECS[name]]))
    for parameter in model.delta.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    (part,) = model.delta.parts
    assert isinstance(part, MergeablePart)
    saved = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = model(images(family))
    gradients = torch.autograd.grad(expected.square().sum(), list(model.delta.parameters()))
    part.merge()
    found = torch.autograd.grad(model(images(family)).square().sum(), list(model.delta.parameters()))
    assert all(relative(a, b) <= 1e-9 for a, b in zip(found, gradients, strict=True) if b.norm() > 1e-9)
    with torch.no_grad():
        assert relative(model(images(family)), expected) <= 1e-12
    assert all(torch.equal(tensor, saved[key]) for key, tensor in model.state_dict().items())
    values = moved(model)
    with torch.no_grad():
        model.load_state_dict(values, strict=False)
        merged = model(images(family))
        part.unmerge()
        assert relative(merged, model(images(family))) <= 1e-12
        assert relative(merged, expected) > 1e-4


def test_what_is_merged_works_wherever_what_is_not_does() -> None:
    model = tuned("lora", "vit")
    (part,) = model.delta.parts
    assert isinstance(part, Lora)
    values = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    changed: list[list[Tensor]] = [[], []]
    for merged, found in zip((False, True), changed, strict=True):
        if merged:
            part.merge()
        with torch.no_grad():
            for factor in (0.5, 1.5, 2.0):  # tensors that take each other's place in memory
                found.append(functional_call(model, {key: t * factor for key, t in values.items()}, (images(),)))
            for parameter in part.parameters():
                parameter.data.mul_(2.0)
            found.append(model(images()))
            for parameter in part.parameters():
                parameter.data.mul_(0.5)
            stacked = {key: torch.stack([t, 2 * t]) for key, t in values.items()}
            each = vmap(lambda given: functional_call(model, given, (images(),)), randomness="same")
            for attention in model.backbone.layout.attentions:
                attention.fused_attn = False
            found.append(each(stacked))
            with torch.autocast("cpu", torch.bfloat16):
                model.float()(images().float())
            found.append(model.double()(images()))
        found.append(torch.compile(model, backend="eager", fullgraph=True)(images()))
    assert all(relative(b, a) <= 1e-6 for a, b in zip(*changed, strict=True))
