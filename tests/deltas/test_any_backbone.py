"""Deltas that need no known blocks, on backbones that are no transformers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import gelu

import vpt
from tests.deltas.families import relative
from vpt.backbones import create_backbone
from vpt.deltas import attach
from vpt.deltas.low_rank.lora import Lora
from vpt.errors import ConfigError, UnknownNameError, VPTError
from vpt.export import export_peft, fold
from vpt.models import TunedModel, save_delta

NETS = {
    "resnet18": ["conv1", "downsample.0"],
    "convnext_atto": ["fc1", "conv_dw"],
    "efficientnet_b0": ["conv_dw", "conv_pw", "se.conv_reduce"],
    "resnetv2_50x1_bit": ["conv2"],  # standardises its weights
    "mobilenetv4_conv_small": ["all-conv"],
    "mambaout_femto": ["all-linear", "conv"],
    "poolformer_s12": ["all-conv"],
    "convnextv2_atto": ["fc1"],  # a global response norm, channels first
    "resnetv2_50d_frn": ["conv1"],  # norms that end in a maximum
    "repvgg_a0": ["all-conv"],  # parallel convolutions of the image
    "crossvit_9_240": ["all-linear"],  # two of them, and images of two sizes
}


def images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def on(name: str, spec: dict[str, Any]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    backbone = create_backbone(name, "random").double()
    backbone.image_size = 64
    with torch.no_grad():
        for parameter in backbone.parameters():  # some begin at 0, behind which nothing has a gradient
            parameter.add_(0.05 * torch.randn_like(parameter))
    delta = attach(backbone, [spec]).double()
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.normal_(std=0.1)
    return backbone, delta


@pytest.mark.parametrize("name", NETS)
def test_lora_by_name_is_the_backbone_with_changed_weights(name: str) -> None:
    backbone, delta = on(name, {"name": "lora", "rank": 2, "scale": 3.0, "targets": NETS[name]})
    (part,) = delta.parts
    assert part.expected_parameters() == sum(each.numel() for each in part.parameters())
    tuned = backbone(images())
    modules = dict(backbone.model.named_modules())
    keys = {key: key.replace("/", ".") for key in part.down}
    assert all(
        any(path == target or path.endswith(f".{target}") or target.startswith("all-") for target in NETS[name])
        for path in keys.values()
    )
    changed = {}
    for key, path in keys.items():
        weight = modules[path]._parameters["weight"]
        matrix = weight.flatten(1) + 1.5 * part.up[key] @ part.down[key].flatten(1)
        changed[f"{path}.weight"] = matrix.view_as(weight)
    delta.detach()
    bare = backbone(images())
    own = {f"model.{path}": value for path, value in changed.items()}
    theirs = functional_call(backbone, own, (images(),))
    assert relative(tuned, theirs) <= 1e-10
    assert relative(tuned, bare) > 1e-6
    delta.attach()
    delta.set_strength(0.0)
    assert torch.equal(backbone(images()), bare)
    delta.set_strength(1.0)
    assert torch.equal(backbone(images()), tuned)
    grads = torch.autograd.grad(backbone(images()).square().sum(), list(delta.parameters()))
    assert all(bool(grad.abs().sum() > 0) for grad in grads)


@pytest.mark.parametrize("name", NETS)
def test_an_adapter_by_name_is_a_bottleneck_over_the_channels_of_every_layer(name: str) -> None:
    backbone, delta = on(name, {"name": "adapter", "rank": 3, "factor": 0.5, "targets": NETS[name]})
    (part,) = delta.parts
    assert part.expected_parameters() == sum(each.numel() for each in part.parameters())
    tuned = backbone(images())
    delta.detach()
    bare, hooks = backbone(images()), []
    for key in part.down:
        down, up = part.down[key], part.up[key]

        def add(module: Any, args: Any, out: Tensor, down: Any = down, up: Any = up) -> Tensor:
            if isinstance(module, nn.Conv2d):
                hidden = torch.einsum("bchw,rc->brhw", out, down.weight) + down.bias[:, None, None]
                change = torch.einsum("brhw,cr->bchw", gelu(hidden), up.weight) + up.bias[:, None, None]
            else:
                change = gelu(out @ down.weight.T + down.bias) @ up.weight.T + up.bias
            changed: Tensor = out + 0.5 * change
            return changed

        hooks.append(backbone.model.get_submodule(key.replace("/", ".")).register_forward_hook(add))
    theirs = backbone(images())
    for hook in hooks:
        hook.remove()
    assert relative(tuned, theirs) <= 1e-10
    assert relative(tuned, bare) > 1e-6
    delta.attach()
    delta.set_strength(0.0)
    assert torch.equal(backbone(images()), bare)


@pytest.mark.parametrize("name", NETS)
def test_ssf_is_a_scale_and_a_shift_behind_every_layer_and_merges_where_it_can(name: str) -> None:
    close = 1e-4 if name.endswith("frn") else 1e-10  # whose norms are in single precision inside
    backbone, delta = on(name, {"name": "ssf"})
    (part,) = delta.parts
    tuned = backbone(images())
    behind = {key: (part.scale[key], part.shift[key]) for key in part.scale}
    delta.detach()
    bare = backbone(images())
    hooks = []
    for path, module in backbone.model.named_modules():
        if (key := path.replace(".", "/")) not in behind:
            assert not isinstance(module, nn.Linear | nn.Conv2d | nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm), path
            continue
        scale, shift = behind[key]

        def change(module: Any, args: Any, out: Tensor, scale: Tensor = scale, shift: Tensor = shift) -> Tensor:
            moved = out if out.shape[-1] == len(scale) and not isinstance(module, nn.Conv2d) else out.movedim(1, -1)
            changed = moved * scale + shift
            return changed if moved is out else changed.movedim(-1, 1)

        hooks.append(module.register_forward_hook(change))
    theirs = backbone(images())
    for hook in hooks:
        hook.remove()
    assert relative(tuned, theirs) <= close
    assert relative(tuned, bare) > 1e-6
    delta.attach()
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    part.merge()
    assert relative(backbone(images()), tuned) <= close
    delta.detach()
    assert all(torch.equal(tensor, before[key]) for key, tensor in backbone.state_dict().items())
    assert torch.equal(backbone(images()), bare)


@pytest.mark.parametrize(
    ("name", "last", "first", "count"),
    [
        ("resnet18", 1, "layer4.0.conv1.weight", 15),
        ("resnet18", 4, "layer1.0.conv1.weight", 57),
        ("resnet18", 5, "conv1.weight", 60),
        ("repvgg_a0", 1, "stages.3.0.conv_kxk.conv.weight", None),
        ("vgg11_bn", 1, "pre_logits.fc1.weight", None),
        ("convnext_atto", 1, "stages.3.downsample.0.weight", None),
        ("densenet121", 1, "features.transition3.norm.weight", None),
        ("efficientnet_b0", 1, "blocks.5.0.conv_pw.weight", None),
    ],
)
def test_the_last_stages_are_what_follows_those_before(name: str, last: int, first: str, count: int | None) -> None:
    backbone = create_backbone(name, "random")
    (part,) = attach(backbone, [{"name": "partial", "blocks": last}]).parts
    own = [each for each, _ in backbone.model.named_parameters()]
    trained = [key.replace("/", ".") for key in cast("Any", part).values]
    assert set(trained) == set(own[own.index(first) :])
    assert count is None or len(trained) == count
    with pytest.raises(ConfigError, match="stages: partial takes 1 to"):
        attach(create_backbone(name, "random"), [{"name": "partial", "blocks": 9}])


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("kind", ["bias", "norm", "partial", "mlp_head", "prompt_pad", "sidetune", "full"])
def test_what_needs_no_blocks_leaves_no_trace(name: str, kind: str) -> None:
    backbone = create_backbone(name, "random").double()
    backbone.image_size = 64
    bare = backbone(images())
    spec = {"name": kind, **({"width": 4} if kind == "prompt_pad" else {})}
    delta = attach(backbone, [spec]).double()
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tuned = backbone(images())
    assert not torch.equal(tuned, bare)
    delta.set_strength(0.0)
    assert torch.equal(backbone(images()), bare)
    delta.set_strength(1.0)
    assert torch.equal(backbone(images()), tuned)
    delta.detach()
    assert torch.equal(backbone(images()), bare)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_a_model_with_it_is_saved_folded_and_copied(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TunedModel(create_backbone(name, "random"), 3, [{"name": "lora", "rank": 2, "targets": NETS[name]}]).eval()
    with torch.no_grad():
        for tensor in model.owned().values():
            tensor.add_(0.05 * torch.randn(tensor.shape))
    pixels = torch.rand(1, *model.backbone.input_shape)
    loaded = vpt.load(save_delta(tmp_path / "delta.safetensors", model))
    torch.testing.assert_close(loaded(pixels), model(pixels))
    assert torch.equal(copy.deepcopy(model)(pixels), model(pixels))
    folded = fold(model)
    torch.testing.assert_close(folded(pixels), model(pixels), rtol=1e-4, atol=1e-4)
    assert folded.delta is None
    assert not any("_computed" in vars(module) for module in folded.modules())


@pytest.mark.parametrize("name", NETS)
def test_a_border_is_on_the_image_whatever_reads_it(name: str) -> None:
    backbone, delta = on(name, {"name": "prompt_pad", "width": 5})
    framed = backbone(images())
    frame = delta.parts[0].frame()
    delta.detach()
    bare = backbone(images())
    model = backbone.model
    entered = model.forward_head(model.forward_features(backbone.normalize(images()) + frame), pre_logits=True)
    assert torch.equal(framed, entered)
    assert not torch.equal(framed, bare)


def test_what_cannot_be_merged_for_good_stays_as_it_was() -> None:
    backbone, delta = on("resnet18", {"name": "lora", "rank": 2, "targets": ["conv1"]})
    other = attach(backbone, [{"name": "mlp_head"}]).double()
    before = backbone(images())
    with pytest.raises(ConfigError, match="attached alone"):
        delta.parts[0].merge_for_good()
    assert torch.equal(backbone(images()), before)
    other.detach()
    delta.parts[0].merge_for_good()
    delta.detach()


def test_two_deltas_that_train_one_convolution_are_told_of_it() -> None:
    with pytest.raises(ConfigError, match=r"train conv1\.weight: keep one"):
        attach(create_backbone("resnet18", "random"), [{"name": "full"}, {"name": "lora", "targets": ["conv1"]}])


def test_peft_gets_the_change_of_a_convolution_and_none_of_a_grouped_one(tmp_path: Path) -> None:
    spec = {"name": "lora", "rank": 2, "scale": 6.0, "targets": ["conv1"]}
    model = TunedModel(create_backbone("resnet18", "random"), 3, [spec]).eval()
    with torch.no_grad():
        for tensor in model.owned().values():
            tensor.normal_()
    folder = export_peft(model, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    before = {key: tensor.clone() for key, tensor in model.backbone.model.state_dict().items()}
    cast("Any", model.parts()[0]).merge_for_good()
    after = model.backbone.model.state_dict()
    changed = {key.removesuffix(".weight") for key in after if not torch.equal(after[key], before[key])}
    assert changed == set(config["target_modules"])
    for layer in changed:
        down, up = (tensors[f"base_model.model.{layer}.lora_{part}.weight"] for part in "AB")
        assert up.shape[1:] == (2, 1, 1)
        factor = config["alpha_pattern"][layer] / config["rank_pattern"][layer]
        change = (after[f"{layer}.weight"] - before[f"{layer}.weight"]).flatten(1)
        torch.testing.assert_close(factor * up.flatten(1) @ down.flatten(1), change, rtol=1e-4, atol=1e-5)
    grouped = TunedModel(create_backbone("convnext_atto", "random"), 3, [{"name": "lora", "targets": ["conv_dw"]}])
    with pytest.raises(ConfigError, match=r"that are grouped, dilated, .* such as stages"):
        export_peft(grouped.eval(), tmp_path / "other")
    standardised = TunedModel(
        create_backbone("resnetv2_50x1_bit", "random"), 3, [{"name": "lora", "targets": ["stages.0.blocks.0.conv1"]}]
    )
    with pytest.raises(ConfigError, match=r"or standardise their weight, such as stages\.0\.blocks\.0\.conv1"):
        export_peft(standardised.eval(), tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "spec", "error", "message"),
    [
        ("resnet18", {}, ConfigError, "name layers in LoRA's targets"),
        ("resnet18", {"targets": ["q"]}, UnknownNameError, "all-conv, conv1, conv2, downsample.0"),
        ("convnext_atto", {"targets": ["all-linear"]}, UnknownNameError, "Known are all-conv, conv_dw"),
        ("resnet18", {"targets": ["conv9"]}, UnknownNameError, "did you mean 'conv"),
        ("resnet18", {"targets": ["conv1"], "layers": [0, 1]}, ConfigError, "not of layers by name"),
        ("vit_nano_patch8_64", {"targets": ["qkw"]}, UnknownNameError, "LoRA target of vit_nano_patch8_64"),
        ("vit_nano_patch8_64", {"targets": ["q", "qkv"]}, ConfigError, "changed twice"),
    ],
)
def test_what_is_no_layer_is_refused(name: str, spec: dict[str, Any], error: type[VPTError], message: str) -> None:
    with pytest.raises(error, match=message):
        attach(create_backbone(name, "random"), [{"name": "lora"} | spec])


def test_layers_by_name_of_a_transformer_are_the_same_maps() -> None:
    backbone = create_backbone("vit_nano_patch8_64", "random")
    for name, whole in (("fc1", "mlp.fc1"), ("proj", "attn.proj")):
        (one,), (other,) = (attach(backbone, [{"name": "lora", "targets": [each]}]).parts for each in (name, whole))
        modules = [[target.module for target in cast("Lora", part).targets.values()] for part in (one, other)]
        assert modules[0] == modules[1]
