"""GLoRA against its equation, in models whose weights and biases are changed by hand."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import vpt
from tests.deltas.families import images, make, relative
from tests.deltas.test_any_backbone import on
from vpt.backbones import create_backbone
from vpt.deltas import attach
from vpt.deltas.low_rank.glora import FORMS
from vpt.errors import ConfigError, DeltaFileError, UnknownNameError, VPTError
from vpt.export import fold
from vpt.models import TunedModel, save_delta
from vpt.models.delta_file import start_from

ALL = ["q", "k", "v", "proj", "fc1", "fc2"]
CHOICES = [dict(zip("abcde", forms, strict=True)) for forms in product(*FORMS.values())]


def tuned(family: str, spec: dict[str, Any]) -> tuple[Any, Any]:
    backbone, _ = make(family)
    (part,) = attach(backbone, [{"name": "glora"} | spec]).parts
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return backbone, part


def matrix(part: Any, letter: str, key: str, rows: int, columns: int) -> Tensor:
    """A support tensor entry by entry, of whatever form."""
    tensors = list(part.supports[letter][key]) if key in part.supports[letter] else []
    found = torch.zeros(rows, columns, dtype=torch.float64)
    for row, column in product(range(rows), range(columns)):
        if len(tensors) == 2:
            found[row, column] = sum(tensors[0][row, r] * tensors[1][r, column] for r in range(tensors[1].shape[0]))
        elif tensors:
            found[row, column] = tensors[0] if tensors[0].ndim == 0 else tensors[0][row]
    return found


@torch.no_grad()
def by_hand(family: str, part: Any, strength: float = 1.0) -> Tensor:
    """Features of an untouched twin whose layers have the weights and biases of the equation."""
    backbone, _ = make(family)
    modules = dict(backbone.model.named_modules())
    names = {id(module): name for name, module in part.backbone.model.named_modules()}
    for module, keys in part.by_module.items():
        layer: Any = modules[names[id(module)]]
        weight = layer.weight.clone()
        bias = torch.zeros(len(weight), dtype=torch.float64) if layer.bias is None else layer.bias.clone()
        for key in keys:
            rows = slice(part.targets[key].start, part.targets[key].stop)
            w, b = weight[rows].clone(), bias[rows].clone()
            outputs, inputs = w.shape
            a, add = (matrix(part, letter, key, outputs, inputs) for letter in "ab")
            c = matrix(part, "c", key, inputs, 1)[:, 0]
            d, e = (matrix(part, letter, key, outputs, 1)[:, 0] for letter in "de")
            weight[rows] = w + strength * (w * a + add)
            bias[rows] = b + strength * (w @ c + b * d + e)
        layer.weight.copy_(weight)
        layer.bias = nn.Parameter(bias)
    return cast("Tensor", backbone(images(family)))


@pytest.mark.parametrize("family", ["vit", "eva02-split", "eva02-fused", "beit-shared", "post-norm", "swinv2"])
def test_weights_and_biases_are_those_of_the_equation(family: str) -> None:
    backbone, part = tuned(family, {"rank": 2, "targets": ["q", "v", "fc2"], "e": "scalar"})
    with torch.no_grad():
        assert relative(backbone(images(family)), by_hand(family, part)) <= 1e-12
        part.strength = 0.3
        assert relative(backbone(images(family)), by_hand(family, part, 0.3)) <= 1e-12


@pytest.mark.parametrize("choice", CHOICES[7:-1:37], ids=lambda choice: "-".join(choice.values()))
def test_every_form_of_a_support_tensor_is_that_of_the_equation(choice: dict[str, str]) -> None:
    backbone, part = tuned("vit", {"rank": 2, "targets": ["k", "proj"], **choice})
    with torch.no_grad():
        expected = by_hand("vit", part)
        assert relative(backbone(images()), expected) <= 1e-12
        part.merge()
        assert relative(backbone(images()), expected) <= 1e-12


def test_the_choices_are_those_of_the_released_supernet() -> None:
    assert len(CHOICES) == 4 * 4 * 3 * 3 * 3
    assert {form for choice in CHOICES[7:-1:37] for form in choice.values()} == {"lora", "vector", "scalar", "none"}


def test_it_starts_from_the_backbone_bit_for_bit() -> None:
    backbone, _ = make("vit")
    bare = backbone(images())
    attach(backbone, [{"name": "glora", "targets": ALL}])
    assert torch.equal(backbone(images()), bare)


def test_numbers_of_parameters_are_those_of_the_released_code() -> None:
    backbone = create_backbone("vit_base_patch16_224", "random")
    layers = {"qkv": (2304, 768), "proj": (768, 768), "fc1": (3072, 768), "fc2": (768, 3072)}
    of_lora = sum(4 * (outputs + inputs) for outputs, inputs in layers.values())
    read = sum(inputs for _, inputs in layers.values())
    outputs = sum(outputs for outputs, _ in layers.values())
    for choice, number in {
        ("lora", "lora", "lora", "vector", "vector"): 2 * of_lora + 4 * read + 4 * 4 + 2 * outputs,
        ("none", "vector", "vector", "none", "scalar"): outputs + read + 4,
        ("scalar", "none", "none", "scalar", "none"): 8,
    }.items():
        forms = dict(zip("abcde", choice, strict=True))
        delta = attach(backbone, [{"name": "glora", "targets": [*layers], **forms}])
        assert sum(parameter.numel() for parameter in delta.parameters()) == 12 * number
        delta.detach()


def test_convolutions_are_matrices_with_a_row_for_each_output() -> None:
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    backbone, delta = on("convnext_atto", {"name": "glora", "rank": 2, "targets": ["fc1", "conv_dw"]})
    (part,) = delta.parts
    features = backbone(pixels)
    modules = dict(backbone.model.named_modules())
    model = TunedModel(backbone, 3)
    model.delta = delta
    folded = fold(model.eval())
    assert folded.delta is None
    with torch.no_grad():
        assert relative(folded.backbone(pixels), features) <= 1e-12
        delta.detach()
        supports: Any = part.supports
        for key in part.shapes:
            layer: Any = modules[key.replace("/", ".")]
            flat = layer.weight.flatten(1).clone()
            a, b, c = (supports[letter][key][0] @ supports[letter][key][1] for letter in "abc")
            shift = (flat @ c)[:, 0] + layer.bias * supports["d"][key][0] + supports["e"][key][0]
            layer.weight.copy_((flat + flat * a + b).view_as(layer.weight))
            layer.bias.copy_(layer.bias + shift)
        assert relative(features, backbone(pixels)) <= 1e-12


def test_a_convolution_without_a_bias_gets_one_and_has_no_d() -> None:
    backbone = create_backbone("resnet18", "random").double().eval()
    pixels = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    bare = backbone(pixels)
    delta = attach(backbone, [{"name": "glora", "a": "none", "b": "none", "c": "none", "targets": ["conv1"]}])
    part: Any = delta.parts[0]
    assert len(part.supports["d"]) == 0
    assert part.expected_parameters() == sum(each.numel() for each in part.parameters())
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.fill_(0.2)
        assert relative(backbone(pixels), bare) > 1e-3
        part.strength = 0.0
        assert torch.equal(backbone(pixels), bare)


def test_a_file_has_the_tensors_of_its_choice_and_no_other_takes_them(tmp_path: Path) -> None:
    choice = {"name": "glora", "a": "vector", "b": "lora", "c": "none", "d": "none", "e": "scalar"}
    model = TunedModel(create_backbone("vit_nano_patch8_64"), 3, [choice]).eval()
    with torch.no_grad():
        for parameter in model.parts()[0].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    path = save_delta(tmp_path / "delta.safetensors", model)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(vpt.load(path)(pixels), model(pixels))
    with pytest.raises(DeltaFileError, match="are to be trained: give the same"):
        start_from(path, TunedModel(create_backbone("vit_nano_patch8_64"), 3, [choice | {"a": "scalar"}]))


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ({"rank": 0}, ConfigError, "rank of GLoRA must be at least 1, got 0"),
        ({"a": "lorra"}, UnknownNameError, "form of GLoRA's a .*did you mean 'lora'"),
        ({"c": "scalar"}, UnknownNameError, "form of GLoRA's c"),
        ({"d": "lora"}, UnknownNameError, "form of GLoRA's d"),
        (dict.fromkeys("abcde", "none"), ConfigError, "changes nothing: give one of them a form"),
        ({"targets": []}, ConfigError, "GLoRA needs at least one target of q, k, v"),
    ],
)
def test_what_it_cannot_be_is_refused(spec: dict[str, Any], error: type[VPTError], message: str) -> None:
    with pytest.raises(error, match=message):
        attach(make("vit")[0], [{"name": "glora"} | spec])


def test_two_that_change_one_convolution_are_refused() -> None:
    backbone = create_backbone("convnext_atto", "random")
    with pytest.raises(ConfigError, match=r"Two deltas train .*conv_dw\.bias: keep one of them"):
        attach(backbone, ["bias", {"name": "glora", "targets": ["conv_dw"]}])
