"""The backbones that ship: what is in their files, and that it is worth shipping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from tests.deltas.families import relative
from tests.deltas.oracle import concatenated_features
from vpt.backbones import Backbone, create_backbone
from vpt.backbones.bundled import default_cfgs, weights_file
from vpt.deltas import attach
from vpt.deltas.prompts.prompt import Prompt

SWIN = "swin_nano_patch4_window8_64"
SHIPPED = list(default_cfgs)


def images(size: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SHIPPED)
def test_the_model_holds_what_is_in_the_file(name: str) -> None:
    backbone = create_backbone(name)
    assert backbone.weights_id == f"vpt/{name}"
    state, file = backbone.model.state_dict(), load_file(weights_file(name))
    assert state.keys() == file.keys()
    assert all(
        tensor.dtype == torch.float16 and torch.equal(tensor.float(), state[key]) for key, tensor in file.items()
    )
    assert sum(parameter.numel() for parameter in backbone.parameters()) <= 3e6
    features = backbone(images())
    assert features.shape == (2, 192)
    assert features.isfinite().all()


def test_all_shipped_weights_together_stay_small() -> None:
    sizes = {path.stem: path.stat().st_size for path in weights_file(SWIN).parent.iterdir()}
    assert sizes.keys() == set(SHIPPED)
    assert sum(sizes.values()) <= 12e6


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, Any]:
    """The first 300 of scikit-learn's digits at 64 pixels, uint8, and their labels."""
    found = load_digits()
    grey = torch.from_numpy(found.images[:300]).float()[:, None] * (255 / 16)
    large = F.interpolate(grey, size=64, mode="bicubic").clamp(0, 255)
    return large.round().to(torch.uint8).expand(-1, 3, -1, -1), found.target[:300]


def probed(backbone: Backbone, images: torch.Tensor, labels: Any) -> float:
    """Accuracy on the last 100 images of logistic regression on standardised features of the first 200."""
    with torch.no_grad():
        features = torch.cat([backbone(part) for part in torch.split(images, 50)]).numpy()
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    return float(probe.fit(features[:200], labels[:200]).score(features[200:], labels[200:]))


# Measured: 0.88 and 0.59; at random init 0.39 and 0.38.
@pytest.mark.parametrize(("name", "floor"), [("vit_nano_patch8_64", 0.8), (SWIN, 0.5)])
def test_shipped_features_separate_digits_better_than_random_ones(
    name: str, floor: float, digits: tuple[torch.Tensor, Any]
) -> None:
    torch.manual_seed(0)
    shipped, random = (probed(create_backbone(name, weights), *digits) for weights in ("pretrained", "random"))
    assert shipped >= floor
    assert shipped >= random + 0.1


def test_the_swin_merges_once_and_shifts_windows_where_there_are_several() -> None:
    backbone = create_backbone(SWIN, "random")
    blocks: list[Any] = backbone.layout.blocks
    assert [block.input_resolution for block in blocks] == [(16, 16)] * 2 + [(8, 8)] * 6
    assert [block.dim for block in blocks] == [96] * 2 + [192] * 6
    assert [any(block.shift_size) for block in blocks] == [False, True] + [False] * 6
    tokens = backbone.tokens(images())
    assert tokens.shape == (2, 8, 8, 192)
    torch.testing.assert_close(backbone(images()), tokens.mean((1, 2)))


@pytest.mark.parametrize("size", [32, 96, 128])
def test_the_swin_takes_other_image_sizes(size: int) -> None:
    backbone = create_backbone(SWIN, image_size=size)
    assert backbone(images(size)).shape == (2, 192)
    assert backbone.tokens(images(size)).shape == (2, size // 8, size // 8, 192)


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_prompts_on_the_shipped_swin_equal_the_concatenation(deep: bool) -> None:
    backbone, twin = (create_backbone(SWIN).double() for _ in range(2))
    bare = backbone(images())
    delta = attach(backbone, [{"name": "prompt", "num_tokens": 5, "deep": deep}])
    for parameter in delta.parameters():
        nn.init.normal_(parameter)
    (part,) = delta.parts
    assert isinstance(part, Prompt)
    prompts = [part.prompts(layer) for layer in range(8 if deep else 1)]
    ours = backbone(images())
    assert relative(ours, bare) > 1e-3
    theirs = concatenated_features(twin.model, twin.normalize(images()), prompts, deep=deep)
    assert relative(ours, theirs) <= 1e-10
