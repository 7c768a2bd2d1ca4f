"""What the README and the documentation say can be done as they say it."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from vpt.backbones import create_backbone
from vpt.cli import COMMANDS, main
from vpt.deltas import DELTAS, registry
from vpt.export.onnx_torch import export_onnx, export_torch
from vpt.models import TunedModel
from vpt.visualize.figure_kinds import KINDS

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "datasets" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
_FIT = {"fit", "validate", "test", "predict"}
_TAKES_FIT = _FIT | {"sweep", "fewshot", "combine", "scale", "pretrain", "profile", "rerun"}
_SECTIONS = (
    "--model.",
    "--data.",
    "--trainer.",
    "--print_config",
    "--ckpt_path",
    "-c",
    "--config",
    "--seed_everything",
)


def blocks(language: str) -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for number, text in enumerate(
            re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        ):
            yield f"{page.relative_to(ROOT)}-{number}", text


def commands() -> Iterator[tuple[str, str]]:
    for name, text in blocks("bash"):
        for number, line in enumerate(text.replace("\\\n", " ").splitlines()):
            found = line.partition("  #")[0].strip().removeprefix("srun ")
            if found.startswith("vpt "):
                yield f"{name}-{number}", found


PYTHON, BASH, YAML = dict(blocks("python")), dict(commands()), dict(blocks("yaml"))


@pytest.mark.parametrize("text", PYTHON.values(), ids=PYTHON)
def test_python_runs(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "peft" in text:
        pytest.importorskip("peft", reason="needs the peft extra")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_REGISTERED", dict(DELTAS))  # a delta of a page's own is forgotten behind it
    exec(compile(text, "block", "exec"), _surroundings(text))  # noqa: S102


def _surroundings(text: str) -> dict[str, Any]:
    """What a page has told the reader to have: an exported model and images."""
    if "model.onnx" not in text and "model.pt2" not in text:
        return {}
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    model = TunedModel(create_backbone("vit_nano_patch8_64"), 3)
    if "model.pt2" in text:
        export_torch(model.eval(), "model.pt2")
        return {"images": images}
    pytest.importorskip("onnxruntime", reason="needs the onnx extra")
    export_onnx(model.eval(), "model.onnx")
    return {"images": images.numpy()}


@cache
def flags(command: tuple[str, ...]) -> str:
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([*command, "--help"]) == 0
    return out.getvalue()


@pytest.mark.parametrize("line", BASH.values(), ids=BASH)
def test_a_command_has_the_flags_and_files_that_are_shown(line: str) -> None:
    _, command, *args = shlex.split(line.rstrip("&"))
    assert command in COMMANDS or command.startswith("-"), line
    for path in (arg for arg in args if arg.startswith("configs/")):
        assert list(ROOT.glob(path)), path
    given = [arg.partition("=")[0] for arg in args if re.match(r"--?[a-z]", arg)]
    own = [flag for flag in given if not (command in _TAKES_FIT and flag.startswith(_SECTIONS))]
    own = [flag for flag in own if not flag.startswith("--data.")]
    of_a_run = command in _FIT and "--delta" not in own  # vpt predict has two forms
    if not own or of_a_run:
        assert not own or not of_a_run, f"{line}: {own}"
        return
    action = (command, *args[:1]) if command in ("robustness", "data") else (command,)
    known = set(re.findall(r"--?[a-z][a-z_-]*", flags(action)))
    assert set(own) <= known, f"{line}: {set(own) - known}"


@pytest.mark.parametrize("text", YAML.values(), ids=YAML)
def test_yaml_is_yaml(text: str) -> None:
    assert isinstance(yaml.safe_load(text), dict)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_what_troubleshooting_quotes_is_said_somewhere() -> None:
    said = " ".join(
        node.value
        for path in sorted((ROOT / "vpt").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    said = " ".join(said.split())
    rows = re.findall(r"^\| `(.+?)`", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 10
    for row in rows:
        for part in re.split(r"\.\.\.| \d+, ", row):
            assert part.strip(" :,") in said, part


def test_the_page_on_attention_has_every_kind_of_figure() -> None:
    page = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(KINDS)


def test_pages_of_the_documentation_are_in_its_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert not [
        page.name for page in (ROOT / "docs").rglob("*.md") if str(page.relative_to(ROOT / "docs")) not in navigation
    ]


def test_pages_of_the_api_name_modules_that_exist() -> None:
    names = [
        name
        for page in (ROOT / "docs" / "api").glob("*.md")
        for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)
    ]
    assert len(names) > 15
    for name in names:
        module, _, last = name.rpartition(".")
        assert find_spec(name) if last.islower() else hasattr(import_module(module), last), name
