"""Images that are not square, from the command line: twice as wide as high, and back from the files that are left."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

import vpt as package
from vpt.backbones import Backbone
from vpt.models.segmenter import feature_map

from .conftest import CONFIGS, QUICK, SMALL, Run, Vpt

SIZE = [32, 64]
SHAPES = ["-c", str(CONFIGS / "local" / "shapes.yaml"), "-c", str(CONFIGS / "method" / "vpt_deep.yaml")]


@pytest.fixture
def wide(tmp_path: Path) -> list[str]:
    """An overlay of the size."""
    file = tmp_path / "wide.yaml"
    file.write_text(yaml.safe_dump({"data": {"init_args": {"image_size": SIZE}}}))
    return ["-c", str(file)]


def test_a_wide_task_goes_from_fit_to_everything_that_follows(vpt: Vpt, wide: list[str]) -> None:
    assert vpt("fit", *SHAPES, *wide, *SMALL, *QUICK).status == 0
    run = Run(Path("runs/shapes_x_position/vpt_deep/version_0").resolve())
    delta = str(run.folder / "delta.safetensors")
    assert run.record["data"]["image_size"] == SIZE
    assert vpt("test", *run.config, "--ckpt_path", run.checkpoint, *SMALL).status == 0
    assert vpt("attention", "--delta", delta, "--kind", "rollout", "mass", "--out=pictures").status == 0
    assert Path("pictures/rollout.png").is_file()
    robust = ["--max-images=4", "--severities=3", "--alphas", "0", "1", "--corruptions", "fog"]
    answer = vpt("robustness", "run", "--delta", delta, *robust)
    assert answer.status == 0, answer.err
    assert vpt("robustness", "report", str(run.folder / "robustness"), "--out=report").status == 0
    assert "32x64 px" in Path("report/report.md").read_text(encoding="utf-8")
    assert vpt("export", "--delta", delta, "--format", "torch", "--out=model.pt2").status == 0
    program = torch.export.load("model.pt2").module()
    model = package.load(delta)
    pixels = torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(program(pixels), model(pixels), rtol=1e-4, atol=1e-4)
    assert model.backbone.image_size == (32, 64)
    Image.fromarray(np.zeros((50, 80, 3), np.uint8)).save("photo.png")
    answer = vpt("predict", "--delta", delta, "--images", "photo.png", "--out=answers.csv")
    assert answer.status == 0, answer.err
    assert len(Path("answers.csv").read_text().splitlines()) == 2
    assert vpt("runs", "runs").status == 0


def test_what_is_printed_is_what_runs(vpt: Vpt, wide: list[str]) -> None:
    printed = vpt("fit", *SHAPES, *wide, "--print_config")
    assert yaml.safe_load(printed.out)["data"]["init_args"]["image_size"] == SIZE
    by_flag = vpt("fit", *SHAPES, "--data.image_size", json.dumps(SIZE), "--print_config")
    assert yaml.safe_load(by_flag.out)["data"] == yaml.safe_load(printed.out)["data"]


def test_a_sweep_keeps_features_of_wide_images(vpt: Vpt, tmp_path: Path) -> None:
    overlay = tmp_path / "wide.yaml"
    overlay.write_text(yaml.safe_dump({"data": {"init_args": {"image_size": SIZE}}}))
    linear = ["-c", str(CONFIGS / "local" / "shapes.yaml"), "-c", str(CONFIGS / "method" / "linear.yaml")]
    grid = tmp_path / "grid.yaml"
    grid.write_text(yaml.safe_dump({"grid": {"model.base_lr": [0.1, 0.2]}, "choose": {"data.train": "train800"}}))
    answer = vpt("sweep", *linear, "-c", str(overlay), "--grid", str(grid), "--seeds", "0", "--serial", "--out=swept",
                 *SMALL, *QUICK[:1])  # fmt: skip
    assert answer.status == 0, answer.err
    assert "failed" not in Path("swept/sweep.json").read_text()[:-400]
    assert len(json.loads(Path("swept/sweep.json").read_text())["tried"]) == 2


def test_masks_have_the_shape_of_their_images(vpt: Vpt, wide: list[str]) -> None:
    shapes = ["-c", str(CONFIGS / "segmentation" / "shapes.yaml")]
    assert vpt("fit", *shapes, *wide, *SMALL, *QUICK).status == 0
    run = Run(Path("runs/shape_scenes/prompt/version_0").resolve())
    assert vpt("test", *run.config, "--ckpt_path", run.checkpoint, *SMALL).status == 0
    answer = vpt("predict", *run.config, "--ckpt_path", run.checkpoint, "--data.batch_size=2",
                 "--trainer.limit_predict_batches=1")  # fmt: skip
    assert answer.status == 0, answer.err
    mask = np.asarray(Image.open(next((run.folder / "predictions-partial").iterdir())))
    assert mask.shape == (32, 64)


@pytest.mark.parametrize(
    ("size", "part"),
    [
        ("[32, 60]", "image_size 32x60 is no whole number of vit_nano_patch8_64's patches of 8 pixels"),
        ("[32]", "image_size must be a whole number of pixels from 1 to 8192, or [height, width] of such, got [32]"),
        ("[0, 64]", "got [0, 64]"),
        ("wide", "image_size"),
    ],
)
def test_sizes_that_are_none_are_one_sentence(vpt: Vpt, size: str, part: str) -> None:
    answer = vpt("fit", *SHAPES, "--data.image_size", size, *SMALL, *QUICK)
    assert part in answer.sentence
    assert not Path("runs").exists()


def test_weights_of_images_that_are_not_square_have_a_map_of_their_shape() -> None:
    options = {"img_size": (64, 48), "embed_dim": 24, "depth": 2, "num_heads": 2, "num_kv_heads": 2}
    model = timm.create_model("vit_base_patch16_sapiens2", num_classes=0, **options)
    backbone = Backbone(model, "vit_base_patch16_sapiens2", "random", "random", (64, 48), "none")
    assert feature_map(backbone, torch.rand(1, 3, 64, 48)).shape == (1, 24, 4, 3)
