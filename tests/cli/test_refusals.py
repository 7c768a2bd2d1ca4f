"""The table of refused inputs: one sentence each, exit status 1, no traceback, and nothing half-written stays."""

from __future__ import annotations

import importlib
import pkgutil
import shlex
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from vpt.cli import COMMANDS, main
from vpt.cli.arguments import Parser

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


def _options_with_a_value() -> dict[str, set[str]]:
    """Of every command and subcommand of our own parsers, those that take a value."""
    found: dict[str, set[str]] = {}
    add = Parser.add_argument

    def recorded(self: Parser, *names: Any, **options: Any) -> Any:
        if names[0].startswith("--") and options.get("action") is None:
            found.setdefault(self.prog.removeprefix("vpt "), set()).add(names[0])
        return add(self, *names, **options)

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()):
        patch.setattr(Parser, "add_argument", recorded)
        for command, (module, _) in COMMANDS.items():
            if module != "lightning_cli":  # jsonargparse's own
                assert main([command, "--help"]) == 0
    return found


def test_every_option_that_takes_a_value_is_in_the_table() -> None:
    commands = [row.command.split() for _, row in _ROWS]
    missing = {
        f"vpt {command} {option}"
        for command, options in _options_with_a_value().items()
        for option in options
        if not any(words[: len(start := command.split())] == start and option in words for words in commands)
    }
    assert not missing
