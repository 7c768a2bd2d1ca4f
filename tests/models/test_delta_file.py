"""A delta file is complete, small, and refuses the wrong backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vpt.backbones import create_backbone
from vpt.errors import ConfigError, DeltaFileError, UnknownNameError, WeightsError
from vpt.models import TunedModel, load_classifier, save_delta
from vpt.models.delta_format import read_delta

NANO = "vit_nano_patch8_64"
PROMPT = {"name": "prompt", "num_tokens": 4}
IMAGES = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def model() -> TunedModel:
    tuned = TunedModel(create_backbone(NANO), 3, [PROMPT], ["cat", "dog", "fish"], {"name": "square"})
    with torch.no_grad():
        for tensor in tuned.owned().values():
            tensor.normal_()
    return tuned.eval()


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    tuned = model()
    tuned.info = {"seed": 3}
    loaded = load_classifier(save_delta(tmp_path / "delta.safetensors", tuned))
    assert torch.equal(loaded(IMAGES), tuned(IMAGES))
    assert loaded.class_names == ["cat", "dog", "fish"]
    assert (loaded.preset, loaded.info) == ({"name": "square"}, {"seed": 3})
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize(
    "specs",
    [
        [{"name": "lora", "rank": 2, "targets": ["q", "fc1"]}, PROMPT],
        [{"name": "bias"}, PROMPT, {"name": "lora"}],
        [{"name": "norm"}],
        [{"name": "partial", "blocks": 1}],
        [{"name": "full"}],
    ],
    ids=lambda specs: "+".join(spec["name"] for spec in specs),
)
def test_any_composition_comes_back(tmp_path: Path, specs: list[dict[str, Any]]) -> None:
    tuned = TunedModel(create_backbone(NANO), 3, specs).eval()
    before = tuned(IMAGES)
    with torch.no_grad():
        for tensor in tuned.owned().values():
            tensor.add_(0.02 * torch.randn_like(tensor))
    loaded = load_classifier(save_delta(tmp_path / "delta.safetensors", tuned))
    assert torch.equal(loaded(IMAGES), tuned(IMAGES))
    assert not torch.equal(loaded(IMAGES), before)
    assert sorted(load_file(tmp_path / "delta.safetensors")) == sorted(tuned.owned())


@pytest.mark.parametrize("name", [NANO, "swin_nano_patch4_window8_64"])
def test_a_prefix_from_a_network_is_kept_as_plain_keys_and_values(tmp_path: Path, name: str) -> None:
    live = TunedModel(create_backbone(name), 3, [{"name": "prefix", "num_tokens": 3, "hidden": 5}]).eval()
    loaded = load_classifier(save_delta(tmp_path / "delta.safetensors", live))
    images = torch.rand(2, *live.backbone.input_shape)
    torch.testing.assert_close(loaded(images), live(images), rtol=1e-6, atol=1e-6)
    kept = {key.split(".")[3] for key in load_file(tmp_path / "delta.safetensors") if key.startswith("delta.")}
    assert kept == {"keys", "values"}


def test_only_trained_tensors_are_in_the_file(tmp_path: Path) -> None:
    tensors = load_file(save_delta(tmp_path / "delta.safetensors", model()))
    assert sorted(tensors) == ["delta.parts.0.tokens", "head.bias", "head.weight"]


def test_ten_deep_prompts_and_102_classes_on_vit_tiny_take_less_than_400_kb(tmp_path: Path) -> None:
    tuned = TunedModel(create_backbone("vit_tiny_patch16_224", "random"), 102, [{"name": "prompt", "num_tokens": 10}])
    path = save_delta(tmp_path / "delta.safetensors", tuned)
    assert path.stat().st_size < 400_000
    assert sum(t.numel() for t in load_file(path).values()) == 12 * 10 * 192 + 102 * 193


def test_a_fully_tuned_backbone_comes_back_whole(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 224, 224)
    weights = tmp_path / "resnet.safetensors"
    save_file(create_backbone("resnet18", "random").model.state_dict(), weights)
    start = TunedModel(create_backbone("resnet18", str(weights)), 3)
    start.backbone.unfreeze()
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.add_(0.01)
    start.train()
    start(images)  # moves the batch-norm statistics
    start.eval()
    loaded = load_classifier(save_delta(tmp_path / "full.safetensors", start))
    assert torch.equal(loaded(images), start(images))


def test_another_backbone_of_equal_shape_is_refused_by_name(tmp_path: Path) -> None:
    path = save_delta(tmp_path / "delta.safetensors", model())
    other = tmp_path / "other.safetensors"
    save_file(timm.create_model(NANO).state_dict(), other)
    with pytest.raises(DeltaFileError, match=r"was trained on vpt/vit_nano_patch8_64 .* file:other.safetensors"):
        load_classifier(path, weights=str(other))


def test_what_is_not_a_delta_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeltaFileError, match="No delta file"):
        load_classifier(tmp_path / "none.safetensors")
    text = tmp_path / "text.safetensors"
    text.write_text("hello")
    with pytest.raises(DeltaFileError, match="not a delta file"):
        load_classifier(text)
    plain = tmp_path / "plain.safetensors"
    save_file({"x": torch.zeros(1)}, plain)
    with pytest.raises(DeltaFileError, match="not a delta file"):
        load_classifier(plain)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(save_delta(tmp_path / "delta.safetensors", model()).read_bytes()[:-100])
    with pytest.raises(DeltaFileError, match="not a delta file"):
        load_classifier(cut)


def test_a_file_without_its_head_is_refused(tmp_path: Path) -> None:
    path = save_delta(tmp_path / "delta.safetensors", model())
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    del tensors["head.bias"]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(DeltaFileError, match=r"incomplete: head\.bias missing"):
        load_classifier(path)
    header = json.loads(metadata["vpt"])
    header["format"] = "vpt-delta/9"
    save_file(tensors, path, metadata={"vpt": json.dumps(header)})
    with pytest.raises(DeltaFileError, match="format 'vpt-delta/9'"):
        read_delta(path)[0]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ([], "format 'None'"),
        (5, "not a delta file"),
        ({"format": ["vpt-delta/1"]}, "has format"),
        ({"class_names": 3, "info": []}, "no valid class_names, info"),
        ({"specs": [1]}, "no valid specs"),
        ({"backbone": {"name": NANO, "weights": 3}}, "no valid backbone weights, backbone weights_id, .*normalization"),
    ],
)
def test_a_header_of_other_types_is_refused(tmp_path: Path, change: Any, sentence: str) -> None:
    path = save_delta(tmp_path / "delta.safetensors", model())
    header = read_delta(path)[0] | change if isinstance(change, dict) else change
    save_file(load_file(path), path, metadata={"vpt": json.dumps(header)})
    with pytest.raises(DeltaFileError, match=sentence):
        load_classifier(path)


def test_weights_that_have_moved_are_asked_for(tmp_path: Path) -> None:
    weights = tmp_path / "here.safetensors"
    save_file(timm.create_model(NANO).state_dict(), weights)
    tuned = TunedModel(create_backbone(NANO, str(weights)), 3, [PROMPT])
    path = save_delta(tmp_path / "delta.safetensors", tuned)
    moved = weights.rename(tmp_path / "there.safetensors")
    with pytest.raises(WeightsError, match="No weights file"):
        load_classifier(path)
    assert torch.equal(load_classifier(path, weights=str(moved))(IMAGES), tuned.eval()(IMAGES))


def test_strength_moves_delta_and_head_together() -> None:
    tuned = model()
    anchor = torch.nn.Linear(192, 3)
    tuned.set_anchor(anchor)
    at_one = tuned(IMAGES)
    bare = create_backbone(NANO)
    tuned.set_strength(0.0)
    assert torch.equal(tuned(IMAGES), anchor(bare(IMAGES)))
    tuned.set_strength(0.5)
    features = tuned.backbone(IMAGES)
    expected = 0.5 * anchor(features) + 0.5 * tuned.head(features)
    torch.testing.assert_close(tuned(IMAGES), expected)
    tuned.set_strength(1.0)
    assert torch.equal(tuned(IMAGES), at_one)


def test_wrong_counts_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 class names were given for 3"):
        TunedModel(create_backbone(NANO, "random"), 3, [], ["a", "b"])
    with pytest.raises(ConfigError, match="at least 1"):
        TunedModel(create_backbone(NANO, "random"), 0)
    with pytest.raises(ConfigError, match="anchor head"):
        model().set_anchor(torch.nn.Linear(192, 4))
    with pytest.raises(UnknownNameError, match="prompt"):
        TunedModel(create_backbone(NANO, "random"), 3, [{"name": "prmpt"}])


def test_a_file_of_format_1_stays_readable() -> None:
    """Stored by version 0.1.0: prompts with dropout in blocks 0-2, a folded prefix, LoRA, norms and three classes."""
    loaded = load_classifier(Path(__file__).parent / "stored" / "format-1.safetensors")
    assert loaded.class_names == ["ant", "bee", "cat"]
    ramp = torch.linspace(0, 255, 3 * 64 * 64).round().to(torch.uint8).view(1, 3, 64, 64)
    torch.testing.assert_close(loaded(ramp), torch.tensor([[1.2050, 0.3092, -1.6042]]), rtol=0, atol=2e-3)
