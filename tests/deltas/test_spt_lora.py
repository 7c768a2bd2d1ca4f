"""SPT-LoRA: sensitivities and the allocation of the budget written out, and what then trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.deltas.families import images, make, relative
from tests.export.models import tuned as model_with
from vpt.backbones import create_backbone
from vpt.deltas import attach
from vpt.deltas.base import TrainingImages
from vpt.deltas.spt_lora import Item, allocate
from vpt.errors import ConfigError, DeltaFileError, UnsupportedBackboneError, VPTError
from vpt.export import fold
from vpt.models import TunedModel, load_classifier, save_delta
from vpt.models.delta_file import start_from
from vpt.models.delta_format import read_delta, write_delta
from vpt.robustness.soups.averaging import averaged

NANO = "vit_nano_patch8_64"
SPEC: dict[str, Any] = {"name": "spt_lora", "rank": 2, "budget": 0.04}


def by_hand(items: list[Item], scores: list[Tensor], number: int) -> list[set[int] | None]:
    """The largest number of most sensitive weights that the budget allows, and then one weight after the other."""
    ranking = sorted(
        ((score, index, place) for index, each in enumerate(scores) for place, score in enumerate(each.tolist())),
        key=lambda entry: -entry[0],
    )
    own: list[set[int]] = [set() for _ in items]
    costs, best = [0] * len(items), 0
    kept: list[set[int]] = [set(each) for each in own]
    for taken, (_, index, place) in enumerate(ranking, start=1):
        own[index].add(place)
        costs[index] = items[index].cost if len(own[index]) >= items[index].needed else len(own[index])
        if sum(costs) <= number:
            best = taken
            kept[index].add(place)  # costs never fall, so that all before are kept, too
    found = [None if len(each) >= item.needed else each for item, each in zip(items, kept, strict=True)]
    for _, index, place in ranking[best:]:
        single = found[index]
        spent = sum(item.cost if each is None else len(each) for item, each in zip(items, found, strict=True))
        if spent == number:
            break
        if single is not None:
            single.add(place)
    return found


def listed(found: list[Tensor | None]) -> list[set[int] | None]:
    return [None if each is None else set(each.tolist()) for each in found]


@pytest.mark.parametrize("number", [1, 3, 9, 14, 20, 33, 40, 46])
def test_the_budget_goes_to_the_most_sensitive_and_is_spent_exactly(number: int) -> None:
    rng = np.random.default_rng(number)
    items = [Item(str(i), 0, 1, *each) for i, each in enumerate([(30, 12, 3), (30, 12, 5), (6, 6, 2), (40, 16, 16)])]
    scores = [torch.from_numpy(rng.random(item.size) ** (1 + index)) for index, item in enumerate(items)]
    found = allocate(items, scores, number)
    assert listed(found) == by_hand(items, scores, number)
    assert sum(item.cost if own is None else len(own) for item, own in zip(items, found, strict=True)) == number
    assert all(own is None or bool((own.diff() > 0).all()) for own in found)


def test_the_costs_are_those_of_the_released_code() -> None:
    """Of its selection on CIFAR-100 for 0.4 M parameters, whose file tells 380,909 with the class token."""
    part: Any = attach(create_backbone("vit_base_patch16_224", "random"), ["spt_lora"]).parts[0]
    costs = {(item.key.removeprefix("blocks/0/"), item.start): (item.cost, item.needed) for item in part.items}
    assert costs["attn/qkv/weight", 768] == costs["attn/proj/weight", 0] == (12_288, 1_229)
    assert costs["mlp/fc1/weight", 0] == costs["mlp/fc2/weight", 0] == (30_720, 3_072)
    assert costs["attn/qkv/bias", 1536] == costs["norm1/weight", 0] == costs["norm/bias", 0] == (768, 154)
    assert costs["mlp/fc1/bias", 0] == (3_072, 615)
    # LoRA of 4 values, 3 projections, 4 first and 3 second layers; 68 vectors of 768, one of 3,072; single weights.
    assert 7 * 12_288 + 7 * 30_720 + 68 * 768 + 3_072 + 23_789 + 768 == 380_909
    assert len(part.items) == 12 * (6 + 6 + 4) + 2
    assert part.expected_parameters() == sum(each.numel() for each in part.parameters()) == round(0.005 * 85_798_656)


def selected(family: str, spec: dict[str, Any], number: int = 40) -> tuple[Any, Any, TrainingImages]:
    backbone, _ = make(family)
    size = images(family).shape[1:]
    pixels = torch.rand(number, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    training = TrainingImages(number, lambda rows: pixels[list(rows)], torch.arange(number) % 3)
    part: Any = attach(backbone, [SPEC | spec]).parts[0]
    part.strength = 0.0
    part.start_from_images(training, np.random.default_rng(1))
    part.strength = 1.0
    return backbone, part, training


def pieces(part: Any) -> list[tuple[Item, Tensor, Tensor | None]]:
    """Of each item its values, and where they stand; None for what trains as a whole."""
    found, start = [], 0
    for item, count in zip(part.items, part.counts.values.tolist(), strict=True):
        stop = start + (item.cost if count == -1 else count)
        found.append((item, part.changes[start:stop], None if count == -1 else part.positions[start:stop]))
        start = stop
    assert start == len(part.changes) == len(part.positions)
    return found


@pytest.mark.parametrize("family", ["vit", "beit", "eva02-split", "post-norm", "swinv2"])
def test_sensitive_is_what_has_the_largest_squared_gradients(family: str) -> None:
    _, part, training = selected(family, {})
    rng = np.random.default_rng(1)
    other, _ = make(family)
    head = torch.from_numpy(rng.normal(scale=0.02, size=(3, other.num_features)))
    order = rng.permutation(training.number)
    other.unfreeze()
    other.eval()
    scores: dict[str, Tensor] = {}
    for rows in (order[:32], order[32:]):
        other.zero_grad()
        labels = cast("Tensor", training.labels)[rows]
        loss: Any = cross_entropy(other(training.images(rows.tolist())) @ head.T, labels)
        loss.backward()
        for key, parameter in other.model.named_parameters():
            if parameter.grad is not None:
                scores[key] = scores.get(key, 0.0) + parameter.grad**2
    own = [scores[item.key.replace("/", ".")][item.start : item.stop].flatten() for item in part.items]
    expected = by_hand(part.items, own, len(part.changes))
    assert [None if where is None else set(where.tolist()) for _, _, where in pieces(part)] == expected
    kinds = {(where is None, item.cost == item.size) for item, _, where in pieces(part)}
    assert kinds == {(True, True), (True, False), (False, True), (False, False)}  # each kind of item in each way
    assert not any(parameter.requires_grad for parameter in other.parameters() if parameter.grad is None)


@pytest.mark.parametrize("family", ["vit", "eva02-split", "swinv2"])
def test_what_is_selected_changes_as_it_says_and_the_rest_stays_bit_for_bit(family: str) -> None:
    backbone, part, _ = selected(family, {})
    bare = {key: parameter.clone() for key, parameter in backbone.model.named_parameters()}
    modules = dict(backbone.model.named_modules())
    before = backbone(images(family))
    part.strength = 0.0
    assert torch.equal(backbone(images(family)), before)  # it starts from the backbone
    with torch.no_grad():
        part.changes.add_(0.1 * torch.randn_like(part.changes))
        for strength in (1.0, 0.25):
            part.strength = strength
            expected = {key: each.clone() for key, each in bare.items()}
            for item, values, where in pieces(part):
                weight = expected[item.key.replace("/", ".")][item.start : item.stop]
                if where is not None:
                    for value, place in zip(values, where.tolist(), strict=True):
                        weight.view(-1)[place] += strength * value
                elif weight.ndim == 1:
                    weight += strength * values
                else:
                    a, b = values[: 2 * weight.shape[1]].view(2, -1), values[2 * weight.shape[1] :].view(-1, 2)
                    weight += strength * sum(torch.outer(b[:, r], a[r]) for r in range(2))
            for key, each in expected.items():
                path, _, last = key.rpartition(".")
                used = getattr(modules[path], last) if path else getattr(backbone.model, last)
                kept = each == bare[key]
                assert torch.equal(used[kept], bare[key][kept]), key
                torch.testing.assert_close(used, each, rtol=1e-12, atol=1e-14, msg=key)
        tuned = backbone(images(family))
        for key in bare:
            bare[key] = expected[key]
        part.detach()
        backbone.model.load_state_dict(bare, strict=False)
        assert relative(backbone(images(family)), tuned) <= 1e-12


def test_lora_starts_as_pytorch_draws_a_layer_and_all_else_as_zero() -> None:
    _, part, _ = selected("vit", {"budget": 0.1})
    assert any(where is None and item.cost < item.size for item, _, where in pieces(part))
    for item, values, where in pieces(part):
        if where is None and item.cost < item.size:
            inputs = item.size // (item.stop - item.start)
            drawn = values[: 2 * inputs]
            assert 0.5 * inputs**-0.5 < float(drawn.detach().abs().max()) <= inputs**-0.5
            assert not values[2 * inputs :].any()
        else:
            assert not values.any()


def model(seed: int = 0) -> TunedModel:
    found = TunedModel(create_backbone(NANO), 3, [{"name": "spt_lora", "budget": 0.01}]).eval()
    pixels = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    part: Any = found.parts()[0]
    part.start_from_images(
        TrainingImages(8, lambda rows: pixels[list(rows)], torch.arange(8) % 2), np.random.default_rng(0)
    )
    with torch.no_grad():
        part.changes.add_(0.05 * torch.randn_like(part.changes))
    return found


def test_a_file_keeps_the_selection_and_belongs_to_its_backbone(tmp_path: Path) -> None:
    own = model()
    path = save_delta(tmp_path / "delta.safetensors", own)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    loaded = load_classifier(path)
    for key, tensor in own.owned().items():
        assert torch.equal(loaded.owned()[key], tensor), key
    with torch.no_grad():
        assert torch.equal(loaded(pixels), own(pixels))
        assert relative(fold(own)(pixels), own(pixels)) <= 1e-4
    other = TunedModel(create_backbone(NANO), 5, [{"name": "spt_lora", "budget": 0.01}])
    start_from(path, other)
    assert other.parts()[0].started
    assert torch.equal(other.owned()["delta.parts.0.positions"], own.owned()["delta.parts.0.positions"])
    with pytest.raises(DeltaFileError, match=r"was trained on .* but the weights given are random"):
        load_classifier(path, "random")
    with pytest.raises(DeltaFileError, match="was trained on"):
        start_from(path, TunedModel(create_backbone(NANO, "random"), 3, [{"name": "spt_lora", "budget": 0.01}]))


def test_files_of_one_selection_have_a_mean_and_others_none(tmp_path: Path) -> None:
    paths = [save_delta(tmp_path / f"{seed}.safetensors", model(seed)) for seed in (0, 0, 1)]
    headers, tensors = zip(*map(read_delta, paths), strict=True)
    specs, mean = averaged(headers[0]["specs"], tensors[:2])
    key = "delta.parts.0.changes"
    torch.testing.assert_close(mean[key], (tensors[0][key] + tensors[1][key]) / 2)
    assert load_classifier(write_delta(tmp_path / "mean.safetensors", headers[0] | {"specs": specs}, mean))
    with pytest.raises(ConfigError, match="have selected other weights to train"):
        averaged(headers[0]["specs"], tensors[1:])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("counts._extra_state", lambda each: each.sub_(1), "it trains other numbers of weights than its budget"),
        ("counts._extra_state", lambda each: each[:1].add_(7), "it trains other numbers of weights than its budget"),
        ("positions", lambda each: each.fill_(3), "it trains weights of .* that are none"),
        ("positions", lambda each: each.add_(10**8), "it trains weights of .* that are none"),
        ("positions", lambda each: each.neg_(), "it trains weights of .* that are none"),
    ],
)
def test_a_file_of_weights_that_are_none_is_damaged(name: str, change: Any, message: str, tmp_path: Path) -> None:
    path = save_delta(tmp_path / "delta.safetensors", model())
    header, tensors = read_delta(path)
    change(tensors[f"delta.parts.0.{name}"])
    write_delta(path, header, tensors)
    with pytest.raises(DeltaFileError, match=f"is damaged: {message}"):
        load_classifier(path)


def test_what_is_folded_is_the_same_function_without_a_delta() -> None:
    own = model_with(NANO, "pretrained", [{"name": "spt_lora", "budget": 0.01}, {"name": "lora"}])
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        folded = fold(own)
        assert folded.delta is None
        torch.testing.assert_close(folded(pixels), own(pixels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([{"name": "spt_lora", "budget": 0.0}], r"a budget in \(0, 1\)"),
        ([{"name": "spt_lora", "budget": 1.0}], r"a budget in \(0, 1\)"),
        ([{"name": "spt_lora", "threshold": 1.5}], r"a threshold in \(0, 1\]"),
        ([{"name": "spt_lora", "rank": 0}], "a rank of at least 1"),
        ([{"name": "spt_lora", "rank": 13}], "takes a rank of 1 to 12"),
        (
            [{"name": "spt_lora", "rank": 1, "budget": 0.9}],
            r"of rank 1 trains 1 to [\d,]+ parameters of .*give another",
        ),
        ([{"name": "spt_lora", "budget": 1e-9}], r"a budget of 1e-09 is 0: give another budget or rank"),
        ([SPEC, "bias"], r"Two deltas train .*bias: keep one of them"),
        ([SPEC, "full"], "Two deltas train .*: keep one of them"),
    ],
)
def test_what_it_cannot_be_is_refused(specs: list[Any], message: str) -> None:
    backbone, _ = make("vit")
    with pytest.raises(ConfigError, match=message):
        attach(backbone, specs)


def test_it_goes_with_biases_and_norms_without_vectors_of_its_own() -> None:
    backbone, part, _ = selected("vit", {"vectors": False})
    assert {item.key.rpartition("/")[2] for item in part.items} == {"weight"}
    assert not any("norm" in item.key for item in part.items)
    attach(backbone, [{"name": "norm"}]).detach()


def test_where_it_cannot_select_it_is_refused() -> None:
    backbone, _ = make("vit")
    part: Any = attach(backbone, [SPEC]).parts[0]
    with pytest.raises(ConfigError, match="SptLora selects weights by images with one class each"):
        part.start_from_images(TrainingImages(2, lambda rows: images()[list(rows)]), np.random.default_rng(0))
    refused: list[tuple[Any, type[VPTError]]] = [
        (lambda: attach(create_backbone("resnet18", "random"), ["spt_lora"]), UnsupportedBackboneError),
        (lambda: TunedModel(create_backbone(NANO, frozen_dtype="bfloat16"), 3, ["spt_lora"]), ConfigError),
    ]
    for build, error in refused:
        with pytest.raises(error):
            build()


def test_each_layer_has_its_own_strength() -> None:
    backbone, part, _ = selected("vit", {})
    with torch.no_grad():
        part.changes.add_(0.1)
        bare = cast("Any", backbone.layout.blocks[1]).mlp.fc1._parameters["weight"]
        part.strength = 1.0
        whole = cast("nn.Linear", cast("Any", backbone.layout.blocks[1]).mlp.fc1).weight - bare
        part.strength = (0.0, 0.0, 0.5, 1.0, 1.0)
        half = cast("nn.Linear", cast("Any", backbone.layout.blocks[1]).mlp.fc1).weight - bare
    torch.testing.assert_close(half, 0.5 * whole)
    assert whole.abs().max() > 0
