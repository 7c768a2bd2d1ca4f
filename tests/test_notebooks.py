"""Every notebook runs from top to bottom: on what ships, and in a kernel, slowly, on real weights and images."""

from __future__ import annotations

import logging
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib.pyplot as plt
import pytest

import vpt

nbclient = pytest.importorskip("nbclient", reason="needs nbclient, of the dev extra")
nbformat = pytest.importorskip("nbformat", reason="needs nbclient, of the dev extra")
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def execute(path: Path, folder: Path) -> None:
    # Not nbmake: it runs notebooks where they lie, and would leave their files there.
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()


def test_there_are_notebooks() -> None:
    assert [path.name[:3] for path in NOTEBOOKS] == [f"0{number}_" for number in range(1, len(NOTEBOOKS) + 1)]
    assert NOTEBOOKS


@EACH
def test_a_notebook_runs_offline(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On six digits a class, and in this process: all cells are Python, but for ``%matplotlib``."""
    few = partial(vpt.DigitsDataModule, test="val200")
    short = {"max_epochs": 1, "limit_val_batches": 1, "limit_test_batches": 2}
    whole = L.Trainer
    monkeypatch.setattr(L, "Trainer", lambda **options: whole(**(options | short)))
    monkeypatch.setattr(vpt, "DigitsDataModule", lambda **options: few(**(options | {"shots": 6})))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # Lightning sets it; this puts it back afterwards
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    names: dict[str, Any] = {"__name__": "__main__"}
    with warnings.catch_warnings(), plt.rc_context():
        for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
            if cell.cell_type == "code":
                lines = [line for line in cell.source.splitlines() if not line.startswith("%")]
                exec(compile("\n".join(lines), f"{path.stem}, cell {number}", "exec"), names)  # noqa: S102
    logger.setLevel(level)  # not by monkeypatch: loggers remember what their parents let through
    plt.close("all")


@pytest.mark.slow
@EACH
def test_a_notebook_runs_on_real_weights_and_images(
    path: Path, tmp_path: Path, real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VPT_DATA", str(real_data))
    execute(path, tmp_path)


@EACH
def test_a_notebook_is_stored_without_output(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    assert str(Path.home()) not in path.read_text(encoding="utf-8")
