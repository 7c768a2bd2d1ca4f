"""The page of each delta says what its class does: options, defaults, cost; and its example is one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml

from vpt.backbones import Backbone, create_backbone
from vpt.deltas import DELTAS
from vpt.tasks import DeltaTuning

ROOT = Path(__file__).parents[1]
OPTIONS = ("option", "default", "values", "meaning")
COST = ("backbone", "options", "trainable parameters", "bytes in the file")
STATED = {"vit_base_patch16_224", "vit_tiny_patch16_224"}


def page(name: str) -> str:
    return (ROOT / "docs" / "deltas" / f"{name}.md").read_text(encoding="utf-8")


def table(text: str, header: tuple[str, ...]) -> Iterator[list[str]]:
    """The cells of a page's table, row by row."""
    _, found, rest = text.partition(f"| {' | '.join(header)} |\n")
    for line in rest.splitlines()[1:] if found else ():
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split("|")]


def plain(cell: str) -> Any:
    """What a cell in backticks stands for."""
    return yaml.safe_load(cell.strip("`"))


@cache
def backbone(name: str) -> Backbone:
    return create_backbone(name, "random")


def options(name: str) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(DELTAS[name].__init__).parameters
    return {key: parameters[key] for key in parameters if key not in ("self", "backbone")}


def test_every_delta_has_a_page_in_the_navigation_and_in_the_overview() -> None:
    section = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("- Deltas:\n")[2].partition("- API:")[0]
    assert set(re.findall(r"deltas/(\w+)\.md", section)) == set(DELTAS)
    overview = (ROOT / "docs" / "deltas.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| \[`(\w+)`\]\(deltas/\1\.md\)", overview, re.MULTILINE)) == set(DELTAS)
    assert {path.stem for path in (ROOT / "docs" / "deltas").glob("*.md")} == set(DELTAS)


@pytest.mark.parametrize("name", DELTAS)
def test_a_page_has_the_options_of_the_constructor_with_their_defaults(name: str) -> None:
    said = {str(plain(row[0])): row for row in table(page(name), OPTIONS)}
    known = options(name)
    assert list(said) == list(known)
    hints = get_type_hints(DELTAS[name].__init__)
    for key, parameter in known.items():
        default = said[key][1]
        if parameter.default is inspect.Parameter.empty:
            assert default == "required", key
        else:
            expected = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
            assert plain(default) == expected, key
            assert type(plain(default)) is type(expected), key
        if get_origin(hints[key]) is Literal:
            # a class may take fewer modes of dropout than there are
            taken = getattr(DELTAS[name], "modes") if key == "dropout_mode" else get_args(hints[key])  # noqa: B009
            assert re.findall(r"`(\w+)`", said[key][2]) == list(taken), key


@pytest.mark.parametrize("name", DELTAS)
def test_a_page_says_what_the_delta_costs(name: str) -> None:
    rows = list(table(page(name), COST))
    assert {plain(row[0]) for row in rows} == STATED
    for model, chosen, parameters, size in rows:
        part = DELTAS[name](backbone(plain(model)), **plain(chosen))
        assert f"{part.expected_parameters():,}" == parameters, (model, chosen)
        kept = part.folded()[1].values()
        assert f"{sum(tensor.numel() * tensor.element_size() for tensor in kept):,}" == size, (model, chosen)


@pytest.mark.parametrize("name", DELTAS)
def test_the_example_of_a_page_is_a_model_with_that_delta(name: str) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", page(name), re.DOTALL)
    model = yaml.safe_load(text)["model"]
    assert model["class_path"] == "DeltaTuning"
    assert [spec["name"] for spec in model["init_args"]["deltas"]] == [name]
    task = DeltaTuning(backbone="vit_nano_patch8_64", num_classes=3, **model["init_args"])
    assert task.model.delta is not None
