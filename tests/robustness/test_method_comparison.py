from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.robustness.fakes import PROMPTS, kept, task, write_delta
from vpt.errors import ConfigError, DataError
from vpt.models import TunedModel
from vpt.robustness import RobustnessResult, run
from vpt.robustness.alpha_curve import ENSEMBLE, curves, table
from vpt.robustness.logit_records import read

ALPHAS = (0.0, 0.3, 1.0)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gate sweep, one from the initial prompts, and one of another run."""
    root = tmp_path_factory.mktemp("compare")
    probe = write_delta(root / "probe.safetensors", (), seed=1)
    delta, other = (write_delta(root / f"{seed}.safetensors", PROMPTS, seed) for seed in (2, 3))
    options: dict[str, Any] = {"data": task(), "alphas": ALPHAS, "severities": (), "anchor": probe}
    run(delta, out=root / "gate", **options)
    run(delta, out=root / "init", start=other, **options)
    run(other, out=root / "other", **options)
    run(delta, out=root / "fewer", **options | {"alphas": (0.0, 1.0)})
    run(delta, out=root / "middle", **options | {"alphas": (0.5, 0.7)})
    return root


def test_three_methods_stand_side_by_side(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TunedModel, "forward", None)  # nothing is classified again
    found = curves([folder / "gate", folder / "init"])
    assert [curve.method for curve in found] == ["gate", "from start", ENSEMBLE]
    gate, _, ensemble = (curve.result.rows for curve in found)
    for ours, theirs in zip(gate, ensemble, strict=True):
        assert (ours.set, ours.alpha, ours.n) == (theirs.set, theirs.alpha, theirs.n)
        if ours.alpha in (0.0, 1.0):
            assert ours.top1 == theirs.top1


def test_an_ensemble_mixes_logits(folder: Path) -> None:
    start, end = (read(kept(folder / "gate", f"art-alpha-{alpha}")) for alpha in (0.0, 1.0))
    answers = (0.7 * start.logits + 0.3 * end.logits).argmax(axis=1)
    rows = curves([folder / "gate"])[-1].result.rows
    row = next(row for row in rows if (row.set, row.alpha) == ("art", 0.3))
    assert row.top1 == pytest.approx((answers == start.label).mean())


def test_the_table_has_a_line_for_each_set_and_method(folder: Path) -> None:
    drawn = table(curves([folder / "gate", folder / "init"]))
    console = Console(width=140)
    with console.capture() as capture:
        console.print(drawn)
    assert drawn.row_count == 4 * 3  # val, the same corrupted, clean, art
    assert "ensemble" in capture.get()


def test_a_result_comes_back(folder: Path) -> None:
    again = RobustnessResult.read(folder / "gate")
    assert len(again.rows) == 4 * 3
    assert again.chosen_alpha in ALPHAS
    assert np.isclose(again.rows[0].top1, read(folder / "gate" / "records" / str(again.rows[0].record)).accuracy)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("gate", "other"), "different deltas"),
        (("gate", "fewer"), "different α or sets"),
        (("middle",), "no records at α = 0 and 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(names: tuple[str, ...], message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        curves([folder / name for name in names])


def test_a_folder_without_an_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no evaluation"):
        curves([tmp_path])
