"""Statistics of training images' activations that a delta file carries for adapting at test time."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.robustness.fakes import PROMPTS, SIZE, kept, task, write_delta
from vpt.cli import main
from vpt.data import ImageDataModule
from vpt.errors import ConfigError, DataError, DeltaFileError
from vpt.models import load_classifier, save_delta
from vpt.models.delta_format import read_activations, read_calibration, read_delta
from vpt.models.delta_format import write_delta as write_delta_to
from vpt.robustness import logit_records, run
from vpt.robustness.activation_statistics import keep_statistics
from vpt.robustness.calibrate import calibrate

RECIPE: tuple[dict[str, Any], ...] = (*PROMPTS, {"name": "lora", "rank": 2})
OPTIONS: dict[str, Any] = {"alphas": (1.0,), "severities": (), "batch_size": 5, "seed": 3}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("statistics")


@pytest.fixture(scope="session")
def delta(folder: Path) -> Path:
    return write_delta(folder / "delta.safetensors", RECIPE)


@pytest.fixture(scope="session")
def carrying(folder: Path, delta: Path) -> Path:
    return keep_statistics(delta, task(), folder / "carrying.safetensors", seed=3)


def without_training_images() -> ImageDataModule:
    splits = {name: split for name, split in task()._splits.items() if name != "train"}
    return ImageDataModule("fake", task().class_names, splits, "square", SIZE, 4, 0, 0, "none", None)


def test_they_are_those_of_the_features_of_training_images(delta: Path, carrying: Path) -> None:
    model, seen = load_classifier(delta), list[torch.Tensor]()
    blocks = model.backbone.model.get_submodule("blocks")
    for block in blocks.children():
        block.register_forward_hook(lambda module, args, out: seen.append(out[:, 0]))
    with torch.no_grad():
        pooled = model.encode(task().split("train").batch(range(6))["image"])
    found = read_activations(carrying)
    assert found is not None
    tokens = torch.stack(seen).double()
    torch.testing.assert_close(found.tensors["mean"].double(), tokens.mean(dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.tensors["std"].double(), tokens.std(dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.tensors["pooled"], pooled.mean(dim=0), rtol=1e-4, atol=1e-5)
    assert found.about["images"] == 6
    assert carrying.stat().st_size - delta.stat().st_size < 4 * sum(t.numel() for t in found.tensors.values()) + 2000


@pytest.mark.parametrize("method", ["foa", "fozo"])
def test_adaptation_needs_no_training_images_and_answers_the_same(
    method: Any, delta: Path, carrying: Path, tmp_path: Path
) -> None:
    run(delta, task(), out=tmp_path / "measured", adapt=method, **OPTIONS)
    run(carrying, without_training_images(), out=tmp_path / "carried", adapt=method, **OPTIONS)
    measured, carried = (
        logit_records.read(kept(tmp_path / name, "clean-alpha-1.0")) for name in ("measured", "carried")
    )
    np.testing.assert_array_equal(measured.logits, carried.logits)
    assert "source" not in measured.protocol["adapt"]
    about = carried.protocol["adapt"]["source"]
    assert about == {"images": 6, "seed": 3, "data": {"name": "fake", "fingerprint": task().fingerprint("train")}}
    with pytest.raises(DataError, match="have no train images"):
        run(delta, without_training_images(), out=tmp_path / "none", adapt=method, **OPTIONS)


def test_other_strengths_are_measured_anew(carrying: Path, tmp_path: Path) -> None:
    run(carrying, task(), out=tmp_path / "weak", adapt="fozo", strengths=[0.5, 1.0], **OPTIONS)
    assert "source" not in logit_records.read(kept(tmp_path / "weak", "clean-alpha-1.0")).protocol["adapt"]
    with pytest.raises(DataError, match="have no train images"):
        run(carrying, without_training_images(), out=tmp_path / "no", adapt="fozo", strengths=[0.5, 1.0], **OPTIONS)


def test_statistics_of_another_model_are_refused(delta: Path, carrying: Path, folder: Path, tmp_path: Path) -> None:
    kept = read_activations(carrying)
    other = write_delta(folder / "other.safetensors", RECIPE, seed=5)
    with pytest.raises(DeltaFileError, match="are of another backbone, other deltas or preprocessing"):
        write_delta_to(tmp_path / "mixed.safetensors", *read_delta(other), activations=kept)
    header, tensors = read_delta(carrying)
    mixed = tmp_path / "mixed.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vpt.models.delta_format.check_activations", lambda *args: None)
        write_delta_to(mixed, header, tensors | {"head.bias": tensors["head.bias"] + 1}, activations=kept)
    with pytest.raises(DeltaFileError, match="`vpt robustness statistics` anew"):
        run(mixed, task(), out=tmp_path / "out", adapt="foa", **OPTIONS)
    with pytest.raises(DeltaFileError, match="of another backbone"):
        load_classifier(mixed)


def test_they_stay_with_the_model_and_with_its_calibration(delta: Path, carrying: Path, tmp_path: Path) -> None:
    model = load_classifier(carrying)
    again = save_delta(tmp_path / "again.safetensors", model)
    assert read_delta(again)[0]["activations"] == read_delta(carrying)[0]["activations"]
    calibrate(carrying, task(), tmp_path / "both.safetensors", unknown="knn")
    last = keep_statistics(tmp_path / "both.safetensors", task(), tmp_path / "last.safetensors", seed=3)
    one, other = read_activations(carrying), read_activations(last)
    assert read_activations(tmp_path / "both.safetensors") is not None
    assert read_calibration(last) is not None
    assert one is not None
    assert other is not None
    assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    assert read_activations(delta) is None  # a file without them is as it was
    assert load_classifier(delta).activations is None


def test_a_file_is_never_written_over(delta: Path, carrying: Path) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        keep_statistics(delta, task(), carrying)


def test_the_command_writes_a_file_that_adapts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = ["path,label,split"]
    for place, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (18, SIZE, SIZE, 3), dtype=np.uint8)):
        part, name = ("train", "val", "test")[place % 3], "ab"[place % 2]
        (tmp_path / part).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / part / f"{place}.png")
        rows.append(f"{part}/{place}.png,{name},{part}")
    (tmp_path / "photos.csv").write_text("\n".join(rows))
    model = ["--model.class_path=PromptTuning", "--model.backbone=vit_nano_patch8_64", "--model.num_tokens=2"]
    data = ["--data.class_path=FolderDataModule", "--data.root=photos.csv", "--data.image_size=64"]
    trainer = ["--trainer.max_epochs=1", "--trainer.default_root_dir=run", "--seed_everything=0"]
    assert main(["fit", *model, *data, *trainer]) == 0
    (own,) = tmp_path.glob("run/**/delta.safetensors")
    out = own.with_name("carrying.safetensors")
    assert main(["robustness", "statistics", "--delta", str(own), "--out", str(out)]) == 0
    shutil.rmtree(tmp_path / "train")
    adapt = ["--severities", "--batch-size=3", "--adapt=foa"]
    monkeypatch.setenv("VPT_CACHE", str(tmp_path / "an empty cache"))
    capsys.readouterr()
    assert main(["robustness", "run", "--delta", str(own), *adapt, "--out=none"]) == 1
    assert "train/0.png" in capsys.readouterr().err
    assert main(["robustness", "run", "--delta", str(out), *adapt, "--out=carried"]) == 0
    assert "written to carried" in capsys.readouterr().out
