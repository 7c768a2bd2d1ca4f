from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import make_task
from tests.fakes_suites import make_imagenet
from vpt.data import VTABDataModule
from vpt.data.catalog import overview as catalog
from vpt.data.catalog.cards import Card, card_names, find_card, load_card
from vpt.data.catalog.overview import describe, image_lists, overview
from vpt.errors import DataError, UnknownNameError


def test_the_list_has_every_card_and_says_what_is_here(tmp_path: Path) -> None:
    make_task(tmp_path / "signdigits10", classes=10, size=(8, 8))
    (tmp_path / "caltech101").mkdir()
    entries = {entry.card.name: entry for entry in overview(tmp_path)}
    assert sorted(entries) == card_names()
    assert entries["signdigits10"].found == {"train800val200": 60, "train800": 40, "val200": 20, "test": 30}
    assert (entries["pacs7_photo"].found, entries["pacs7_photo"].fault) == (None, "")
    assert entries["caltech101"].found is None
    assert "train800val200.txt does not exist" in entries["caltech101"].fault
    assert entries["digits"].found == entries["digits"].card.sizes


def test_lists_without_images_are_not_called_present(tmp_path: Path) -> None:
    task = make_task(tmp_path / "signdigits10", classes=10, size=(8, 8))
    shutil.rmtree(task / "images")
    (entry,) = (entry for entry in overview(tmp_path) if entry.card.name == "signdigits10")
    assert entry.found is None
    assert "0.jpg does not exist, though" in entry.fault
    assert entry.fault.endswith("lists it: copy the images as well.")


def test_of_imagenet_c_the_sets_that_are_here_are_counted(tmp_path: Path) -> None:
    make_imagenet(tmp_path, "imagenet_c")
    (tmp_path / "imagenet_c" / "snow" / "2").mkdir(parents=True)
    (entry,) = (entry for entry in overview(tmp_path) if entry.card.name == "imagenet_c")
    assert (entry.sets, entry.official_sets, entry.fault) == (4, 95, "")
    shutil.rmtree(tmp_path / "imagenet_c" / "fog")
    shutil.rmtree(tmp_path / "imagenet_c" / "gaussian_noise")
    (entry,) = (entry for entry in overview(tmp_path) if entry.card.name == "imagenet_c")
    assert (entry.found, "holds none of the sets" in entry.fault) == (None, True)


def test_suites_and_groups_stay_together(tmp_path: Path) -> None:
    groups = [(entry.card.suite, entry.card.group) for entry in overview(tmp_path)]
    assert [group for group, after in zip(groups, [*groups[1:], None], strict=True) if group != after] == list(
        dict.fromkeys(groups)
    )


def test_a_name_may_be_written_with_its_suite() -> None:
    assert find_card("vtab/caltech101") is find_card("caltech101") is load_card("caltech101")
    for name in ("local/caltech101", "caltech11", "../caltech101", ""):
        with pytest.raises(UnknownNameError):
            find_card(name)


def test_a_variant_has_the_card_of_its_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = load_card("digits")
    assert digits is not None
    many = replace(digits, name="many", suite="imagenet")
    monkeypatch.setattr(catalog, "load_card", {"many": many, "digits": digits}.get)
    assert catalog.card_of("many-fog-3") is catalog.card_of("many") is many
    assert catalog.card_of("digits-of-mine") is None


def test_a_suite_with_a_module_of_its_own_is_read_through_it(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def own(**arguments: Any) -> VTABDataModule:
        asked.update(arguments)
        return VTABDataModule(task.name, tmp_path, train="train800")

    monkeypatch.setitem(catalog._MODULES, "signdigits10", (own, "dataset"))
    assert set(image_lists("signdigits10", tmp_path)) == {"train800", "val200", "test", "shift_sepia"}
    assert asked == {"dataset": "signdigits10", "root": tmp_path, "allow_partial": True}


def test_what_has_no_files_has_no_lists(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="made by this package"):
        image_lists("shapes", tmp_path)


def test_a_card_is_described_whole_and_in_lines_that_fit() -> None:
    card = Card(
        name="made_up",
        title="Made up",
        suite="imagenet",
        num_classes=1000,
        sizes={"test": 50_000},
        licence="one that is " + "very " * 30 + "long",
        source="https://example.org/made-up",
        citation="Nobody. 2026",
        class_names=[f"class number {number}" for number in range(1000)],
        layout="made_up/\n  images/      all of them",
        obtain="Ask.\nThen wait.",
        restrictions=["no-training"],
        published=[{"method": "linear", "backbone": "ViT", "accuracy": 9.5, "source": "a paper", "preset": "timm"}],
        notes="None.",
    )
    text = describe(card)
    assert max(map(len, text.splitlines())) <= 88
    for part in (
        "50,000",
        "test only",
        "  made_up/\n    images/",
        "  Ask.\n  Then wait.",
        "9.5  linear, ViT, preset timm",
    ):
        assert part in text
    assert " ".join(text.split()).endswith("class number 999")


@pytest.mark.parametrize("name", card_names())
def test_every_card_can_be_described(name: str) -> None:
    card = find_card(name)
    assert describe(card).startswith(card.title)
