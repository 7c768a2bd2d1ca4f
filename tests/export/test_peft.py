"""A LoRA is the same function in peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from tests.deltas.families import make
from tests.export.models import tuned
from vpt.backbones import create_backbone
from vpt.cli import main
from vpt.errors import ConfigError, OutputError
from vpt.export import export_peft
from vpt.models.classifier import TunedModel
from vpt.models.delta_file import load_classifier, save_delta

NAMES = ["vit_nano_patch8_64", "swin_nano_patch4_window8_64"]
TARGETS = ["q", "v", "proj", "fc1"]


SPECS: list[dict[str, Any]] = [
    {"name": "lora", "rank": 3, "scale": 6.0, "targets": TARGETS},
    {"name": "dora", "rank": 3, "scale": 6.0, "targets": TARGETS},
    {"name": "mlae", "rank": 3, "coefficient": 2.0, "targets": TARGETS},
    {"name": "vera", "rank": 5, "targets": TARGETS},
    {"name": "vera", "rank": 300, "targets": ["q", "fc2"]},
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec["name"])
@pytest.mark.parametrize("name", NAMES)
def test_peft_loads_the_adapter_and_gives_equal_logits(name: str, spec: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the optional library peft is not installed")
    model = tuned(name, "pretrained", [spec])
    folder = export_peft(model, tmp_path / "adapter")
    other = timm.create_model(name, num_classes=5).eval()
    own = {key: tensor for key, tensor in model.backbone.model.state_dict().items() if key in other.state_dict()}
    other.load_state_dict(own, strict=False)
    adapted = peft.PeftModel.from_pretrained(other, str(folder))
    images = torch.rand(2, *model.backbone.input_shape)
    with torch.no_grad():
        theirs, ours = adapted(model.backbone.normalize(images)), model(images)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_adapter_holds_the_change_of_every_layer(name: str, tmp_path: Path) -> None:
    spec = {"name": "lora", "rank": 3, "scale": 6.0, "targets": TARGETS}
    model = tuned(name, "pretrained", [spec])
    folder = export_peft(model, tmp_path)
    tensors, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads(Path(folder / "adapter_config.json").read_text()),
    )
    before = {key: tensor.clone() for key, tensor in model.backbone.model.state_dict().items()}
    assert model.delta is not None
    model.delta.parts[0].merge_for_good()  # type: ignore[operator]
    after = model.backbone.model.state_dict()
    changed = {key.removesuffix(".weight") for key in after if not torch.equal(after[key], before[key])}
    assert changed == set(config["target_modules"])
    for layer in changed:
        down, up = (tensors[f"base_model.model.{layer}.lora_{part}.weight"] for part in "AB")
        factor = config["alpha_pattern"][layer] / config["rank_pattern"][layer]
        change = after[f"{layer}.weight"] - before[f"{layer}.weight"]
        torch.testing.assert_close(factor * up @ down, change, rtol=1e-4, atol=1e-6)


def merged(path: Path, layer: str, before: torch.Tensor) -> torch.Tensor:
    """A layer's weight as the files of peft say it: by the equations of LoRA, DoRA and VeRA as peft writes them."""
    tensors = load_file(path / "adapter_model.safetensors")
    config = json.loads((path / "adapter_config.json").read_text())
    own = {key.rpartition(f"{layer}.")[2]: tensor for key, tensor in tensors.items() if f".{layer}." in key}
    if config["peft_type"] == "VERA":
        down, up = (tensors[f"base_model.vera_{part}"] for part in "AB")
        rows, columns = before.shape
        found: torch.Tensor = before + own["vera_lambda_b"][:, None] * up[:rows] @ (
            own["vera_lambda_d"][:, None] * down[:, :columns]
        )
        return found
    factor = config["alpha_pattern"][layer] / config["rank_pattern"][layer]
    changed: torch.Tensor = before + factor * own["lora_B.weight"] @ own["lora_A.weight"]
    if config["use_dora"]:
        changed = own["lora_magnitude_vector"][:, None] * changed / changed.norm(dim=1, keepdim=True)
    return changed


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec["name"])
@pytest.mark.parametrize("name", NAMES)
def test_the_files_say_the_merged_weight_of_every_layer(name: str, spec: dict[str, Any], tmp_path: Path) -> None:
    model = tuned(name, "pretrained", [spec])
    folder = export_peft(model, tmp_path)
    before = {key: tensor.clone() for key, tensor in model.backbone.model.state_dict().items()}
    assert model.delta is not None
    model.delta.parts[0].merge_for_good()  # type: ignore[operator]
    after = model.backbone.model.state_dict()
    changed = {key.removesuffix(".weight") for key in after if not torch.equal(after[key], before[key])}
    assert changed == set(json.loads((folder / "adapter_config.json").read_text())["target_modules"])
    for layer in changed:
        expected, start = after[f"{layer}.weight"], before[f"{layer}.weight"]
        torch.testing.assert_close(merged(folder, layer, start), expected, rtol=1e-4, atol=1e-6)


def test_only_a_lora_alone_is_written(tmp_path: Path) -> None:
    both = tuned("vit_nano_patch8_64", "pretrained", [{"name": "lora"}, {"name": "prompt", "num_tokens": 2}])
    with pytest.raises(ConfigError, match="one LoRA, DoRA, VeRA or MLAE, this one has Lora, Prompt"):
        export_peft(both, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    half = tuned("vit_nano_patch8_64", "pretrained", [{"name": "lora"}])
    half.set_strength(0.5)
    with pytest.raises(ConfigError, match="at strength 1"):
        export_peft(half, tmp_path / "adapter")


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot be written: .*file is not a folder\."):
        export_peft(tuned("vit_nano_patch8_64", "pretrained", [{"name": "lora"}]), tmp_path / "file")


def test_the_readme_builds_the_model_at_the_size_of_the_images(tmp_path: Path) -> None:
    model = TunedModel(create_backbone("vit_nano_patch8_64", "random", image_size=96), 3, [{"name": "lora"}])
    assert "num_classes=3, img_size=96)" in (export_peft(model, tmp_path) / "README.md").read_text()


def test_the_command_writes_beside_the_delta(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save_delta(tmp_path / "delta.safetensors", tuned("vit_nano_patch8_64", "pretrained", [{"name": "lora"}]))
    assert main(["export", "--delta", str(file), "--format", "peft"]) == 0
    assert "written to" in capsys.readouterr().out
    head = load_file(tmp_path / "peft" / "adapter_model.safetensors")["base_model.model.head.weight"]
    assert torch.equal(head, load_classifier(file).head.weight)
    assert main(["export", "--delta", str(file), "--format", "onxx"]) == 1
    assert "invalid choice: 'onxx'" in capsys.readouterr().err


def test_layers_whose_weight_timm_reads_past_them_are_refused(tmp_path: Path) -> None:
    backbone, _ = make("beit-shared")
    with pytest.raises(ConfigError, match="takes LoRA on proj, fc1 and fc2 there"):
        export_peft(TunedModel(backbone, 3, [{"name": "lora", "targets": ["q"]}]), tmp_path)
    assert export_peft(TunedModel(make("beit-shared")[0], 3, [{"name": "lora", "targets": ["proj"]}]), tmp_path)
