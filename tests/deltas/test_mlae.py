"""MLAE against its sum of matrices of rank 1, with and without the experts that training leaves out."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.deltas.families import images, make, relative
from tests.deltas.test_any_backbone import on
from tests.deltas.test_low_rank import KINDS, by_hand, tuned, weights
from vpt.backbones import create_backbone
from vpt.deltas import attach
from vpt.errors import ConfigError, UnknownNameError, VPTError
from vpt.export import fold
from vpt.models import TunedModel, load_classifier, save_delta
from vpt.models.delta_format import read_delta, write_delta
from vpt.robustness.soups.averaging import averaged, low_rank_changes


def change(part: Any, key: str, mask: tuple[float, ...]) -> torch.Tensor:
    """Σ m_i λ_i b_i a_iᵀ, expert by expert."""
    experts = zip(mask, part.coefficient[key], part.up[key].T, part.down[key], strict=True)
    return torch.stack([m * scale * torch.outer(b, a) for m, scale, b, a in experts]).sum(dim=0).detach()


@pytest.mark.parametrize("family", KINDS)
def test_the_change_is_a_sum_of_experts(family: str) -> None:
    spec = {"name": "mlae", "rank": 3, "coefficient": 0.5, "targets": ["q", "v", "fc2"]}
    backbone, part, features = tuned(family, spec)
    start = weights(family)
    for strength, found in ((1.0, features), (0.3, None)):
        part.strength = strength
        part.eval()
        changed = {key: start[key] + strength * change(part, key, (1.0,) * 3) for key in part.up}
        with torch.no_grad():
            found = backbone(images(family)) if found is None else found
        assert relative(found, by_hand(family, changed)) <= 1e-12


def test_training_leaves_out_experts_of_all_images_alike() -> None:
    backbone, part, _ = tuned("vit", {"name": "mlae", "rank": 3, "dropout": 0.25, "targets": ["fc1"], "layers": [1, 2]})
    start = weights("vit")["1_fc1"]
    masks = list(product((0.0, 1 / 0.75), repeat=3))
    by_mask = [by_hand("vit", {"1_fc1": start + change(part, "1_fc1", mask)}) for mask in masks]
    part.train()
    seen = []
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(60):
            found = backbone(images())
            gaps = [relative(found, each) for each in by_mask]
            assert min(gaps) <= 1e-12
            seen.append(gaps.index(min(gaps)))
    kept = [sum(value > 0 for value in masks[index]) for index in seen]
    assert set(kept) == {1, 2, 3} or set(kept) == {0, 1, 2, 3}
    assert abs(sum(kept) / len(kept) - 3 * 0.75) < 4 * (3 * 0.75 * 0.25 / 60) ** 0.5  # four deviations of its mean
    part.eval()
    assert relative(backbone(images()), by_hand("vit", {"1_fc1": start + change(part, "1_fc1", (1.0,) * 3)})) <= 1e-12


def test_it_drops_in_convolutions_too_and_starts_from_the_backbone() -> None:
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    backbone, delta = on("convnext_atto", {"name": "mlae", "rank": 2, "targets": ["conv_dw"]})
    torch.manual_seed(1)
    delta.train()
    with torch.no_grad():
        assert relative(backbone(pixels), backbone(pixels)) > 1e-6
    delta.eval()
    bare, _ = make("vit")
    expected = bare(images())
    attach(bare, [{"name": "mlae", "targets": ["q", "fc1"]}]).train()
    assert torch.equal(bare(images()), expected)


def test_numbers_of_parameters_are_those_of_lora_and_one_for_each_expert() -> None:
    backbone = create_backbone("vit_base_patch16_224", "random")
    for targets, maps in ((["q", "v"], 24), (["attn.qkv"], 12)):
        delta = attach(backbone, [{"name": "mlae", "targets": targets}])
        assert sum(parameter.numel() for parameter in delta.parameters()) == 294_912 + 8 * maps
        delta.detach()


def test_what_is_exported_has_all_experts_even_of_a_model_that_trains() -> None:
    model = TunedModel(create_backbone("vit_nano_patch8_64").double(), 3, ["mlae"])
    with torch.no_grad():
        for parameter in model.parts()[0].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        assert model.training
        folded = fold(model)
        assert folded.delta is None
        pixels = torch.rand(2, 3, 64, 64, dtype=torch.float64)
        assert relative(folded(pixels), model.eval()(pixels)) <= 1e-12


def test_the_mean_of_files_is_that_of_their_matrices(tmp_path: Path) -> None:
    paths = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = TunedModel(create_backbone("vit_nano_patch8_64"), 3, [{"name": "mlae", "rank": 2}])
        with torch.no_grad():
            for parameter in model.parts()[0].parameters():
                parameter.add_(torch.randn_like(parameter))
        paths.append(save_delta(tmp_path / f"{seed}.safetensors", model))
    headers, tensors = zip(*map(read_delta, paths), strict=True)
    specs, mean = averaged(headers[0]["specs"], tensors)
    assert (specs[0]["name"], specs[0]["rank"]) == ("mlae", 6)
    changes = [low_rank_changes("delta.parts.0.", each) for each in (*tensors, mean)]
    for key, found in changes[3].items():
        torch.testing.assert_close(found, sum(each[key] for each in changes[:3]) / 3, rtol=1e-5, atol=1e-6)
        hand = tensors[0][f"delta.parts.0.up.{key}"] * tensors[0][f"delta.parts.0.coefficient.{key}"]
        hand = hand @ tensors[0][f"delta.parts.0.down.{key}"]
        torch.testing.assert_close(changes[0][key].float(), hand, rtol=1e-4, atol=1e-5)
    assert load_classifier(write_delta(tmp_path / "mean.safetensors", headers[0] | {"specs": specs}, mean))


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ({"dropout": 1.0}, ConfigError, r"MLAE takes a dropout in \[0, 1\) and a coefficient that is not 0, got 1.0"),
        ({"dropout": -0.1}, ConfigError, "got -0.1 and 1.0"),
        ({"coefficient": 0.0}, ConfigError, "got 0.5 and 0.0"),
        ({"rank": 0}, ConfigError, "rank of MLAE must be at least 1, got 0"),
        ({"targets": ["qq"]}, UnknownNameError, "MLAE target of .* did you mean 'q'"),
    ],
)
def test_what_is_out_of_range_is_refused(spec: dict[str, Any], error: type[VPTError], message: str) -> None:
    with pytest.raises(error, match=message):
        attach(make("vit")[0], [{"name": "mlae"} | spec])
