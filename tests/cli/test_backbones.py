"""Every backbone overlay runs from fit to a loaded delta, at random weights kept in a file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from tests.fakes import make_task
from vpt.backbones import create_backbone
from vpt.backbones.support import model_names
from vpt.cli import main
from vpt.deltas import DELTAS
from vpt.models import load_classifier

from .conftest import CONFIGS, DEMO, QUICK, Vpt

WIDE = {"dinov3_l16", "siglip2_l16", "siglip2_so400m14"}  # which are what their narrow siblings are, for longer
WHOLE = {"vit_b16_in21k", "dinov3_b16", "swin_b"}  # one of each kind of block
OVERLAYS = sorted((CONFIGS / "backbone").glob("*.yaml"))
BACKBONES = [
    *(pytest.param(path, True, id=path.stem, marks=[pytest.mark.slow] * (path.stem in WIDE)) for path in OVERLAYS),
    *(
        pytest.param(path, False, id=f"{path.stem}-whole", marks=pytest.mark.slow)
        for path in OVERLAYS
        if path.stem in WHOLE
    ),
]
TWO = [f"--trainer.limit_{stage}_batches=2" for stage in ("train", "val", "test")]


def _shallow(name: str, **options: Any) -> Any:
    """What an overlay asks for differs in its blocks, not in their number: two of them are a sixth of the time."""
    blocks: dict[str, Any] = {"depths": (1, 1, 1, 1)} if "swin" in name else {"depth": 2}
    return timm.create_model(name, **options | ({} if "nano" in name else blocks))


@pytest.mark.parametrize(("overlay", "shallow"), BACKBONES)
def test_a_backbone_overlay_runs_from_fit_to_a_loaded_delta(
    vpt: Vpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlay: Path, shallow: bool
) -> None:
    if shallow:
        own = SimpleNamespace(**vars(timm) | {"create_model": _shallow})
        monkeypatch.setattr("vpt.backbones.checkpoints.timm", own)
    name = yaml.safe_load(overlay.read_text())["model"]["init_args"]["backbone"]
    weights = tmp_path / "weights.safetensors"
    save_file({k: t.half() for k, t in create_backbone(name, "random").model.state_dict().items()}, weights)
    make_task(tmp_path / "data" / "fake", classes=2)
    data = ["--data=VTABDataModule", "--data.task=fake", "--data.root=data", "--data.batch_size=2"]
    config = [*DEMO, "-c", str(overlay), "--model.weights", str(weights), *data, *TWO, *QUICK]
    answer = vpt("fit", *config, "--trainer.default_root_dir=runs")
    assert answer.status == 0, answer.err
    run = Path("runs/fake/vpt_deep/version_0")
    measured = ["-c", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints" / "last.ckpt"), *TWO]
    answer = vpt("test", *measured, "--data.batch_size=2")
    assert answer.status == 0, answer.err
    model = load_classifier(run / "delta.safetensors")
    with torch.no_grad():
        logits = model(torch.randint(0, 256, (1, *model.backbone.input_shape), dtype=torch.uint8))
    assert logits.shape == (1, 2)
    assert logits.isfinite().all()


def test_a_table_or_all_of_one_model(vpt: Vpt) -> None:
    answer = vpt("backbones", "vit_tiny*")
    assert answer.status == 0, answer.err
    assert max(map(len, answer.out.splitlines())) <= 80
    names = model_names("vit_tiny*")
    assert f"{len(names)} names" in answer.out
    one = vpt("backbones", "resnet18").out
    assert "resnet18.a1_in1k" in one
    assert "no prompts" in one
    few = vpt("backbones", "resnet18*", "--prompts")
    assert "0 names with 0 weights" in few.out
    assert "Unknown backbone of timm 'nosuch*'" in vpt("backbones", "nosuch*").sentence


def test_a_model_that_timm_runs_whole_goes_from_fit_to_test_without_a_map_of_attention(vpt: Vpt) -> None:
    coatnet = ["--model.backbone=test_coatnet", "--model.weights=random"]
    answer = vpt("fit", *DEMO, *coatnet, *QUICK, "--data.batch_size=4", *TWO)
    assert answer.status == 0, answer.err
    run = Path("runs/digits/vpt_deep/version_0")
    assert (run / "delta.safetensors").is_file()
    measured = ["-c", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints" / "last.ckpt"), *TWO]
    assert vpt("test", *measured).status == 0
    said = vpt("attention", "--delta", str(run / "delta.safetensors")).sentence
    assert "which tokens of test_coatnet lie where is not known (--kind share needs none)" in said
    assert (run / "figures" / "attention.png").is_file()  # the share of attention on prompts
    share = vpt("attention", "--delta", str(run / "delta.safetensors"), "--kind", "share", "--out=share.png")
    assert share.status == 0, share.err


def test_deltas_are_listed_with_their_sizes_on_a_backbone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deltas", "--backbone", "vit_nano_patch8_64"]) == 0
    printed = capsys.readouterr().out
    rows = {cells[0]: cells[1:3] for line in printed.splitlines() if (cells := line.strip("│ ").split("│"))[1:]}
    found = {name.strip(): [cell.strip() for cell in cells] for name, cells in rows.items()}
    width, layers = 192, 6
    assert found["prompt"] == [f"{10 * width * layers:,}", "costs"]
    assert found["lora"] == [f"{2 * 8 * 2 * width * layers:,}", "free"]
    assert found["linear"] == ["0", "free"]
    assert set(DELTAS) <= set(found)


def test_deltas_that_a_backbone_does_not_take_say_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deltas", "--backbone", "resnet10t"]) == 0
    printed = capsys.readouterr().out
    assert "not on resnet10t: prompt: resnet10t: Where ResNet attends is not known" in printed
    assert "│bias" in printed
