"""Several labels an image, and numbers, from a table to predictions, as a user types it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import expit

import vpt as package
from tests.fakes_targets import COLOURS, colour_table
from vpt.cli import main
from vpt.models import TunedModel

from .conftest import CONFIGS, Vpt

TAGS = ["--data.label_column", "tags", "--data.label_separator", "|", "--data.targets", "multilabel"]
LIGHT = ["--data.label_column", "[light,share]", "--data.targets", "regression"]
BASE = ["-c", str(CONFIGS / "local" / "folder.yaml"), "-c", str(CONFIGS / "method" / "linear.yaml")]
SMALL = [
    "--model.backbone",
    "vit_nano_patch8_64",
    "--trainer.max_epochs",
    "3",
    "--trainer.enable_progress_bar",
    "false",
]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def made(root: Path, flags: list[str]) -> Path:
    table = colour_table(root / "photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "0")
        given = [*BASE, *SMALL, *flags, "--data.root", str(table), "--trainer.default_root_dir", str(root)]
        assert main(["fit", *given]) == 0
    return next((root / "table").glob("*/version_0"))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("labels"), TAGS)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("numbers"), LIGHT)


def evaluated(vpt: Vpt, run: Path) -> tuple[str, dict[str, float]]:
    config = ["-c", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    answer = vpt("test", *config)
    assert answer.status == 0, answer.err
    return answer.out, json.loads((run / "run.json").read_text())["metrics"]


def test_several_labels_from_a_table_to_predictions(vpt: Vpt, labelled: Path, tmp_path: Path) -> None:
    out, metrics = evaluated(vpt, labelled)
    assert f"test/mean_ap  {100 * metrics['test/mean_ap']:.1f} % (of 15 images; 95 %: " in out
    assert "Scores by class" in out
    assert "vpt report" not in out
    calibrated = vpt("calibrate", "--delta", str(labelled / "delta.safetensors"))
    assert calibrated.status == 0, calibrated.err
    assert "a threshold for each of 3 classes by 15 validation images" in calibrated.out
    told = json.loads((labelled / "calibrated.json").read_text())
    assert told["f1"]["after"] >= told["f1"]["before"]
    delta, photos = str(labelled / "calibrated.safetensors"), labelled.parents[2] / "photos"
    answer = vpt("predict", "--delta", delta, "--images", str(photos), "--out", "found.csv", "--page", "page")
    assert answer.status == 0, answer.err
    model = package.load(delta)
    assert isinstance(model, TunedModel)
    found = model.predict(photos, top=3)
    assert isinstance(found, list)
    for row, each in zip(rows(tmp_path / "found.csv"), found, strict=True):
        shares = {name: float(row[f"probability_{name}"]) for name in sorted(COLOURS)}
        assert shares == pytest.approx(dict(each.top), abs=1e-6)
        seen = {
            name for name, limit in zip(sorted(COLOURS), told["label_thresholds"], strict=True) if shares[name] >= limit
        }
        assert set(filter(None, row["labels"].split("|"))) == seen == set(each.labels or ())


def test_numbers_from_a_table_to_predictions(vpt: Vpt, numbered: Path, tmp_path: Path) -> None:
    out, metrics = evaluated(vpt, numbered)
    assert f"{metrics['test/mae']:.4g} (of 15 images; 95 %: " in out
    assert "Errors of each number" in out
    assert vpt("calibrate", "--delta", str(numbered / "delta.safetensors")).status == 0
    margins = json.loads((numbered / "calibrated.json").read_text())["margins"]
    delta, photos = str(numbered / "calibrated.safetensors"), numbered.parents[2] / "photos"
    answer = vpt("predict", "--delta", delta, "--images", str(photos), "--out", "found.jsonl", "--coverage", "0.8")
    assert answer.status == 0, answer.err
    model = package.load(delta)
    assert isinstance(model, TunedModel)
    found = model.predict(photos)
    assert isinstance(found, list)
    for line, each in zip((tmp_path / "found.jsonl").read_text().splitlines(), found, strict=True):
        row = json.loads(line)
        assert each.values == pytest.approx({name: row[f"value_{name}"] for name in ("light", "share")})
        assert [row[f"margin_{name}"] for name in ("light", "share")] == pytest.approx(margins["0.8"])


def test_the_predictions_of_a_run_are_those_of_its_file(vpt: Vpt, labelled: Path, numbered: Path) -> None:
    for run, what in ((labelled, "probability"), (numbered, "value")):
        answer = vpt("predict", "-c", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints" / "last.ckpt"))
        assert answer.status == 0, answer.err
        written = rows(run / "predictions.csv")
        model = package.load(run / "delta.safetensors")
        assert isinstance(model, TunedModel)
        photos = [run.parents[2] / "photos" / row["path"] for row in written]
        with torch.inference_mode():
            outputs = model.classify(torch.from_numpy(model.embed(photos))).double().numpy()
        expected = expit(outputs) if what == "probability" else outputs
        got = [[float(row[f"{what}_{name}"]) for name in model.class_names] for row in written]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_a_sweep_chooses_by_the_score_of_the_targets(vpt: Vpt, tmp_path: Path) -> None:
    table = colour_table(tmp_path / "photos")
    (tmp_path / "rates.yaml").write_text("grid: {model.base_lr: [0.0001, 0.3]}\n")
    for flags, title in ((TAGS, "mean AP (%)"), (LIGHT, "R² (%)")):
        out = tmp_path / title[:2]
        grid = ["--grid", str(tmp_path / "rates.yaml"), "--seeds", "0", "--serial", "--out", str(out)]
        answer = vpt("sweep", *BASE, *SMALL, *flags, "--data.root", str(table), *grid)
        assert answer.status == 0, answer.err
        assert title in answer.out
        found = json.loads((out / "sweep.json").read_text())
        best = max(found["tried"], key=lambda row: row["val"])
        assert (found["val"], found["chosen"]["model.base_lr"]) == (best["val"], best["model.base_lr"])
        assert len({row["val"] for row in found["tried"]}) == 2


def test_a_run_is_repeated_to_the_bit(vpt: Vpt, labelled: Path) -> None:
    assert "equal, bit for bit" in vpt("rerun", str(labelled)).out


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("robustness run --delta {delta} --out out", "vpt robustness is of images with one class each"),
        ("report {run} --out out", "is of multilabel targets; reports are of images with one class each"),
        ("predict --delta {delta} --images {photos} --out x.csv --max-risk 0.1", "max_risk is not known of a model"),
        ("predict --delta {delta} --images {photos} --out x.csv --top 2", "--top has no effect with a model of multi"),
        ("calibrate --delta {delta} --out c.safetensors --test", "leave --test out"),
        ("calibrate --delta {delta} --out c.safetensors --unknown knn", "leave --unknown out"),
        ("tune {table} --minutes 1 --out out {tags}", "vpt tune is of images with one class each"),
        ("attention --delta {delta} --out a.png", "Figures of test images are of images with one class each"),
    ],
)  # fmt: skip
def test_what_is_of_one_class_an_image_says_so(vpt: Vpt, labelled: Path, command: str, sentence: str) -> None:
    photos = labelled.parents[2] / "photos"
    places = {"delta": labelled / "delta.safetensors", "run": labelled, "photos": photos, "table": photos / "table.csv"}
    places["tags"] = Path(" ".join(TAGS))
    assert sentence in vpt(*command.format(**places).split()).sentence


def test_a_model_of_numbers_has_no_page_of_classes(vpt: Vpt, numbered: Path) -> None:
    delta, photos = str(numbered / "delta.safetensors"), str(numbered.parents[2] / "photos")
    answer = vpt("predict", "--delta", delta, "--images", photos, "--out", "found.csv", "--page", "page")
    assert "--page shows images by class" in answer.sentence


def test_a_table_is_verified_as_it_is_read(vpt: Vpt, tmp_path: Path) -> None:
    table = str(colour_table(tmp_path / "photos"))
    answer = vpt("data", "verify", table, *TAGS)
    assert answer.status == 0, answer.err
    assert "3 of 3" in answer.out
    assert "has no column 'label'" in vpt("data", "verify", table).sentence
    assert "is of vpt data verify" in vpt("data", "list", *TAGS).sentence
    assert "data.root" in vpt("data", "verify", table, "--data.root", "elsewhere").sentence


def test_one_test_image_is_tested_and_a_sweep_says_that_it_gives_no_score(vpt: Vpt, tmp_path: Path) -> None:
    table = colour_table(tmp_path / "photos", images=40)
    lines = table.read_text().splitlines()
    seen = [line for line in lines if not line.endswith("test")]
    table.write_text("\n".join([*seen, *(line for line in lines if line.endswith("test"))][: len(seen) + 1]) + "\n")
    light = ["--data.label_column=light", "--data.targets=regression", "--data.root", str(table)]
    assert vpt("fit", *BASE, *SMALL, *light, "--trainer.default_root_dir", str(tmp_path)).status == 0
    out, metrics = evaluated(vpt, next((tmp_path / "table").glob("*/version_0")))
    assert "test/r2" not in metrics
    assert "test/r2    – (these images say nothing of it)" in out
    assert "(of 1 images" in out
    (tmp_path / "rates.yaml").write_text("grid: {model.base_lr: [0.3]}\n")
    grid = ["--grid", str(tmp_path / "rates.yaml"), "--seeds", "0", "1", "--serial", "--out", str(tmp_path / "out")]
    answer = vpt("sweep", *BASE, *SMALL, *light, *grid)
    assert "its test gave no score" in answer.sentence


def test_huge_numbers_are_recorded(vpt: Vpt, tmp_path: Path) -> None:
    table = colour_table(tmp_path / "photos", scale=1e25)
    light = ["--data.label_column=light", "--data.targets=regression", "--data.root", str(table)]
    answer = vpt("fit", *BASE, *SMALL, *light, "--trainer.default_root_dir", str(tmp_path))
    assert answer.status == 0, answer.err
    assert evaluated(vpt, next((tmp_path / "table").glob("*/version_0")))[1]["test/mae"] > 1e22
