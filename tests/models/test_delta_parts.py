"""Training starts from what a file means, however it is written there; from nothing it does not start silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.test_round_trip import COMPOSITIONS, fine_tuned, logits, moved
from vpt.backbones import create_backbone
from vpt.errors import DeltaFileError
from vpt.models import TunedModel, save_delta
from vpt.models.delta_file import start_from

NANO, SWIN = "vit_nano_patch8_64", "swin_nano_patch4_window8_64"


def started(path: Path, specs: list[dict[str, Any]], of: TunedModel) -> TunedModel:
    """A new model that starts from a file, under the head of the model that was saved."""
    model = TunedModel(create_backbone(of.backbone.name), 3, specs).eval()
    start_from(path, model)
    model.head.load_state_dict(of.head.state_dict())
    return model


@pytest.mark.parametrize("name", sorted(COMPOSITIONS.keys() - {"head-alone", "linear"}))
def test_a_model_starts_from_its_own_file(tmp_path: Path, name: str) -> None:
    model = moved(TunedModel(create_backbone(NANO), 3, COMPOSITIONS[name]))
    path = save_delta(tmp_path / "delta.safetensors", model)
    torch.testing.assert_close(logits(started(path, COMPOSITIONS[name], model)), logits(model), rtol=1e-4, atol=1e-4)


WIDE = [
    {"name": "prompt", "num_tokens": 3, "project": 2},
    {"name": "prompt", "num_tokens": 2, "project": 30},
    {"name": "prompt", "num_tokens": 1, "project": 4, "deep": False},
    {"name": "prompt", "num_tokens": [1, 2, 3, 1, 2, 3], "project": 5},
    {"name": "prompt", "num_tokens": 3, "project": 2, "gate": {"init": -1.0}, "fourier": 0.5},
    {"name": "prefix", "num_tokens": 6, "hidden": 2},
    {"name": "prefix", "num_tokens": 6, "hidden": 2, "gate": {"per": "block"}},
    {"name": "prefix", "num_tokens": 2, "hidden": 9},
]


@pytest.mark.parametrize("spec", WIDE, ids=str)
def test_what_was_folded_is_unfolded_exactly_and_trains_whole(tmp_path: Path, spec: dict[str, Any]) -> None:
    model = moved(TunedModel(create_backbone(NANO).double(), 3, [spec]))
    path = save_delta(tmp_path / "delta.safetensors", model)
    other = TunedModel(create_backbone(NANO).double(), 3, [spec]).eval()
    start_from(path, other)
    assert model.delta is not None
    assert other.delta is not None
    theirs = other.delta.folded()[1]
    for key, tensor in model.delta.folded()[1].items():
        torch.testing.assert_close(theirs[key], tensor, rtol=1e-10, atol=1e-12)
    loss = sum((tensor * torch.randn_like(tensor)).sum() for tensor in _live(other))
    assert isinstance(loss, torch.Tensor)
    loss.backward()  # type: ignore[no-untyped-call]
    narrow = dict(other.delta.named_parameters())
    grads = [narrow[key].grad for key in narrow if "tokens" in key or "embedding" in key]
    assert all(grad is not None and bool((grad.flatten(0, -2).abs().sum(dim=0) > 0).all()) for grad in grads)


def _live(model: TunedModel) -> list[torch.Tensor]:
    assert model.delta is not None
    part: Any = model.delta.parts[0]
    if hasattr(part, "pair"):
        return [tensor for layer in range(len(part.blocks)) for tensor in part.pair(layer)]
    return [part.prompts(layer) for layer in range(len(part.blocks))]


def test_a_prefix_network_of_a_swin_starts_from_its_file(tmp_path: Path) -> None:
    specs = [{"name": "prefix", "num_tokens": 5, "hidden": 3}]
    model = moved(TunedModel(create_backbone(SWIN), 3, specs))
    path = save_delta(tmp_path / "delta.safetensors", model)
    torch.testing.assert_close(logits(started(path, specs, model)), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("free", "narrow", "sentence"),
    [
        (
            {"name": "prompt", "num_tokens": 4},
            {"name": "prompt", "num_tokens": 4, "project": 5},
            "project=5 dimensions",
        ),
        ({"name": "prefix", "num_tokens": 6}, {"name": "prefix", "num_tokens": 6, "hidden": 3}, "hidden=3"),
    ],
)
def test_more_than_fits_is_refused(tmp_path: Path, free: dict[str, Any], narrow: dict[str, Any], sentence: str) -> None:
    path = save_delta(tmp_path / "delta.safetensors", moved(TunedModel(create_backbone(NANO), 3, [free])))
    model = TunedModel(create_backbone(NANO), 3, [narrow])
    before = {key: tensor.clone() for key, tensor in model.owned().items()}
    with pytest.raises(DeltaFileError, match=f"cannot be where this delta starts: .* span more than {sentence}"):
        start_from(path, model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.owned().items())


@pytest.mark.parametrize("specs", [[], [{"name": "linear"}]])
def test_a_linear_probe_has_nothing_to_start_from(tmp_path: Path, specs: list[dict[str, Any]]) -> None:
    path = save_delta(tmp_path / "probe.safetensors", moved(TunedModel(create_backbone(NANO), 3, specs)))
    with pytest.raises(DeltaFileError, match="holds nothing but a head"):
        start_from(path, TunedModel(create_backbone(NANO), 3, specs))


def test_other_deltas_are_no_start(tmp_path: Path) -> None:
    path = save_delta(tmp_path / "lora.safetensors", moved(TunedModel(create_backbone(NANO), 3, [{"name": "lora"}])))
    with pytest.raises(DeltaFileError, match=r"holds the deltas .* are to be trained: give the same"):
        start_from(path, TunedModel(create_backbone(NANO), 3, [{"name": "lora", "rank": 4}]))


def test_full_fine_tuning_starts_from_full_fine_tuning_only(tmp_path: Path) -> None:
    path = save_delta(tmp_path / "full.safetensors", fine_tuned("pretrained"))
    with pytest.raises(DeltaFileError, match="is of a tuned one, but a frozen backbone is to be trained on"):
        start_from(path, TunedModel(create_backbone(NANO), 3))
    model = TunedModel(create_backbone(NANO), 3)
    model.backbone.unfreeze()
    start_from(path, model)
    kept = fine_tuned("pretrained").owned()
    assert all(torch.equal(t, kept[key]) for key, t in model.owned().items() if key.startswith("backbone."))
