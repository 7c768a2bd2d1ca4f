from __future__ import annotations

import pytest

from vpt.data.catalog.cards import card_names, load_card

NAMES = card_names()
VTAB = {"train800", "val200", "train800val200", "test"}
LISTS = {
    "vtab": VTAB,
    "demo": VTAB,
    "fgvc": {"train", "val", "trainval", "test"},
    "imagenet": {"test"},
    "local": {"test"},
}


@pytest.mark.parametrize("name", NAMES)
def test_every_card_is_whole(name: str) -> None:
    card = load_card(name)
    assert card is not None
    assert card.name == name
    assert set(card.sizes) >= LISTS[card.suite]
    assert all(isinstance(value, int) for value in card.sizes.values())
    assert all(isinstance(value, str) for value in card.class_names)
    assert all((card.title, card.licence, card.source, card.citation))
    assert card.suite not in {"fgvc", "imagenet"} or (card.layout and card.obtain)
    assert all(file.urls and (file.sha256 or file.md5) for file in card.downloads)
    assert all({"method", "backbone", "accuracy", "source"} <= set(row) for row in card.published)


def test_caltech101_has_the_official_sizes_and_the_published_number() -> None:
    card = load_card("caltech101")
    assert card is not None
    assert (card.num_classes, card.sizes["test"]) == (102, 6084)
    assert [row["accuracy"] for row in card.published if row["method"] == "vpt_deep"] == [90.8]


def test_caltech101_is_numbered_as_in_tensorflow_datasets() -> None:
    """TFDS writes all names in lower case; caltech101_vtab of LAION's CLIP benchmark, which reads it, agrees."""
    card = load_card("caltech101")
    assert card is not None
    assert card.class_names == sorted(card.class_names, key=str.lower)
    numbers = {"accordion": 0, "BACKGROUND_Google": 4, "ewer": 36, "Faces": 37, "Faces_easy": 38, "Leopards": 57}
    assert {name: card.class_names.index(name) for name in numbers} == numbers
    assert [card.class_names.index(name) for name in ("Motorbikes", "nautilus", "yin_yang")] == [66, 67, 101]


@pytest.mark.parametrize("name", ["", "nothing", "../presets"])
def test_unknown_dataset_has_no_card(name: str) -> None:
    assert load_card(name) is None
