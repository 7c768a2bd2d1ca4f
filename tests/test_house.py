"""The rules of the house, read from the source without importing it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import vpt

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vpt"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = [*MODULES, *sorted(path for folder in ("benchmarks", "datasets") for path in (ROOT / folder).rglob("*.py"))]

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def drawn() -> list[str]:
    """What the tree of docs/architecture.md names below vpt/, in its order: files, and folders with a slash behind."""
    (tree,) = re.findall(r"```text\nvpt/\n(.*?)```", ARCHITECTURE, re.DOTALL)
    found: list[str] = []
    above: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        for name in re.findall(r"(?<= )\w+(?:/|\.py)(?= |$)", line):
            above[depth:] = [name] if name.endswith("/") else []
            found.append("".join(above[:depth]) + name)
    return found


# The column of rooms from the ground up: a room imports only what stands before it.
COLUMN = [name.rstrip("/").removesuffix(".py") for name in drawn() if "/" not in name.rstrip("/")]
NOT_EVEN = {
    "data": {"metrics", "backbones"},
    "deltas": {"data"},
}
ROOTS = {"__init__", "__main__"}  # they import lazily, or only the command line
ONLY_IN = {"timm": "backbones", "albumentations": "data"}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def part(path: Path) -> str:
    """Names the part of the package that a module belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> Iterator[str]:
    """Yields the full name of everything that a module imports, wherever in the module."""
    package = ("vpt", *path.relative_to(PACKAGE).parent.parts) if path.is_relative_to(PACKAGE) else ()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            for name in node.names:
                home = vpt._HOMES.get(name.name) if module == "vpt" else None  # a lazily exported name
                yield home or f"{module}.{name.name}"


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [path for path in MODULES if part(path) not in ROOTS], ids=_id)
def test_imports_go_one_way(path: Path) -> None:
    own = part(path)
    below = set(COLUMN[: COLUMN.index(own)]) - NOT_EVEN.get(own, set())
    assert {name.split(".")[1] for name in imported(path) if name.startswith("vpt.")} - {own} <= below


def test_the_page_on_architecture_draws_every_module_and_no_other() -> None:
    rooms = {f"{path.parent.relative_to(PACKAGE)}/" for path in MODULES if path.parent != PACKAGE}
    files = {str(path.relative_to(PACKAGE)) for path in MODULES if path.stem not in ROOTS}
    assert sorted(drawn()) == sorted(rooms | files)


def test_what_the_page_on_architecture_walks_through_is_there() -> None:
    named = set(re.findall(r"`([\w/]+\.py)`", ARCHITECTURE.partition("## Three walkthroughs")[2])) - {
        "cli/__init__.py",
        "tests/test_house.py",
    }
    assert len(named) > 20
    assert [name for name in named if not any(f"/{each}".endswith(f"/{name}") for each in drawn())] == []


def test_no_room_is_too_full_to_be_seen_at_once() -> None:
    for room in {path.parent for path in MODULES}:
        assert len(list(room.glob("*.py"))) <= 15, room


def test_no_file_is_part_of_an_import_cycle() -> None:
    names = {
        ".".join(("vpt", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in MODULES
    }

    def module(name: str) -> str:
        while name not in names:
            name = name.rpartition(".")[0]
        return name

    graph = {
        name: {module(each) for each in imported(path) if each.startswith("vpt.")} - {name, "vpt"}
        for name, path in names.items()
    }
    while leaves := {name for name, needed in graph.items() if not needed & graph.keys()}:
        graph = {name: needed for name, needed in graph.items() if name not in leaves}
    assert not graph


def test_every_public_name_is_in_the_documentation() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    words = set(re.findall(r"\w+", " ".join(page.read_text(encoding="utf-8") for page in pages)))
    assert [name for name in vpt.__all__ if name not in words] == []


def test_the_reader_of_imports_sees_all_their_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_house.PACKAGE", tmp_path)
    module = tmp_path / "data" / "module.py"
    module.parent.mkdir()
    module.write_text("import vpt.tasks.base\nfrom vpt import attach\ndef f():\n    from ..cli import main\n")
    assert list(imported(module)) == ["vpt.tasks.base", "vpt.deltas", "vpt.cli.main"]


@pytest.mark.parametrize(("library", "home"), ONLY_IN.items())
def test_a_library_stays_in_its_part(library: str, home: str) -> None:
    outside = [path for path in MODULES if part(path) != home]
    assert not [path for path in outside if library in {name.split(".")[0] for name in imported(path)}]


def test_nothing_is_unpickled() -> None:
    for path in SOURCES:
        for call in (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)):
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            if ast.unparse(call.func) == "torch.load" or "weights_only" in given:
                safe = given.get("weights_only")
                assert isinstance(safe, ast.Constant), f"{path}:{call.lineno}"
                assert safe.value is True, f"{path}:{call.lineno}"


@pytest.mark.parametrize("path", MODULES, ids=_id)
def test_a_module_says_what_it_is_and_fits_in_the_head(path: Path) -> None:
    assert ast.get_docstring(tree(path))
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    for function in functions(path):
        body = function.body[1:] if ast.get_docstring(function) else function.body
        lines = body[-1].end_lineno - body[0].lineno + 1 if body and body[-1].end_lineno else 0
        assert lines <= 60, f"{function.name} has {lines} lines"


@pytest.mark.parametrize("path", MODULES, ids=_id)
def test_user_input_is_not_checked_by_assert(path: Path) -> None:
    assert not [node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.Assert)]
