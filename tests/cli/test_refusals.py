"""The table of refused inputs: one sentence each, exit status 1, no traceback, and nothing half-written stays."""

from __future__ import annotations

import importlib
import pkgutil
import shlex
from pathlib import Path

import pytest

from . import refusals
from .conftest import CONFIGS, Run, Vpt

_KINDS = sorted(module.name for module in pkgutil.iter_modules(refusals.__path__))
_ROWS = [(kind, row) for kind in _KINDS for row in importlib.import_module(f"{refusals.__name__}.{kind}").ROWS]


@pytest.mark.parametrize(
    ("kind", "row"), [pytest.param(kind, row, id=f"{kind}: {row.command:.60}: {row.wrong}") for kind, row in _ROWS]
)
def test_an_odd_input_gets_one_sentence(vpt: Vpt, trained: Run, tmp_path: Path, kind: str, row: refusals.Row) -> None:
    importlib.import_module(f"{refusals.__name__}.{kind}").files(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    run = trained.folder
    names = {"configs": CONFIGS, "run": run, "delta": run / "delta.safetensors", "checkpoint": trained.checkpoint}
    answer = vpt(*(arg.format(**names) for arg in shlex.split(row.command)))
    assert row.says in answer.sentence
    assert sorted(tmp_path.rglob("*")) == before


def test_the_table_is_long_enough() -> None:
    assert len(_ROWS) >= 250
