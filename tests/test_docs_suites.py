"""Every suite has a page, and what the page says of its tasks is what their cards say."""

from __future__ import annotations

import re
from typing import get_args

import pytest
import yaml

from benchmarks.docs import found_blocks
from vpt.data.catalog.cards import Suite, card_names

from .suite_tables import CONFIGS, DOCS, ROOT, SUITES, blocks, cards, configs, other_cards, page

NAVIGATION = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]


def rows(block: str) -> list[dict[str, str]]:
    """Reads a table, by the names of its columns."""
    head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines())
    return [dict(zip(head, line, strict=True)) for line in lines]


def test_every_suite_has_a_page_in_the_navigation() -> None:
    assert set(get_args(Suite)) - {"local"} <= set(SUITES)
    pages = next(part["Suites"] for part in NAVIGATION if "Suites" in part)
    assert pages == [page(suite).relative_to(DOCS).as_posix() for suite in SUITES]


@pytest.mark.parametrize("suite", SUITES)
def test_tables_of_a_page_are_those_that_are_made_of_the_cards(suite: str) -> None:
    found, made = found_blocks(page(suite)), blocks(suite)
    assert {name: found.get(name) for name in made} == made, "run python -m tests.suite_tables"


@pytest.mark.parametrize("suite", SUITES)
def test_a_page_states_names_classes_and_counts_of_the_cards(suite: str) -> None:
    stated = {
        row["task"].strip("`"): row
        for name, block in found_blocks(page(suite)).items()
        if name in ("tasks", "other tasks")
        for row in rows(block)
    }
    known = {card.name: card for card in (*cards(suite), *other_cards(suite))}
    assert stated.keys() == known.keys()
    for name, row in stated.items():
        sizes = known[name].sizes
        assert int(re.findall(r"\d+", row["classes"].replace(",", ""))[-1]) == known[name].num_classes
        numbers = [int(number) for key in ("train", "val", "test") for number in re.findall(r"\d+", _plain(row[key]))]
        together = {"train800val200", "trainval"} if {"train", "train800"} & sizes.keys() else set()
        assert sorted(numbers) == sorted(size for key, size in sizes.items() if key not in together), name


def _plain(cell: str) -> str:
    """Numbers of images, without commas between thousands, the number of sets, and ranges such as ``[:90%]``."""
    return re.sub(r"(?<=\d),(?=\d{3})|\[.*?\]", "", cell.rpartition("× ")[2])


def test_every_card_is_on_a_page() -> None:
    assert set(card_names()) == {card.name for suite in SUITES for card in (*cards(suite), *other_cards(suite))}


@pytest.mark.parametrize("suite", SUITES)
def test_every_config_of_a_suite_is_named_on_its_page(suite: str) -> None:
    text = page(suite).read_text(encoding="utf-8")
    assert [path for path in configs(suite) if path.relative_to(ROOT).as_posix() not in text] == []


def test_every_config_that_names_a_dataset_is_on_a_page() -> None:
    """``configs/local/folder.yaml`` is for images of one's own."""
    named = {path for suite in SUITES for path in configs(suite)} | {CONFIGS / "local" / "folder.yaml"}
    contents = {path: yaml.safe_load(path.read_text(encoding="utf-8")) for path in CONFIGS.rglob("*.yaml")}
    assert {path for path, content in contents.items() if "class_path" in content.get("data", {})} <= named


@pytest.mark.parametrize("suite", [suite for suite in SUITES if page(suite).parent.name == "suites"])
def test_a_page_says_how_to_train_and_how_to_evaluate(suite: str) -> None:
    text = page(suite).read_text(encoding="utf-8")
    for command in ("vpt fit -c configs/", "vpt test -c RUN/config.yaml", "vpt data "):
        assert command in text, command
