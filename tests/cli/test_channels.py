"""A task of twelve channels from the command line: from its files to everything that follows, and back."""

from __future__ import annotations

import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image

import vpt as package
from vpt.backbones import mixup
from vpt.models import load_classifier
from vpt.models.prediction import Prediction
from vpt.tasks import classification

from .conftest import CONFIGS, QUICK, SMALL, Run, Vpt

CHANNELS = 12


def field(kind: int, place: int) -> NDArray[np.uint16]:
    """Rows of one channel rise and fall; which channel that is, is the class."""
    random = np.random.default_rng([kind, place])
    pixels = random.uniform(500, 3000, (CHANNELS, 1, 1)) + random.normal(0, 100, (CHANNELS, 40, 40))
    pixels[4 * kind] += 2000 * np.sin(np.arange(40) / 3)[:, None]
    return pixels.clip(0, 65535).astype(np.uint16)


@pytest.fixture
def fields(tmp_path: Path) -> list[str]:
    """Images of three classes in files of two kinds, where tifffile is installed, and the config of the task."""
    tifffile: Any = import_module("tifffile") if find_spec("tifffile") else None
    for kind, name in enumerate(("maize", "rape", "wheat")):
        folder = tmp_path / "fields" / name
        folder.mkdir(parents=True)
        for place in range(12):
            if place % 2 or tifffile is None:
                np.save(folder / f"{place}.npy", field(kind, place))
            else:
                tifffile.imwrite(folder / f"{place}.tif", field(kind, place), photometric="minisblack")
    config = {
        "seed_everything": 0,
        "model": {
            "class_path": "DeltaTuning",
            "init_args": {"backbone": "vit_nano_patch8_64", "deltas": [{"name": "prompt", "num_tokens": 3}]},
        },
        "data": {
            "class_path": "FolderDataModule",
            "init_args": {"root": str(tmp_path / "fields"), "channels": CHANNELS},
        },
    }
    (tmp_path / "fields.yaml").write_text(yaml.safe_dump(config))
    return ["-c", str(tmp_path / "fields.yaml")]


@pytest.mark.filterwarnings("default:Corruptions are of 8-bit")
def test_a_task_of_channels_goes_from_fit_to_everything_that_follows(vpt: Vpt, fields: list[str]) -> None:
    assert vpt("fit", *fields, *SMALL, *QUICK).status == 0
    run = Run(Path("runs/fields/prompt/version_0").resolve())
    delta = str(run.folder / "delta.safetensors")
    assert run.record["data"]["channels"] == CHANNELS
    statistics = run.record["hyperparameters"]["normalization"]
    assert len(statistics["mean"]) == len(statistics["std"]) == CHANNELS
    assert 500 < min(statistics["mean"]) < max(statistics["mean"]) < 3000
    assert (run.folder / "figures" / "attention.png").is_file()
    assert vpt("test", *run.config, "--ckpt_path", run.checkpoint, *SMALL).status == 0
    assert vpt("attention", "--delta", delta, "--kind", "compare", "mass", "--out=pictures").status == 0
    answer = vpt("robustness", "run", "--delta", delta, "--alphas", "0", "1")
    assert answer.status == 0, answer.err
    assert "Corruptions are of 8-bit colours, and fields has 12 channels: none are made." in answer.err
    assert vpt("profile", "--run", str(run.folder)).status == 0
    assert vpt("calibrate", "--delta", delta).status == 0
    model = load_classifier(Path(delta))
    images = model.backbone.random_images(2)
    assert images.dtype == torch.float32
    assert vpt("export", "--delta", delta, "--format", "torch", "--out=model.pt2").status == 0
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load("model.pt2").module()(images), model(images), rtol=1e-4, atol=1e-4)
    answer = vpt("predict", "--delta", delta, "--images", "fields/rape", "--page=page", "--out=answers.csv")
    assert answer.status == 0, answer.err
    assert len(Path("answers.csv").read_text().splitlines()) == 13
    assert "data:image" in Path("page/index.html").read_text(encoding="utf-8")
    found = model.predict(np.load("fields/rape/1.npy").transpose(1, 2, 0))
    assert isinstance(found, Prediction)
    assert f"{found.probability:.6f}" in Path("answers.csv").read_text()


def test_what_a_model_learned_of_channels_counts_for_other_images(vpt: Vpt, fields: list[str], tmp_path: Path) -> None:
    """Its statistics are those of its own training images, whatever it is tested on."""
    assert vpt("fit", *fields, *SMALL, *QUICK).status == 0
    run = Run(Path("runs/fields/prompt/version_0").resolve())
    for file in (tmp_path / "fields").rglob("*.npy"):
        np.save(file, np.load(file) + 1000)
    answer = vpt("test", *run.config, "--ckpt_path", run.checkpoint, *SMALL)
    assert answer.status == 0, answer.err
    given = {"mean": [1500.0] * CHANNELS, "std": [400.0] * CHANNELS}
    answer = vpt("fit", *fields, *SMALL, *QUICK, "--model.normalization", json.dumps(given))
    assert answer.status == 0, answer.err
    again = Run(Path("runs/fields/prompt/version_1").resolve())
    assert again.record["hyperparameters"]["normalization"] == given


@pytest.mark.parametrize("delta", ["prompt_pad", "sidetune", "ssf"])
def test_deltas_of_pixels_are_of_all_channels(vpt: Vpt, fields: list[str], delta: str) -> None:
    answer = vpt("fit", *fields, *SMALL, *QUICK, "--model.deltas", json.dumps([{"name": delta}]))
    assert answer.status == 0, answer.err
    run = Run(Path(f"runs/fields/{delta}/version_0").resolve())
    model = package.load(run.folder / "delta.safetensors")
    assert model.backbone.input_shape == (CHANNELS, 64, 64)


def test_a_sweep_and_a_probe_take_channels(vpt: Vpt, fields: list[str], tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(yaml.safe_dump({"grid": {"model.base_lr": [0.1, 0.2]}}))
    answer = vpt("sweep", *fields, "--grid", str(grid), "--seeds", "0", "--serial", "--out=swept",
                 "--model.init_head=probe", *SMALL, *QUICK[:1])  # fmt: skip
    assert answer.status == 0, answer.err
    assert len(json.loads(Path("swept/sweep.json").read_text())["tried"]) == 2


@pytest.mark.filterwarnings("default:Corruptions are of 8-bit")
def test_the_method_for_a_folder_of_channels_is_found(vpt: Vpt, fields: list[str]) -> None:
    nano = ["--backbone=vit_nano_patch8_64", "--weights=pretrained"]
    answer = vpt("tune", "fields", "--minutes=0.5", *nano, "--out=tuned", f"--data.channels={CHANNELS}")
    assert answer.status == 0, answer.err
    assert package.load("tuned/model.safetensors").backbone.input_shape == (CHANNELS, 64, 64)
    assert "data:image" in Path("tuned/report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--data.channels=13"], "it has shape (12, 40, 40), and no 13 channels"),
        (["--data.channels=[3, 12]"], "it has 12 channels, of which none is number 12"),
        (["--data.channels=0"], "channels must be a whole number of at least 1, got 0"),
        (["--data.augment=photos"], "fills in colours of 8 bits"),
        (["--model.normalization=imagenet"], "but the data 'fields' have 12 channels: give mean and std of each"),
        (['--model.normalization={"mean": [1.0], "std": [1.0]}'], "have 12 channels: give mean and std of each"),
    ],
)
def test_what_does_not_fit_is_said(vpt: Vpt, fields: list[str], flags: list[str], sentence: str) -> None:
    answer = vpt("fit", *fields, *SMALL, *QUICK, *flags)
    assert answer.status != 0
    assert sentence in answer.sentence


@pytest.mark.parametrize("order", ["[1, 0, 4]", "12"])
def test_another_choice_of_channels_is_not_tested_on(vpt: Vpt, fields: list[str], order: str) -> None:
    chosen = ["--data.channels=[0, 4, 1]"]
    assert vpt("fit", *fields, *SMALL, *QUICK, *chosen).status == 0
    run = Run(Path("runs/fields/prompt/version_0").resolve())
    assert vpt("test", *run.config, "--ckpt_path", run.checkpoint, *SMALL).status == 0
    answer = vpt("test", *run.config, "--ckpt_path", run.checkpoint, *SMALL, f"--data.channels={order}")
    assert answer.status != 0
    assert "was trained on channels [0, 4, 1]" in answer.sentence or "have 12 channels" in answer.sentence


def test_mixed_images_keep_their_unit(vpt: Vpt, fields: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    plain = mixup.mix

    def mix(*args: Any) -> Any:
        image, target = plain(*args)
        seen.append(float(image.mean()))
        return image, target

    monkeypatch.setattr(classification, "mix", mix)
    assert vpt("fit", *fields, *SMALL, *QUICK, "--model.cutmix=1.0").status == 0
    assert all(1000 < value < 2500 for value in seen)


def test_tasks_of_channels_are_trained_together_by_one_normalization(vpt: Vpt, fields: list[str]) -> None:
    for name in ("one", "other"):
        Path(f"{name}.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"batch_size": 4}}}))
    tasks = ["--tasks", "one.yaml", "other.yaml", "--seeds", "0", "--serial"]
    answer = vpt("pretrain", *fields, *tasks, *SMALL, *QUICK[:1], "--out=shared")
    assert "give model.normalization" in answer.sentence
    given = json.dumps({"mean": [1500.0] * CHANNELS, "std": [400.0] * CHANNELS})
    answer = vpt("pretrain", *fields, *tasks, *SMALL, *QUICK[:1], "--out=shared", f"--model.normalization={given}")
    assert answer.status == 0, answer.err


def test_data_without_files_of_channels_have_none(vpt: Vpt) -> None:
    answer = vpt("fit", "-c", str(CONFIGS / "demo.yaml"), *QUICK, "--data.channels=[2, 1, 0]")
    assert answer.status != 0
    assert "channels" in answer.sentence


def test_colours_are_no_channels(vpt: Vpt, fields: list[str]) -> None:
    assert vpt("fit", *fields, *SMALL, *QUICK).status == 0
    delta = "runs/fields/prompt/version_0/delta.safetensors"
    Image.fromarray(np.zeros((50, 80, 3), np.uint8)).save("photo.png")
    answer = vpt("predict", "--delta", delta, "--images", "photo.png", "--out=answers.csv")
    assert answer.status != 0
    assert "it has 3 channels, not 12" in Path("answers.csv").read_text()
