"""Deltas beside each other: their order, what is refused, and what a later one must not break."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from tests.deltas.families import images, make, relative
from vpt.backbones.factory import Backbone
from vpt.deltas import attach
from vpt.deltas.composition import Delta
from vpt.deltas.low_rank.lora import Lora
from vpt.errors import ConfigError, DeltaFileError
from vpt.models import TunedModel, save_delta

SHALLOW = {"name": "prompt", "num_tokens": 2, "deep": False}
DEEP = {"name": "prompt", "num_tokens": 3}
PREFIX = {"name": "prefix", "num_tokens": 2}
LORA = {"name": "lora", "rank": 2, "targets": ["q", "fc1"]}


def drawn(backbone: Backbone, specs: list[dict[str, Any]]) -> Delta:
    """A delta whose tensors depend on their part and name, not on the order of the parts."""
    delta = attach(backbone, specs)
    for spec, part in zip(specs, delta.parts, strict=True):
        for name, parameter in part.named_parameters():
            seed = sum(map(ord, f"{sorted(spec.items())}{name}"))
            generator = torch.Generator().manual_seed(seed)
            parameter.data = 3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return delta


@pytest.mark.parametrize("family", ["vit", "eva-token", "beit-shared", "swin", "swinv2"])
@pytest.mark.parametrize("other", [DEEP, PREFIX, SHALLOW | {"num_tokens": 4}], ids=["deep", "prefix", "shallow"])
def test_the_order_of_prompts_does_not_matter(family: str, other: dict[str, Any]) -> None:
    features = []
    for specs in ([SHALLOW, other], [other, SHALLOW]):
        backbone, _ = make(family)
        bare = backbone(images(family))
        delta = drawn(backbone, specs)
        features.append(backbone(images(family)))
        delta.set_strength(1e-13)
        assert relative(backbone(images(family)), bare) <= 1e-10  # each weakens its own columns
    assert relative(features[0], bare) > 1e-3
    assert relative(features[0], features[1]) <= 1e-12


def test_weights_are_merged_only_while_nothing_else_is_attached() -> None:
    backbone, _ = make("vit")
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    lora = attach(backbone, [LORA])
    (part,) = lora.parts
    assert isinstance(part, Lora)
    part.merge()
    with pytest.raises(ConfigError, match="unmerge it before"):
        attach(backbone, [{"name": "partial"}])
    part.unmerge()
    partial = attach(backbone, [{"name": "partial"}])
    with pytest.raises(ConfigError, match="attached alone can be merged"):
        part.merge()
    lora.detach()
    partial.detach()
    assert all(torch.equal(tensor, before[key]) for key, tensor in backbone.state_dict().items())


def test_what_is_attached_is_not_attached_again_and_comes_off_once() -> None:
    backbone, _ = make("vit")
    bare = backbone(images())
    delta = drawn(backbone, [LORA, DEEP])
    tuned = backbone(images())
    with pytest.raises(ConfigError, match="attached already"):
        delta.parts[0].attach()  # type: ignore[operator]
    assert torch.equal(backbone(images()), tuned)
    delta.detach()
    delta.detach()
    assert torch.equal(backbone(images()), bare)
    delta.attach()
    assert torch.equal(backbone(images()), tuned)


@pytest.mark.parametrize(
    ("first", "second"), [("bias", "norm"), ("bias", "bias"), ("full", "partial"), ("norm", "full")]
)
def test_a_parameter_is_trained_by_one_delta_also_in_sequence(first: str, second: str) -> None:
    backbone, _ = make("vit")
    attach(backbone, [{"name": first}])
    tuned = backbone(images())
    with pytest.raises(ConfigError, match="Two deltas train"):
        attach(backbone, [{"name": second}])
    assert torch.equal(backbone(images()), tuned)


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_interpolated_parameters_follow_what_is_loaded_or_moved(strength: float) -> None:
    backbone, _ = make("vit")
    bare = backbone(images())
    delta = attach(backbone, [{"name": "norm"}])
    delta.set_strength(strength)
    delta.load_state_dict({key: tensor + 0.3 for key, tensor in delta.state_dict().items()})
    loaded = backbone(images())
    assert (relative(loaded, bare) > 1e-3) == (strength > 0.0)
    nn.ModuleList([backbone, delta]).float()
    assert backbone(images()).dtype == torch.float32
    assert relative(backbone(images()).double(), loaded) <= 1e-5


@pytest.mark.parametrize("first", [SHALLOW, SHALLOW | {"reference_pooling": True}, {"name": "sidetune", "width": 2}])
def test_a_frozen_first_delta_counts_as_no_constant(first: dict[str, Any]) -> None:
    backbone, _ = make("swin")
    attach(backbone, [first]).requires_grad_(False)
    for specs in ([], [{"name": "partial"}]):
        model = TunedModel(backbone, 3, specs)
        assert model.constant_part() is None
        if model.delta is not None:
            model.delta.detach()


def test_a_file_that_would_miss_a_delta_is_not_written(tmp_path: Path) -> None:
    backbone, _ = make("vit")
    attach(backbone, [DEEP]).requires_grad_(False)
    with pytest.raises(DeltaFileError, match="both deltas in one list"):
        save_delta(tmp_path / "delta.safetensors", TunedModel(backbone, 3, [LORA]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "spec", [{"name": "sidetune", "width": 2}, {"name": "mlp_head"}], ids=lambda spec: spec["name"]
)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_autocast_works_at_any_strength(spec: dict[str, Any], strength: float) -> None:
    backbone, _ = make("vit")
    backbone = backbone.float()
    delta = attach(backbone, [spec])
    delta.set_strength(strength)
    exact = backbone(images().float())
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(backbone(images().float()), exact) < 0.1


@pytest.mark.parametrize("family", ["vit", "beit-shared", "eva-token", "distilled"])
def test_intermediates_and_forward_features_are_whole_whatever_ran_before(family: str) -> None:
    backbone, twin = make(family)
    backbone(images(family))  # trimmed for the pool
    theirs = cast("Any", twin).forward_features(images(family))
    assert torch.equal(cast("Any", backbone.model).forward_features(images(family)), theirs)
    backbone(images(family))
    ours, expected = (cast("Any", model).forward_intermediates(images(family))[1] for model in (backbone.model, twin))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_the_last_blocks_of_a_swin_include_the_merging_between_them() -> None:
    backbone, _ = make("swin")
    names: dict[int, set[str]] = {}
    for blocks in (2, 3):
        delta = attach(backbone, [{"name": "partial", "blocks": blocks}])
        names[blocks] = {key for key, _ in delta.named_parameters()}
        delta.detach()
    assert not any("downsample" in name for name in names[2])
    assert any("downsample" in name for name in names[3])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "prompt", "num_tokens": 2.5}, "num_tokens of delta 'prompt' must be a whole number or a list"),
        ({"name": "prompt", "num_tokens": 2, "deep": "no"}, "deep of delta 'prompt' must be true or false, got 'no'"),
        ({"name": "prompt", "num_tokens": 2, "layers": 3}, "layers of delta 'prompt' must be a list"),
        ({"name": "lora", "rank": 2.5}, "rank of delta 'lora' must be a whole number, got 2.5"),
        ({"name": "lora", "targets": "qv"}, "targets of delta 'lora' must be a list"),
        ({"name": "lora", "scale": "x"}, "scale of delta 'lora' must be a number or null"),
        ({"name": "partial", "blocks": True}, "blocks of delta 'partial' must be a whole number"),
        ({"name": "adapter", "placement": 3}, "placement of delta 'adapter' must be one of houlsby, pfeiffer"),
    ],
)
def test_values_of_another_kind_are_refused_in_one_sentence(spec: dict[str, Any], message: str) -> None:
    backbone, _ = make("vit")
    with pytest.raises(ConfigError, match=message):
        attach(backbone, [spec])


def test_features_kept_under_inference_mode_serve_training_too() -> None:
    from vpt.models.feature_cache import FeatureCache

    weight = torch.randn(3, 4)
    cache = FeatureCache(lambda batch: batch @ weight)

    def ask(rows: list[int]) -> Tensor:
        index = torch.tensor(rows)
        return cache("val", 4, index, torch.eye(4)[index][:, :3])

    with torch.inference_mode():
        ask([0, 1])
    head = nn.Linear(4, 2)
    head(ask([1, 2])).sum().backward()
    assert head.weight.grad is not None
