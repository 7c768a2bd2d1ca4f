"""Images of unknown classes: what is kept of them, and what a report makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from tests.robustness.fakes import PROMPTS, images, task, write_delta
from vpt.cli import main
from vpt.data import ImageDataModule
from vpt.errors import ConfigError, DataError
from vpt.metrics import ood_detection as ood
from vpt.models import TunedModel, load_classifier
from vpt.reports.robustness_report import tables
from vpt.reports.robustness_values import report
from vpt.robustness import RobustnessResult, run, unknown_images

OPTIONS: dict[str, Any] = {"alphas": (0.0, 1.0), "severities": ()}


def photos(folder: Path, n: int, seed: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for place, pixels in enumerate(images(n, seed)):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{place}.png")
    return folder


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unknown")
    prompts = write_delta(root / "prompts.safetensors", PROMPTS)
    folders = [photos(root / "fish", 7, 50), photos(root / "fungi", 4, 51)]
    run(prompts, task(), out=root / "out", unknown=folders, **OPTIONS)
    return root


def test_records_hold_the_scores_of_their_formulas(root: Path) -> None:
    result = RobustnessResult.read(root / "out")
    assert [(row.set, row.alpha, row.known, row.unknown) for row in result.unknown] == [
        *(("fish", 0.0, 10, 7), ("fish", 1.0, 10, 7)),
        *(("fungi", 0.0, 10, 4), ("fungi", 1.0, 10, 4)),
    ]
    record = result.unknown_record(result.unknown[1])
    model = load_classifier(root / "prompts.safetensors")
    with torch.no_grad():
        train, test = (
            model.encode(task().split(name).batch(range(n))["image"]) for name, n in (("train", 6), ("test", 10))
        )
        fish = model.encode(torch.from_numpy(images(7, 50)))
        for features, found in ((test, record.known), (fish, record.unknown)):
            logits = model.head(features).double()
            np.testing.assert_allclose(found["max softmax"], 1 - logits.softmax(1).amax(1), atol=1e-6)
            np.testing.assert_allclose(found["energy"], -logits.logsumexp(1), rtol=1e-5)
            fitted = ood.fit_mahalanobis(train.numpy(), np.arange(6) % 3)
            np.testing.assert_allclose(found["Mahalanobis"], ood.mahalanobis(features.numpy(), *fitted), rtol=1e-4)
            one, other = (torch.nn.functional.normalize(each.double(), dim=1) for each in (features, train))
            expected = torch.cdist(one, other).square().amin(1)
            np.testing.assert_allclose(found["nearest neighbour"], expected, rtol=1e-4, atol=1e-9)


def test_a_report_has_auroc_with_intervals_from_records_alone(root: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TunedModel, "encode", None)
        assert main(["robustness", "report", str(root / "out"), "--out", str(tmp_path / "report")]) == 0
    values = json.loads((tmp_path / "report" / "report.json").read_text())
    assert len(values["unknown"]) == 2 * 2 * 4  # folders, α, scores
    result = RobustnessResult.read(root / "out")
    for row in values["unknown"]:
        (kept,) = (each for each in result.unknown if (each.set, each.alpha) == (row["set"], row["alpha"]))
        record = result.unknown_record(kept)
        known, unknown = record.known[row["score"]], record.unknown[row["score"]]
        truth = np.r_[np.zeros(len(known)), np.ones(len(unknown))]
        assert row["auroc"] == pytest.approx(roc_auc_score(truth, np.r_[known, unknown]))
        low, high = row["auroc_interval"]
        assert low <= row["auroc"] <= high
    (table,) = (each for each in tables(values) if each.title == "Images of unknown classes")
    assert len(table.rows) == len(values["unknown"])
    assert "Images of unknown classes" in (tmp_path / "report" / "report.html").read_text()


def test_what_was_scored_is_taken_up_and_nothing_else(root: Path, tmp_path: Path) -> None:
    records = root / "out" / "records"
    before = {path: path.stat().st_mtime_ns for path in records.glob("unknown-*")}
    assert len(before) == 4
    prompts = root / "prompts.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unknown_images, "batch_answers", None)
        run(prompts, task(), out=root / "out", unknown=[root / "fish", root / "fungi"], **OPTIONS)
    assert {path: path.stat().st_mtime_ns for path in records.glob("unknown-*")} == before
    other = photos(tmp_path / "fish", 7, 60)  # the same names, other pixels
    run(prompts, task(), out=tmp_path / "out", unknown=[other], **OPTIONS)
    assert not {path.name for path in before} & {path.name for path in (tmp_path / "out" / "records").iterdir()}


def test_an_evaluation_without_them_takes_them_up_later(root: Path, tmp_path: Path) -> None:
    prompts = root / "prompts.safetensors"
    run(prompts, task(), out=tmp_path, **OPTIONS)
    assert "unknown" not in json.loads((tmp_path / "robustness.json").read_text())
    assert not report([tmp_path])["unknown"]
    run(prompts, task(), out=tmp_path, unknown=[root / "fish"], **OPTIONS)
    assert {row["set"] for row in report([tmp_path])["unknown"]} == {"fish"}


def test_a_record_of_another_evaluation_is_refused(root: Path, tmp_path: Path) -> None:
    run(root / "prompts.safetensors", task(), out=tmp_path, unknown=[root / "fish"], **OPTIONS)
    result = RobustnessResult.read(tmp_path)
    path = tmp_path / "records" / result.unknown[0].record
    kept = path.read_bytes()
    path.write_bytes((tmp_path / "records" / result.unknown[1].record).read_bytes())
    with pytest.raises(DataError, match="belongs to another evaluation"):
        report([tmp_path])
    path.write_bytes(kept[:100])
    with pytest.raises(DataError, match="is no record of unknown images"):
        report([tmp_path])
    path.unlink()
    with pytest.raises(DataError, match="lacks records/unknown-fish"):
        report([tmp_path])


def test_images_whose_class_is_known_are_refused(root: Path, tmp_path: Path) -> None:
    folder = photos(tmp_path / "fish", 3, 50)
    data = task()
    train = data._splits["train"]
    hashes = unknown_images.unknown_splits(data, [folder])["fish"].hashes
    object.__setattr__(train, "contents", lambda: np.concatenate([hashes[:2], hashes[:0]]))
    train.__dict__.pop("hashes", None)
    with pytest.raises(ConfigError, match="2 of the train images of fake are in the folder fish"):
        unknown_images.unknown_splits(data, [folder])
    with pytest.raises(ConfigError, match="Two folders of unknown images are called fish"):
        unknown_images.unknown_splits(task(), [folder, root / "fish"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        unknown_images.unknown_splits(task(), [tmp_path / "empty"])


class Masked(ImageDataModule):
    """Data whose test set has two of the three classes, one of two columns."""

    def groups(self, name: str) -> list[tuple[int, ...]] | None:
        return [(0, 2), (1,)] if name == "test" else None


def test_a_mask_counts_in_the_classifiers_own_scores(root: Path, tmp_path: Path) -> None:
    data = task()
    object.__setattr__(data._splits["test"], "labels", data._splits["test"].labels % 2)
    masked = Masked("fake", data.class_names, data._splits, "square", 64, 4, 0, 0, "none", None)
    options: dict[str, Any] = {"alphas": (1.0,), "severities": ()}
    run(root / "prompts.safetensors", masked, out=tmp_path, unknown=[root / "fish"], **options)
    result = RobustnessResult.read(tmp_path)
    found = result.unknown_record(result.unknown[0]).unknown["max softmax"]
    with torch.no_grad():
        logits = load_classifier(root / "prompts.safetensors")(torch.from_numpy(images(7, 50))).double()
    merged = torch.stack([logits[:, [0, 2]].amax(1), logits[:, 1]], dim=1)
    np.testing.assert_allclose(found, 1 - merged.softmax(1).amax(1), atol=1e-6)
