"""Segmentation from the command line: every shipped config, from fit to test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.fakes_suites import make_pets
from vpt.models.delta_file import load_segmentation

from .conftest import CONFIGS, DEMO, QUICK, SMALL, Run, Vpt

FOLDER = CONFIGS / "segmentation"
SHAPES = ["-c", str(FOLDER / "shapes.yaml")]
OVERLAYS = {"frozen": "frozen", "vpt_deep": "prompt", "full": "full"}


def test_every_config_of_the_folder_is_tested_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {"shapes", "pets", *OVERLAYS}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_method_goes_from_fit_to_test_and_records_its_miou(vpt: Vpt, overlay: str) -> None:
    answer = vpt("fit", *SHAPES, "-c", str(FOLDER / f"{overlay}.yaml"), *SMALL, *QUICK)
    assert answer.status == 0, answer.err
    run = Run(Path(f"runs/shape_scenes/{OVERLAYS[overlay]}/version_0").resolve())
    answer = vpt("test", *run.config, "--ckpt_path", run.checkpoint, *SMALL)
    assert answer.status == 0, answer.err
    metrics = run.record["metrics"]
    assert f"test/miou       {100 * metrics['test/miou']:.1f} %" in answer.out
    assert "IoU by class" in answer.out
    assert f"written to {run.folder}/run.json" in answer.out
    assert (metrics["val/n"], metrics["test/n"]) == (16, 16)
    assert all(0 <= metrics[f"{split}/{key}"] <= 1 for split in ("val", "test") for key in ("miou", "pixel_acc"))
    assert "test/iou/background" in metrics
    assert run.record["task"] == "SegmentationTask"
    assert run.record["data"]["counts"]["test"] == 1000
    model = load_segmentation(run.folder / "delta.safetensors")
    assert model.class_names == ["background", "circle", "square", "triangle", "star"]
    assert model.info["metrics"]["val/miou"] == metrics["val/miou"]
    assert (run.folder / "figures" / "segmentation.png").is_file()


def test_predict_writes_a_mask_per_image(vpt: Vpt) -> None:
    assert vpt("fit", *SHAPES, *SMALL, *QUICK).status == 0
    run = Run(Path("runs/shape_scenes/prompt/version_0").resolve())
    answer = vpt("predict", *run.config, "--ckpt_path", run.checkpoint, "--data.batch_size=4",
                 "--trainer.limit_predict_batches=2")  # fmt: skip
    assert answer.status == 0, answer.err
    assert answer.out.splitlines()[-1] == f"written to {run.folder / 'predictions-partial'}"
    files = sorted((run.folder / "predictions-partial").iterdir())
    assert [file.name for file in files] == [f"{index:06d}.png" for index in range(8)]
    mask = np.asarray(Image.open(files[0]))
    assert mask.shape == (64, 64)
    assert mask.dtype == np.uint8
    assert mask.max() < 5


def test_the_pets_train_from_their_config(vpt: Vpt, tmp_path: Path) -> None:
    make_pets(tmp_path / "data")
    answer = vpt("fit", "-c", str(FOLDER / "pets.yaml"), "--data.root", str(tmp_path / "data"), "--data.batch_size=2",
                 "--data.allow_partial=true", "--model.weights=random", "--trainer.fast_dev_run=true")  # fmt: skip
    assert answer.status == 0, answer.err


def test_pets_that_are_not_there_are_one_sentence_and_the_tree(vpt: Vpt, tmp_path: Path) -> None:
    answer = vpt("fit", "-c", str(FOLDER / "pets.yaml"), "--data.root", str(tmp_path / "nowhere"))
    assert answer.status == 1
    assert "nowhere does not exist; set VPT_DATA or the root" in answer.err
    assert "Traceback" not in answer.err


def test_a_classifier_on_masks_is_refused(vpt: Vpt) -> None:
    config = yaml.safe_load((FOLDER / "shapes.yaml").read_text())["data"]
    Path("data.yaml").write_text(yaml.safe_dump({"data": config}))
    assert "have masks and no labels: use SegmentationTask" in vpt("fit", *DEMO, "-c", "data.yaml", *QUICK).sentence


def test_a_segmentation_run_is_no_classifier_for_other_commands(vpt: Vpt) -> None:
    assert vpt("fit", *SHAPES, *SMALL, *QUICK).status == 0
    delta = "runs/shape_scenes/prompt/version_0/delta.safetensors"
    for command in (["attention"], ["export", "--format", "onnx"], ["push", "--repo", "ann/shapes"]):
        assert "holds a segmentation model, and a classifier is needed here" in vpt(*command, "--delta", delta).sentence
