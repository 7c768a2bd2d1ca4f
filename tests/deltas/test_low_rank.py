"""DoRA and VeRA against their equations, row by row, in models whose weights are changed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

import vpt
from tests.deltas.families import images, make, relative
from tests.deltas.test_any_backbone import on
from vpt.backbones import create_backbone
from vpt.backbones.target_modules import LinearTarget, linear_targets
from vpt.deltas import attach
from vpt.errors import ConfigError, DeltaFileError, UnknownNameError, VPTError
from vpt.export import fold
from vpt.models import TunedModel, save_delta
from vpt.models.delta_file import start_from

KINDS = ["vit", "eva02-split", "eva02-fused", "beit-shared", "post-norm", "swinv2"]


def tuned(family: str, spec: dict[str, Any]) -> tuple[Any, Any, Tensor]:
    """A backbone, a part far from its start, and the features."""
    backbone, _ = make(family)
    (part,) = attach(backbone, [spec]).parts
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        return backbone, part, backbone(images(family))


def by_hand(family: str, changes: dict[str, Tensor]) -> Tensor:
    """Features of an untouched twin with these matrices in place of those of its maps."""
    backbone, _ = make(family)
    found = {f"{i}_{name}": target for i, own in enumerate(linear_targets(backbone)) for name, target in own.items()}
    with torch.no_grad():
        for key, matrix in changes.items():
            target: LinearTarget = found[key]
            target.module.weight[target.start : target.stop] = matrix
        features: Tensor = backbone(images(family))
    return features


def weights(family: str) -> dict[str, Tensor]:
    backbone, _ = make(family)
    found = {f"{i}_{name}": target for i, own in enumerate(linear_targets(backbone)) for name, target in own.items()}
    return {key: target.module.weight[target.start : target.stop].detach() for key, target in found.items()}


@pytest.mark.parametrize("family", KINDS)
def test_dora_is_a_length_and_a_direction_of_what_each_output_weighs(family: str) -> None:
    backbone, part, features = tuned(family, {"name": "dora", "rank": 2, "scale": 3.0, "targets": ["q", "v", "fc2"]})
    start, changed = weights(family), {}
    for key in part.magnitude:
        rows = []
        for row, (weight, length) in enumerate(zip(start[key], part.magnitude[key], strict=True)):
            way = weight + 1.5 * sum(part.up[key][row, r] * part.down[key][r] for r in range(2))
            rows.append(length * way / way.square().sum().sqrt())
        changed[key] = torch.stack(rows).detach()
    assert relative(features, by_hand(family, changed)) <= 1e-12
    part.strength = 0.3
    between = {key: start[key] + 0.3 * (changed[key] - start[key]) for key in changed}
    with torch.no_grad():
        assert relative(backbone(images(family)), by_hand(family, between)) <= 1e-12


def test_dora_starts_from_the_backbone_and_takes_no_gradient_through_the_norm() -> None:
    backbone, _ = make("vit")
    bare = backbone(images())
    attach(backbone, [{"name": "dora", "rank": 2, "targets": ["fc1"]}])
    assert relative(backbone(images()), bare) <= 1e-14
    other = create_backbone("resnet18", "random").double()
    small: Any = attach(other, [{"name": "dora", "rank": 1, "targets": ["conv1"]}]).parts[0]
    key = next(iter(small.up))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    up, down, length = (getattr(small, name)[key] for name in ("up", "down", "magnitude"))
    changed = small.convolutions[key]
    weight = changed._parameters["weight"].flatten(1)
    seen = torch.randn_like(weight)
    (changed.weight.flatten(1) * seen).sum().backward()
    norm = (weight + up @ down.flatten(1)).norm(dim=1).detach()
    torch.testing.assert_close(up.grad, ((length / norm)[:, None] * seen) @ down.flatten(1).T)
    torch.testing.assert_close(length.grad, ((weight + up @ down.flatten(1)) * seen).sum(dim=1) / norm)


def test_dora_of_convolutions_has_a_length_for_each_kernel() -> None:
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    backbone, delta = on("convnext_atto", {"name": "dora", "rank": 2, "targets": ["fc1", "conv_dw"]})
    (part,) = delta.parts
    features = backbone(pixels)
    modules = dict(backbone.model.named_modules())
    delta.detach()
    with torch.no_grad():
        for key in part.up:
            layer = modules[key.replace("/", ".")]
            way = layer.weight + (part.up[key] @ part.down[key].flatten(1)).view_as(layer.weight)
            norm = way.square().flatten(1).sum(dim=1).sqrt()
            layer.weight.copy_((part.magnitude[key] / norm).view(-1, *[1] * (way.ndim - 1)) * way)
        assert relative(features, backbone(pixels)) <= 1e-12


def test_an_output_without_weights_stays_without_them() -> None:
    backbone, _ = make("vit")
    with torch.no_grad():
        cast("Any", backbone.layout.blocks[0]).mlp.fc1.weight[3] = 0.0
    delta = attach(backbone, [{"name": "dora", "targets": ["fc1"]}])
    features = backbone(images())
    features.sum().backward()
    assert torch.isfinite(features).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in delta.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("family", KINDS)
def test_vera_scales_the_rows_and_columns_of_two_random_matrices(family: str) -> None:
    spec = {"name": "vera", "rank": 5, "seed": 3, "targets": ["q", "proj", "fc2"]}
    _, part, features = tuned(family, spec)
    start = weights(family)
    inputs, outputs = (max(start[key].shape[side] for key in part.b) for side in (1, 0))
    rng = np.random.RandomState(3)
    down = (rng.random_sample((5, inputs)) * 2 - 1) * (6 / inputs) ** 0.5
    up = (rng.random_sample((outputs, 5)) * 2 - 1) * (6 / 5) ** 0.5
    a, b = (torch.from_numpy(each.astype(np.float32)).double() for each in (down, up))
    changed = {}
    for key in part.b:
        rows, columns = start[key].shape
        change = torch.diag(part.b[key]) @ b[:rows] @ torch.diag(part.d[key]) @ a[:, :columns]
        changed[key] = (start[key] + change).detach()
    assert relative(features, by_hand(family, changed)) <= 1e-12


def test_the_random_matrices_of_vera_are_the_same_everywhere_and_in_every_precision(tmp_path: Path) -> None:
    backbone = create_backbone("vit_nano_patch8_64")
    model = TunedModel(backbone, 3, [{"name": "vera", "rank": 4}])
    part: Any = model.parts()[0]
    state = torch.get_rng_state()
    # The first number of MT19937 with seed 0, which NumPy's documentation shows: 0.5488135.
    width = backbone.layout.dims[0]
    assert part.shared_down[0, 0] == np.float32((2 * 0.5488135039273248 - 1) * (6 / width) ** 0.5)
    kept = part.shared_down.clone()
    assert torch.equal(model.bfloat16().parts()[0].shared_down, kept.bfloat16())  # type: ignore[arg-type]
    assert torch.equal(model.float().parts()[0].shared_down, kept)  # type: ignore[arg-type]
    torch.manual_seed(5)
    other = TunedModel(create_backbone("vit_nano_patch8_64"), 3, [{"name": "vera", "rank": 4}])
    assert torch.equal(other.parts()[0].shared_down, kept)  # type: ignore[arg-type]
    torch.set_rng_state(state)
    path = save_delta(tmp_path / "delta.safetensors", TunedModel(create_backbone("vit_nano_patch8_64"), 3, ["vera"]))
    loaded = vpt.load(path)
    assert {key.split(".")[-2] for key in loaded.owned() if key.startswith("delta")} == {"b", "d"}
    with pytest.raises(DeltaFileError, match="are to be trained: give the same"):  # of other random matrices
        start_from(path, TunedModel(create_backbone("vit_nano_patch8_64"), 3, [{"name": "vera", "seed": 1}]))


def test_numbers_of_parameters_are_those_of_the_papers() -> None:
    counts = {}
    for name, specs in {
        "vit_base_patch16_224": [{"name": "vera"}, {"name": "dora"}],
        "vit_large_patch16_224": [{"name": "vera"}],
    }.items():
        backbone = create_backbone(name, "random")
        for spec in specs:
            delta = attach(backbone, [spec])
            counts[name, spec["name"]] = sum(parameter.numel() for parameter in delta.parameters())
            delta.detach()
    # VeRA, section 3.2: L_tuned · (d_model + r), of 24 and 48 maps.
    assert counts["vit_base_patch16_224", "vera"] == 24 * (768 + 256) == 24_576
    assert counts["vit_large_patch16_224", "vera"] == 48 * (1024 + 256) == 61_440
    # DoRA: those of LoRA and one for each output.
    assert counts["vit_base_patch16_224", "dora"] == 294_912 + 24 * 768


@pytest.mark.parametrize("spec", [{"name": "dora"}, {"name": "vera", "rank": 300}])
def test_what_is_merged_into_a_copy_is_the_same_function(spec: dict[str, Any]) -> None:
    model = TunedModel(create_backbone("vit_nano_patch8_64").double(), 3, [spec]).eval()
    with torch.no_grad():
        for parameter in model.parts()[0].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        pixels = torch.rand(2, 3, 64, 64, dtype=torch.float64)
        folded = fold(model)
        assert folded.delta is None
        assert relative(folded(pixels), model(pixels)) <= 1e-12


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ({"name": "dora", "rank": 0}, ConfigError, "rank of DoRA must be at least 1, got 0"),
        ({"name": "dora", "scale": 0.0}, ConfigError, "DoRA needs a scale that is not 0"),
        ({"name": "dora", "targets": ["qq"]}, UnknownNameError, "DoRA target of .* did you mean 'q'"),
        ({"name": "dora", "targets": []}, ConfigError, "DoRA needs at least one target of q, k, v"),
        ({"name": "vera", "rank": 0}, ConfigError, "VeRA takes a rank of at least 1"),
        ({"name": "vera", "seed": -1}, ConfigError, "a seed of at least 0"),
        ({"name": "vera", "d_initial": 0.0}, ConfigError, "a d_initial that is not 0"),
        ({"name": "vera", "targets": ["q", "q"]}, ConfigError, "VeRA needs different targets"),
    ],
)
def test_what_is_out_of_range_is_refused(spec: dict[str, Any], error: type[VPTError], message: str) -> None:
    with pytest.raises(error, match=message):
        attach(make("vit")[0], [spec])


@pytest.mark.parametrize("name", ["dora", "vera"])
def test_a_backbone_without_known_blocks_is_told_to_name_layers(name: str) -> None:
    with pytest.raises(ConfigError, match=r"name layers in .*'s targets, such as all-linear or all-conv"):
        attach(create_backbone("resnet18", "random"), [{"name": name}])
