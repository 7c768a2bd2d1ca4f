"""Convpass and RepAdapter against their equations, in untouched models whose sublayers get the change by hand."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from tests.deltas.families import SEQUENCES, SWINS, images, make, relative
from tests.deltas.oracle import merged, swin_block
from vpt.backbones import create_backbone
from vpt.deltas import attach
from vpt.errors import ConfigError, UnknownNameError, VPTError
from vpt.export import fold
from vpt.models import TunedModel


def tuned(family: str, *specs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """A backbone, the first part, far from its start, and an untouched twin of its model."""
    backbone, twin = make(family)
    delta = attach(backbone, specs)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return backbone, delta.parts[0], twin


def head(backbone: Any, twin: Any, family: str) -> Tensor:
    pixels = backbone.normalize(images(family))
    features: Tensor = twin.forward_head(twin.forward_features(pixels), pre_logits=True)
    return features


def bypass(part: Any, key: str, tokens: Tensor, patches: int, columns: int) -> Tensor:
    """The bypass, summed over the nine taps of its convolution, token by token."""

    def act(x: Tensor) -> Tensor:
        return x / (1 + (-1.702 * x).exp())

    down, conv, up = (getattr(part, name)[key] for name in ("down", "conv", "up"))
    hidden = act(tokens @ down.weight.T + down.bias)
    alone = tokens.shape[1] - patches
    seen = hidden @ conv.weight[:, :, 1, 1].T + conv.bias
    for place in range(patches):
        row, column = divmod(place, columns)
        total = conv.bias
        for i in range(3):
            for j in range(3):
                y, x = row + i - 1, column + j - 1
                if 0 <= y < patches // columns and 0 <= x < columns:
                    total = total + hidden[:, alone + y * columns + x] @ conv.weight[:, :, i, j].T
        seen[:, alone + place] = total
    change: Tensor = part.factor * (act(seen) @ up.weight.T + up.bias)
    return change


@pytest.mark.parametrize("beside", ["both", "attn"])
@pytest.mark.parametrize("family", SEQUENCES)
def test_convpass_is_a_convolution_over_the_patches_and_over_each_other_token_alone(family: str, beside: str) -> None:
    backbone, part, twin = tuned(family, {"name": "convpass", "rank": 3, "factor": 0.5, "beside": beside})
    with torch.no_grad():
        features = backbone(images(family))
        for key in part.up:
            index, _, name = key.partition("_")
            layer = getattr(twin.blocks[int(index)], name)
            layer.register_forward_hook(lambda _, args, out, key=key: out + bypass(part, key, args[0], 16, 4))
        assert relative(features, head(backbone, twin, family)) <= 1e-12
    assert {key.partition("_")[2] for key in part.up} == ({"attn", "mlp"} if beside == "both" else {"attn"})


@pytest.mark.parametrize("beside", ["both", "attn"])
@pytest.mark.parametrize("family", SWINS)
def test_convpass_on_a_swin_is_a_convolution_over_the_map_whatever_its_windows(family: str, beside: str) -> None:
    backbone, part, twin = tuned(family, {"name": "convpass", "rank": 3, "factor": 0.5, "beside": beside})
    blocks = [block for stage in twin.layers for block in stage.blocks]
    assert any(any(block.shift_size) for block in blocks)

    def added(block: Any, key: str, tokens: Tensor) -> Tensor:
        rows, columns = block.input_resolution
        return bypass(part, key, tokens.flatten(1, -2), rows * columns, columns).view_as(tokens)

    def widened(index: int, block: Any) -> Any:
        attend = block._attn  # from map to map
        return lambda x: attend(x) + added(block, f"{index}_attn", x)

    with torch.no_grad():
        features = backbone(images(family))
        for index, block in enumerate(blocks):
            block._attn = widened(index, block)
            if beside == "both":
                key = f"{index}_mlp"
                block.mlp.register_forward_hook(
                    lambda _, args, out, key=key, block=block: out + added(block, key, args[0])
                )
        assert relative(features, head(backbone, twin, family)) <= 1e-12
    assert {layer.out_features for layer in part.up.values()} == {12, 24}


@pytest.mark.parametrize("number", [5, 64])
@pytest.mark.parametrize("family", ["swin", "swinv2"])
def test_prompts_beside_the_map_of_a_swin_pass_a_bypass_alone(family: str, number: int) -> None:
    """Also where they are as many as the patches of the last stage, 8 × 8."""
    shallow = {"name": "prompt", "num_tokens": number, "deep": False}
    backbone, part, twin = tuned(family, {"name": "convpass", "rank": 3}, shallow)
    with torch.no_grad():
        features = backbone(images(family))
        x = twin.patch_embed(backbone.normalize(images(family)))
        travelling = backbone.attached[1].tokens[0].expand(3, -1, -1)
        index = 0
        for stage in twin.layers:
            x = stage.downsample(x)
            travelling = merged(stage.downsample, travelling) if index else travelling
            for block in stage.blocks:

                def added(name: str, tokens: Tensor, columns: int, index: int = index) -> Tensor:
                    return bypass(part, f"{index}_{name}", tokens, tokens.shape[1] if columns else 0, columns)

                x, travelling = swin_block(block, x, travelling, added)
                index += 1
        assert relative(features, twin.head(twin.norm(x), pre_logits=True)) <= 1e-10


def test_prompts_in_the_sequence_pass_a_bypass_alone() -> None:
    shallow = {"name": "prompt", "num_tokens": 2, "deep": False}
    backbone, part, twin = tuned("vit", {"name": "convpass", "rank": 3}, shallow)
    prompts = backbone.attached[1].tokens
    with torch.no_grad():
        features = backbone(images())
        for key in part.up:
            index, _, name = key.partition("_")
            layer = getattr(twin.blocks[int(index)], name)
            layer.register_forward_hook(lambda _, args, out, key=key: out + bypass(part, key, args[0], 16, 4))
        twin.blocks[0].register_forward_pre_hook(
            lambda _, args: torch.cat([args[0][:, :1], prompts[:1].expand(3, -1, -1), args[0][:, 1:]], dim=1)
        )
        assert relative(features, head(backbone, twin, "vit")) <= 1e-12


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("family", ["vit", "layer-scale", "eva02-split", "eva02-fused", "beit", "post-norm", "swin"])
def test_rep_adapters_are_linear_maps_before_attention_and_mlp(family: str, groups: int) -> None:
    spec = {"name": "rep_adapter", "rank": 4, "groups": groups, "factor": 0.5}
    backbone, part, twin = tuned(family, spec)
    blocks = twin.blocks if hasattr(twin, "blocks") else [block for stage in twin.layers for block in stage.blocks]

    def before(key: str, x: Tensor) -> Tensor:
        hidden = x @ part.down[key].T + part.down_shift[key]
        shares = [own @ up.T for own, up in zip(hidden.chunk(groups, dim=-1), part.up[key], strict=True)]
        changed: Tensor = x + 0.5 * (torch.cat(shares, dim=-1) + part.up_shift[key])
        return changed

    with torch.no_grad():
        features = backbone(images(family))
        for key in part.up_shift:
            index, _, name = key.partition("_")
            layer: nn.Module = getattr(blocks[int(index)], name)
            layer.register_forward_pre_hook(lambda _, args, key=key: (before(key, args[0]), *args[1:]))
        assert relative(features, head(backbone, twin, family)) <= 1e-12


def test_rep_adapters_are_merged_into_a_copy_and_leave_nothing() -> None:
    model = TunedModel(create_backbone("vit_nano_patch8_64").double(), 3, [{"name": "rep_adapter"}]).eval()
    with torch.no_grad():
        for parameter in model.parts()[0].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        pixels = torch.rand(2, 3, 64, 64, dtype=torch.float64)
        folded = fold(model)
        assert folded.delta is None
        assert relative(folded(pixels), model(pixels)) <= 1e-12
        assert not any(layer._forward_pre_hooks for layer in folded.modules() if isinstance(layer, nn.Linear))


def test_numbers_of_parameters_are_those_of_the_papers() -> None:
    backbone = create_backbone("vit_base_patch16_224", "random")
    counts = {}
    for name, spec in {
        "convpass": {"name": "convpass"},
        "convpass-attn": {"name": "convpass", "beside": "attn"},
        "rep_adapter": {"name": "rep_adapter"},
    }.items():
        delta = attach(backbone, [spec])
        counts[name] = {key: parameter.numel() for key, parameter in delta.named_parameters()}
        delta.detach()
    assert f"{sum(counts['convpass'].values()) / 1e6:.2f}" == "0.33"
    assert f"{sum(counts['convpass-attn'].values()) / 1e6:.2f}" == "0.16"
    # Their 0.22 M are the weights, without biases.
    weights = sum(number for key, number in counts["rep_adapter"].items() if "shift" not in key)
    assert f"{weights / 1e6:.2f}" == "0.22"


@pytest.mark.parametrize(
    ("family", "spec", "error", "message"),
    [
        ("vit", {"name": "convpass", "rank": 0}, ConfigError, "rank of a bypass must be at least 1, got 0"),
        ("vit", {"name": "convpass", "factor": 0.0}, ConfigError, "factor of a bypass is 0"),
        ("vit", {"name": "convpass", "beside": "atn"}, UnknownNameError, "did you mean 'attn'"),
        ("vit", {"name": "convpass", "layers": [0, 9]}, ConfigError, "of 3 blocks"),
        ("vit", {"name": "rep_adapter", "rank": 25}, ConfigError, "is 1 to 24, got 25"),
        ("vit", {"name": "rep_adapter", "rank": 3}, ConfigError, "divide its rank, 3, .* got 2: give 1 or"),
        ("vit", {"name": "rep_adapter", "factor": 0.0}, ConfigError, "factor of a RepAdapter is 0"),
        ("vit", {"name": "rep_adapter", "before": "all"}, UnknownNameError, "Known are both, attn"),
    ],
)
def test_what_is_out_of_range_is_refused(
    family: str, spec: dict[str, Any], error: type[VPTError], message: str
) -> None:
    with pytest.raises(error, match=message):
        attach(make(family)[0], [spec])


def test_the_activation_of_noah_is_the_quick_gelu() -> None:
    backbone, part, twin = tuned("vit", {"name": "adapter", "rank": 3, "activation": "quick_gelu"})
    with torch.no_grad():
        for index, block in enumerate(twin.blocks):
            down, up = part.down[f"{index}_mlp"], part.up[f"{index}_mlp"]

            def behind(_: nn.Module, args: Any, out: Tensor, down: Any = down, up: Any = up) -> Tensor:
                hidden = out @ down.weight.T + down.bias
                return cast("Tensor", out + (hidden / (1 + (-1.702 * hidden).exp())) @ up.weight.T + up.bias)

            block.mlp.register_forward_hook(behind)
        assert relative(backbone(images()), head(backbone, twin, "vit")) <= 1e-12
