"""The example is what a newcomer copies: short, public names only, and it learns."""

from __future__ import annotations

import ast
import importlib.util
from functools import partial
from pathlib import Path

import pytest

import vpt

EXAMPLE = Path(__file__).parents[1] / "examples" / "minimal.py"


def test_the_example_is_short_and_uses_public_names_alone() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    tree = ast.parse(text)
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert imported == {"torch", "vpt"}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "vpt"
    }
    assert used <= set(vpt.__all__)


def test_the_example_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vpt, "DigitsDataModule", partial(vpt.DigitsDataModule, test="val200"))
    spec = importlib.util.spec_from_file_location("minimal", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(epochs=1) > 0.3  # chance is 0.1
