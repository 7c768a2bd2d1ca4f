"""Frozen weights in bfloat16: the function of autocast, in half the memory, and stamped wherever it counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vpt
from vpt.backbones import create_backbone
from vpt.deltas import attach
from vpt.errors import ConfigError, UnknownNameError, WeightsError
from vpt.experiments.profile import frozen_error
from vpt.export.onnx_torch import fold
from vpt.models.classifier import TunedModel
from vpt.models.delta_file import save_delta

NANO, SWIN = "vit_nano_patch8_64", "swin_nano_patch4_window8_64"
SPECS: list[dict[str, Any]] = [{"name": "prompt", "num_tokens": 3, "gate": {}}, {"name": "lora"}, {"name": "bias"}]


def pair(name: str = NANO, specs: list[dict[str, Any]] = SPECS) -> tuple[TunedModel, TunedModel]:
    """The same model with frozen weights in fp32 and in bfloat16."""
    found = []
    for dtype in (None, "bfloat16"):
        torch.manual_seed(0)
        found.append(TunedModel(create_backbone(name, frozen_dtype=dtype), 3, specs).eval())
        with torch.no_grad():
            for tensor in found[-1].owned().values():
                tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return found[0], found[1]


def images() -> torch.Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", [NANO, SWIN])
def test_it_is_autocast_bit_for_bit_with_its_gradients(name: str) -> None:
    wide, narrow = pair(name)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = narrow(images()), wide(images())
    assert torch.equal(ours, theirs)
    gradients = [
        torch.autograd.grad(logits.float().square().sum(), [p for p in model.parameters() if p.requires_grad])
        for logits, model in ((ours, narrow), (theirs, wide))
    ]
    assert all(torch.equal(own, other) for own, other in zip(*gradients, strict=True))
    assert narrow(images()).dtype == torch.float32  # and alone it says nothing of its inside
    torch.testing.assert_close(narrow(images()), wide(images()), rtol=0.05, atol=0.05)


def test_the_weights_take_half_and_keep_their_dtype_when_the_model_is_moved() -> None:
    wide, narrow = pair()
    sizes = [sum(p.numel() * p.element_size() for p in m.backbone.model.parameters()) for m in (wide, narrow)]
    assert sizes[1] / sizes[0] < 0.51
    before = {key: value.clone() for key, value in narrow.backbone.model.state_dict().items()}
    again = narrow.to(torch.bfloat16).to(torch.float32)
    fc1 = "blocks.0.mlp.fc1.weight"
    assert torch.equal(again.backbone.model.state_dict()[fc1], before[fc1])
    assert again.backbone.model.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16  # type: ignore[index,union-attr]


@pytest.mark.parametrize("name", [NANO, SWIN])
def test_halves_of_a_pass_are_the_whole(name: str) -> None:
    backbone = create_backbone(name, frozen_dtype="bfloat16")
    for block in (1, 2, 3):
        assert torch.equal(backbone.from_block(backbone.before_block(images(), block), block), backbone(images()))


def test_convolutions_that_standardise_their_weights_stay_as_they_are() -> None:
    model = create_backbone("resnetv2_50x1_bit", "random", frozen_dtype="bfloat16").model
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_printed_error_is_of_the_function_and_not_of_dropout() -> None:
    backbone = create_backbone(NANO, frozen_dtype="bfloat16")
    model = TunedModel(backbone, 3, [{"name": "prompt", "num_tokens": 3, "dropout": 0.5}]).train()
    found = {frozen_error(model, images()) for _ in range(3)}
    assert len(found) == 1
    assert 0 < found.pop() < 0.02


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_precisions_of_all_else_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match="all else in float32 or bfloat16"):
        create_backbone(NANO, frozen_dtype="bfloat16").to(dtype)


def test_a_file_brings_it_back_and_fits_no_other_backbone(tmp_path: Path) -> None:
    _, narrow = pair()
    file = save_delta(tmp_path / "delta.safetensors", narrow)
    loaded = vpt.load(file)
    assert loaded.backbone.narrow
    assert torch.equal(loaded(images()), narrow(images()))
    assert create_backbone(NANO).fingerprint != loaded.backbone.fingerprint
    head = {"backbone": {"name": NANO, "fingerprint": loaded.backbone.fingerprint}}
    assert not create_backbone(NANO).is_recorded_as(head["backbone"])


def test_an_exported_function_is_computed_in_fp32_of_the_same_weights() -> None:
    _, narrow = pair()
    folded = fold(narrow)
    assert not folded.backbone.narrow
    assert {p.dtype for p in folded.parameters()} == {torch.float32}
    torch.testing.assert_close(folded(images()), narrow(images()), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("spec", [{"name": "full"}, {"name": "partial", "blocks": 1}])
def test_what_trains_the_weights_themselves_is_refused(spec: dict[str, Any]) -> None:
    backbone = create_backbone(NANO, frozen_dtype="bfloat16")
    with pytest.raises(ConfigError, match="frozen_dtype is of what stays frozen"):
        attach(backbone, [spec])
    with pytest.raises(ConfigError, match="all of the backbone trains"):
        backbone.unfreeze()


def test_a_merge_is_refused_and_another_name_too() -> None:
    delta = attach(create_backbone(NANO, frozen_dtype="bfloat16"), [{"name": "lora"}])
    part: Any = delta.parts[0]
    with pytest.raises(ConfigError, match="kept in bfloat16"):
        part.merge()
    with pytest.raises((UnknownNameError, WeightsError, ConfigError)):
        create_backbone(NANO, frozen_dtype="int8")  # type: ignore[arg-type]
