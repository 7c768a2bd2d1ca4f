"""Every shipped config of FGVC and ImageNet, run on generated data in the official layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.fakes_suites import make_fgvc, make_imagenet

from .conftest import CONFIGS, Vpt

FGVC = sorted((CONFIGS / "fgvc").glob("*.yaml"))
TRAINED = CONFIGS / "imagenet" / "imagenet_1k.yaml"
OVERLAYS = sorted(set((CONFIGS / "imagenet").glob("*.yaml")) - {TRAINED})
SMALL = ["--model.backbone=vit_nano_patch8_64", "--data.image_size=64", "--data.batch_size=2",
         "--data.allow_partial=true", "--trainer.fast_dev_run=true"]  # fmt: skip


@pytest.mark.parametrize("config", FGVC, ids=lambda path: path.stem)
def test_every_fgvc_config_trains(vpt: Vpt, tmp_path: Path, config: Path) -> None:
    make_fgvc(tmp_path / "data", config.stem)
    answer = vpt("fit", "-c", str(config), "--data.root", str(tmp_path / "data"), *SMALL)
    assert answer.status == 0, answer.err


def test_the_imagenet_config_trains(vpt: Vpt, tmp_path: Path) -> None:
    make_imagenet(tmp_path / "data", "imagenet_1k")
    make_imagenet(tmp_path / "data", "imagenet_r")
    shifts = "--data.shifts=[imagenet_r]"
    answer = vpt(
        "fit", "-c", str(TRAINED), "--data.root", str(tmp_path / "data"), "--data.num_workers=0", shifts, *SMALL
    )
    assert answer.status == 0, answer.err


@pytest.mark.parametrize("config", OVERLAYS, ids=lambda path: path.stem)
def test_every_imagenet_overlay_is_tested_on_and_not_trained_on(vpt: Vpt, tmp_path: Path, config: Path) -> None:
    make_imagenet(tmp_path / "data", config.stem)
    args = [
        "-c",
        str(TRAINED),
        "-c",
        str(config),
        "--data.root",
        str(tmp_path / "data"),
        "--data.num_workers=0",
        *SMALL,
    ]
    answer = vpt("test", *args)
    assert answer.status == 0, answer.err
    why = "must never be trained on" if config.stem == "objectnet" else "is a test set"
    assert why in vpt("fit", *args).sentence


def test_each_suite_has_a_config_a_dataset() -> None:
    assert [path.stem for path in FGVC] == [
        "cub_200_2011",
        "nabirds",
        "oxford_flowers",
        "stanford_cars",
        "stanford_dogs",
    ]
    assert len(OVERLAYS) == 6
    lengths = {path.stem: yaml.safe_load(path.read_text())["model"]["init_args"]["num_tokens"] for path in FGVC}
    assert lengths == {
        "cub_200_2011": 10, "nabirds": 50, "oxford_flowers": 5, "stanford_dogs": 100, "stanford_cars": 200,
    }  # fmt: skip


def test_a_partial_copy_is_named_in_the_record_of_the_run(vpt: Vpt, tmp_path: Path) -> None:
    make_fgvc(tmp_path / "data", "oxford_flowers")
    config = CONFIGS / "fgvc" / "oxford_flowers.yaml"
    args = ["fit", "-c", str(config), "--data.root", str(tmp_path / "data"), *SMALL[:3], "--trainer.max_epochs=1",
            "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"]  # fmt: skip
    assert "found 3 classes, expected 102" in vpt(*args).sentence
    answer = vpt(*args, "--data.allow_partial=true")
    assert answer.status == 0, answer.err
    record = json.loads(next(Path("runs").rglob("run.json")).read_text())["data"]
    assert (record["partial"], record["complete"], record["counts"]["test"]) == (True, False, 12)
