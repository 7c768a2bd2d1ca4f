"""Agreement on the line in the report of several evaluations, from records alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from tests.robustness.fakes import CLASSES, kept, split, write_delta
from vpt.cli import main
from vpt.data import ImageDataModule
from vpt.metrics.agreement_line import agreement
from vpt.models import TunedModel
from vpt.reports.robustness_figures import agreements
from vpt.reports.robustness_report import notes, tables
from vpt.reports.robustness_values import report
from vpt.robustness import logit_records, run


def data(n: int) -> ImageDataModule:
    splits = {"train": split("train", 6, 1), "test": split("test", n, 3), "art": split("shift_art", n, 4)}
    return ImageDataModule("fake", CLASSES, splits, "square", 64, 4, 0, 0, "none", None)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("agreement")
    for seed in range(7):
        delta = write_delta(root / f"{seed}.safetensors", (), seed)
        run(delta, data(60), out=root / f"run{seed}", alphas=(1.0,), severities=())
    return root


def test_a_report_of_three_models_has_the_line_of_their_records(root: Path, tmp_path: Path) -> None:
    folders = [root / f"run{seed}" for seed in range(7)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TunedModel, "forward", None)
        assert main(["robustness", "report", *map(str, folders), "--out", str(tmp_path)]) == 0
    values: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    clean, art = (
        np.array([logit_records.read(kept(folder, f"{name}-alpha-1.0")).logits.argmax(axis=1) for folder in folders])
        for name in ("clean", "art")
    )
    labels = np.arange(60) % 3
    expected = agreement(clean, art, (clean == labels).mean(axis=1))
    rows = values["agreement"]
    assert [row["model"] for row in rows] == [f"run{seed}" for seed in range(7)]
    assert [row["aline_s"] for row in rows] == pytest.approx(expected.aline_s.tolist())
    assert expected.aline_d is not None
    assert [row["aline_d"] for row in rows] == pytest.approx(expected.aline_d.tolist())
    assert [row["shifted"] for row in rows] == pytest.approx((art == labels).mean(axis=1).tolist())
    assert {(row["slope"], row["r2"], row["pairs"]) for row in rows} == {(expected.slope, expected.r2, expected.pairs)}
    (table,) = (each for each in tables(values) if each.title == "Agreement on the line")
    assert len(table.rows) == 7
    figure = agreements(values)
    assert figure is not None
    (axes,) = figure.axes
    diagonal, line, pairs, *models = axes.lines
    x, y = (np.asarray(each, dtype=float) for each in line.get_data())
    np.testing.assert_allclose(y, expected.slope * x + expected.intercept)
    np.testing.assert_allclose(np.asarray(diagonal.get_data()[0]), np.asarray(diagonal.get_data()[1]))
    drawn = [norm.cdf(np.asarray(each, dtype=float)) for each in pairs.get_data()]
    np.testing.assert_allclose(drawn, [expected.inside, expected.outside])
    places = np.array([[float(np.asarray(each)[0]) for each in model.get_data()] for model in models])
    np.testing.assert_allclose(norm.cdf(places), [[row["clean"], row["shifted"]] for row in rows])
    assert agreements(values | {"agreement": []}) is None


def test_two_models_have_no_line_and_equal_ones_say_why(root: Path) -> None:
    assert not report([root / "run0", root / "run1"])["agreement"]
    run(root / "0.safetensors", data(60), out=root / "again", alphas=(1.0,), severities=(), seed=1)
    values = report([root / "run0", root / "again", root / "run1"])
    assert not values["agreement"]
    assert any("No agreement on the line: art at α = 1: Only 2 of 3 pairs" in each for each in notes(values))
