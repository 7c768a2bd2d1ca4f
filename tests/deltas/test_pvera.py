"""PVeRA: VeRA of its mean, and while it trains a normal distribution of each token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.deltas.families import images, make, relative
from tests.deltas.test_low_rank import KINDS, by_hand, tuned, weights
from tests.export.models import tuned as model_with
from vpt.backbones import create_backbone
from vpt.deltas import attach
from vpt.errors import ConfigError, VPTError
from vpt.export import export_peft, fold
from vpt.models import TunedModel


def random_matrices(part: Any, rank: int, seed: int, start: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """A of means and of variances, and B, as NumPy draws them."""
    inputs, outputs = (max(start[key].shape[side] for key in part.b) for side in (1, 0))
    rng = np.random.RandomState(seed)
    down = (rng.random_sample((2 * rank, inputs)) * 2 - 1) * (6 / inputs) ** 0.5
    up = (rng.random_sample((outputs, rank)) * 2 - 1) * (6 / rank) ** 0.5
    a, b = (torch.from_numpy(each.astype(np.float32)).double() for each in (down, up))
    return a[:rank], a[rank:], b


@pytest.mark.parametrize("family", KINDS)
def test_it_is_the_vera_of_its_means_where_it_does_not_train(family: str) -> None:
    backbone, part, _ = tuned(family, {"name": "pvera", "rank": 5, "seed": 3, "targets": ["q", "proj", "fc2"]})
    part.eval()
    start = weights(family)
    a, _, b = random_matrices(part, 5, 3, start)
    for strength in (1.0, 0.4):
        part.strength = strength
        changed = {}
        for key in part.b:
            rows, columns = start[key].shape
            change = torch.diag(part.b[key]) @ b[:rows] @ torch.diag(part.d[key][:5]) @ a[:, :columns]
            changed[key] = (start[key] + strength * change).detach()
        with torch.no_grad():
            assert relative(backbone(images(family)), by_hand(family, changed)) <= 1e-12


def test_training_draws_what_b_is_given_of_each_token() -> None:
    backbone, part, _ = tuned("vit", {"name": "pvera", "rank": 4, "targets": ["q", "v"], "layers": [1, 2]})
    part.train()
    start = weights("vit")
    mean, spread, b = random_matrices(part, 4, 0, start)
    seen: dict[str, torch.Tensor] = {}
    qkv = part.targets["1_q"].module
    qkv.register_forward_hook(lambda module, args, out: seen.update(x=args[0], out=out))
    torch.manual_seed(7)
    with torch.no_grad():
        backbone(images())
        x = seen["x"]
        torch.manual_seed(7)
        expected = torch.nn.functional.linear(x, qkv.weight, qkv.bias)
        for place, key in enumerate(("1_q", "1_v")):
            d, width = part.d[key], start[key].shape[0]
            mu, logarithm = d[:4] * (x @ mean.T), d[4:] * (x @ spread.T)
            z = mu + logarithm.exp().sqrt() * torch.randn(mu.shape, dtype=mu.dtype)
            expected[..., 2 * place * width : (2 * place + 1) * width] += part.b[key] * (z @ b[:width].T)
        torch.testing.assert_close(seen["out"], expected, rtol=1e-10, atol=1e-10)
        assert relative(backbone(images()), backbone(images())) > 1e-6
        part.strength = 0.0
        assert torch.equal(backbone(images()), backbone(images()))


def test_numbers_of_parameters_are_those_of_vera_and_a_rank_more() -> None:
    delta = attach(create_backbone("vit_base_patch16_224", "random"), ["pvera"])
    assert sum(parameter.numel() for parameter in delta.parameters()) == 24 * (2 * 256 + 768) == 30_720


def test_what_is_exported_has_the_means_even_of_a_model_that_trains() -> None:
    model = TunedModel(create_backbone("vit_nano_patch8_64").double(), 3, [{"name": "pvera", "rank": 9}])
    with torch.no_grad():
        for parameter in model.parts()[0].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        assert model.training
        folded = fold(model)
        assert folded.delta is None
        pixels = torch.rand(2, 3, 64, 64, dtype=torch.float64)
        assert relative(folded(pixels), model.eval()(pixels)) <= 1e-12


def test_what_it_cannot_be_is_refused(tmp_path: Any) -> None:
    refused: list[tuple[Any, dict[str, Any], type[VPTError], str]] = [
        (make("vit")[0], {"rank": 0}, ConfigError, "PVeRA takes a rank of at least 1"),
        (create_backbone("convnext_atto", "random"), {"targets": ["conv_dw"]}, ConfigError, "conv_dw is a convolution"),
    ]
    for backbone, spec, error, message in refused:
        with pytest.raises(error, match=message):
            attach(backbone, [{"name": "pvera"} | spec])
    with pytest.raises(
        ConfigError, match="peft export takes a model with one LoRA, DoRA, VeRA or MLAE, this one has P"
    ):
        export_peft(model_with("vit_nano_patch8_64", "pretrained", [{"name": "pvera"}]), tmp_path / "adapter")
