"""`vpt calibrate`, `vpt predict --delta` and `vpt embed`, as a user types them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import vpt as package
from tests.fakes import make_folder
from vpt.cli import main
from vpt.models import TunedModel
from vpt.models.prediction import Prediction

from .conftest import CONFIGS, QUICK, Run, Vpt


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An exact linear probe on digits whose validation images are not trained on, calibrated."""
    root = tmp_path_factory.mktemp("run")
    config = ["-c", str(CONFIGS / "demo.yaml"), "-c", str(CONFIGS / "method" / "linear.yaml")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "0")
        assert main(["fit", *config, "--data.train=train800", *QUICK, f"--trainer.default_root_dir={root}"]) == 0
        found = Run(next((root / "digits").glob("*/version_0")))
        assert main(["calibrate", "--delta", str(found.folder / "delta.safetensors"), "--test"]) == 0
    return found


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(5):
        pixels = random.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number} ü.png")
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_calibration_keeps_its_promises_and_says_on_how_many_images(run: Run) -> None:
    told = json.loads((run.folder / "calibrated.json").read_text())
    assert told["data"]["images"] == 200
    assert told["data"]["training_images"] == 800
    assert told["test"]["coverage_lac"]["0.9"]["covered"][2] > 0.9
    assert told["test"]["false_alarms"]["0.05"]["unknown"][1] < 0.05
    before = package.load(run.folder / "delta.safetensors")
    after = package.load(run.folder / "calibrated.safetensors")
    images = np.zeros((2, 70, 70, 3), np.uint8)
    assert isinstance(before, TunedModel)
    assert isinstance(after, TunedModel)
    assert (before.embed(images) == after.embed(images)).all()


def test_photos_are_classified_as_in_python(vpt: Vpt, run: Run, photos: Path, tmp_path: Path) -> None:
    delta = str(run.folder / "calibrated.safetensors")
    asked = ["--top", "3", "--coverage", "0.9", "--max-risk", "0.3", "--false-alarms", "0.05"]
    answer = vpt("predict", "--delta", delta, "--images", str(photos), "--out", "found.csv", *asked, "--page", "page")
    assert answer.status == 0, answer.err
    model = package.load(delta)
    assert isinstance(model, TunedModel)
    expected = model.predict(photos, 3, 0.3, 0.9, false_alarms=0.05)
    assert isinstance(expected, list)
    for row, each in zip(rows(tmp_path / "found.csv"), expected, strict=True):
        assert isinstance(each, Prediction)
        assert (row["path"], row["class"], row["declined"], row["error"]) == (each.path, each.label, each.declined, "")
        assert float(row["probability"]) == pytest.approx(each.probability, abs=1e-6)
        assert row["set"].split("|") == list(each.classes or ())
        name, share = each.top[2]
        assert row["class_3"] == name
        assert float(row["probability_3"]) == pytest.approx(share, abs=1e-6)
    page = (tmp_path / "page" / "index.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 5
    assert "5 images" in page


def test_compiled_predictions_are_the_same(
    vpt: Vpt, run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []

    def compile_for(model: TunedModel, device: torch.device) -> None:
        compiled.append(device.type)
        model.compile(backend="eager")

    monkeypatch.setattr("vpt.backbones.compilation.compile_for", compile_for)
    told = []
    for place, flags in enumerate(([], ["--compile"])):
        out = tmp_path / f"{place}.csv"
        base = ["predict", "--delta", str(run.folder / "delta.safetensors"), "--images", str(photos), "--out", str(out)]
        assert vpt(*base, *flags).status == 0
        told.append(rows(out))
    assert compiled == ["cuda" if torch.cuda.is_available() else "cpu"]
    for eager, own in zip(*told, strict=True):
        assert own["class"] == eager["class"]
        assert float(own["probability"]) == pytest.approx(float(eager["probability"]), abs=1e-4)


def test_the_forms_of_a_table_say_the_same(vpt: Vpt, run: Run, photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "list.csv"
    table.write_text("path,other\n" + "".join(f"photos/{path.name},x\n" for path in sorted(photos.iterdir())))
    delta = str(run.folder / "delta.safetensors")
    for name in ("a.csv", "a.parquet", "a.jsonl"):
        assert vpt("predict", "--delta", delta, "--images", str(table), "--out", name).status == 0
    plain = rows(tmp_path / "a.csv")
    assert list(plain[0]) == ["path", "class", "probability", "error"]
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    columns = pd.read_parquet(tmp_path / "a.parquet")
    assert columns["probability"].tolist() == [line["probability"] for line in lines]
    assert [row["class"] for row in plain] == columns["class"].tolist() == [line["class"] for line in lines]


def test_a_damaged_photo_is_a_row_and_the_status_says_so(vpt: Vpt, run: Run, photos: Path, tmp_path: Path) -> None:
    (photos / "2 ü.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    delta = str(run.folder / "delta.safetensors")
    for command in ("predict", "embed"):
        out = f"{command}.csv"
        answer = vpt(command, "--delta", delta, "--images", str(photos), "--out", out)
        assert answer.sentence.startswith("1 of 5 images could not be read")
        found = rows(tmp_path / out)
        assert len(found) == 5
        assert [bool(row["error"]) for row in found] == [False, False, True, False, False]
    assert found[2]["feature_0"] == ""


def test_features_are_those_of_python(vpt: Vpt, run: Run, photos: Path, tmp_path: Path) -> None:
    delta = str(run.folder / "delta.safetensors")
    assert vpt("embed", "--delta", delta, "--images", str(photos), "--out", "features.parquet").status == 0
    found = pd.read_parquet(tmp_path / "features.parquet")
    model = package.load(delta)
    assert isinstance(model, TunedModel)
    np.testing.assert_array_equal(found.filter(like="feature_").to_numpy(), model.embed(photos))


@pytest.mark.parametrize("flags", [[], ["--calibrate"]], ids=["all", "calibrated"])
@pytest.mark.parametrize("counts", [{"train": 8}, {"train": 8, "test": 4}], ids=["untested", "tested"])
def test_a_folder_becomes_a_model_and_a_page(
    vpt: Vpt, tmp_path: Path, flags: list[str], counts: dict[str, int]
) -> None:
    make_folder(tmp_path / "pets", counts)
    command = ["tune", "pets", "--minutes", "0.5", "--backbone", "vit_nano_patch8_64", "--out", "tuned", *flags]
    answer = vpt(*command)
    assert answer.status == 0, answer.err
    assert {"model.safetensors", "report.html", "config.yaml"} <= {path.name for path in (tmp_path / "tuned").iterdir()}
    model = package.load("tuned/model.safetensors")
    assert isinstance(model, TunedModel)
    assert (model.calibration is None) == (not flags)
    assert "repeat it: vpt rerun tuned/" in answer.out
    assert vpt(*command).sentence.startswith("tuned is not empty: --resume")
    assert vpt(*command, "--resume").status == 0


def test_what_was_trained_on_calibrates_nothing(vpt: Vpt, trained: Run) -> None:
    answer = vpt("calibrate", "--delta", str(trained.folder / "delta.safetensors"), "--out", "c.safetensors")
    assert "were trained on" in answer.sentence


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_shards_join_to_the_table_of_one_process(vpt: Vpt, run: Run, photos: Path, tmp_path: Path, suffix: str) -> None:
    (photos / "2 broken.png").write_bytes(b"no image")
    delta = ["--delta", str(run.folder / "calibrated.safetensors"), "--images", str(photos), "--batch-size", "2"]
    asked = [*delta, "--top", "2", "--coverage", "0.9", "--max-risk", "0.3"]
    for command, options in (("predict", asked), ("embed", delta)):
        for number in (3, 1, 2):
            answer = vpt(command, *options, "--out", f"{command}-two{suffix}", "--shard", f"{number}/3")
            if number != 2:
                assert answer.status == 0, answer.err
                assert answer.out.endswith(
                    f"shard {number}/3 is done: the last one to be done writes {command}-two{suffix}\n"
                )
                assert not (tmp_path / f"{command}-two{suffix}").exists()
        alone = vpt(command, *options, "--out", f"{command}-one{suffix}")
        assert answer.out.replace("-two", "-one") == alone.out
        assert answer.sentence.replace("-two", "-one") == alone.sentence
        assert "1 of 6 images could not be read" in alone.sentence
        one, two = ((tmp_path / f"{command}-{name}{suffix}").read_bytes() for name in ("one", "two"))
        assert one == two
    assert not list(tmp_path.glob("*.shards"))


def test_shards_of_other_images_or_options_are_refused(vpt: Vpt, run: Run, photos: Path, tmp_path: Path) -> None:
    start = ["predict", "--delta", str(run.folder / "calibrated.safetensors"), "--images", str(photos)]
    start += ["--out", "found.csv"]
    assert vpt(*start, "--shard", "1/2").status == 0
    assert "(shards 2 then, 3 now)" in vpt(*start, "--shard", "2/3").sentence
    assert "batch_size 64 then, 2 now" in vpt(*start, "--shard", "2/2", "--batch-size", "2").sentence
    assert "top None then, 2 now" in vpt(*start, "--shard", "2/2", "--top", "2").sentence
    assert "delta " in vpt(*start[:2], str(run.folder / "delta.safetensors"), *start[3:], "--shard", "2/2").sentence
    assert "command predict then, embed now" in vpt("embed", *start[1:], "--shard", "2/2").sentence
    Image.new("RGB", (9, 9)).save(photos / "9.png")
    assert "images " in vpt(*start, "--shard", "2/2").sentence
    assert not (tmp_path / "found.csv").exists()
