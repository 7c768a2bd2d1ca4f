from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import vpt
from vpt.data.catalog.cards import load_card
from vpt.data.prepare import TASKS
from vpt.data.prepare.originals import choose, order

MANIFEST = Path(vpt.__file__).parent / "data" / "prepare" / "vtab_splits.tsv"


def manifest() -> Iterator[str]:
    yield "task\tlist\tfrom\tpart_size\tcount\tsha256\tpositions"
    for name, task in TASKS.items():
        split = task.split
        rules = {"train800": split.train, "val200": split.val, "test": split.test}
        for stem, chosen in choose(split, split.sizes).items():
            numbers = " ".join(map(str, chosen.positions.tolist()))
            digest, size = hashlib.sha256(numbers.encode()).hexdigest(), split.sizes[chosen.part]
            shown = "" if stem == "test" else numbers
            yield "\t".join(map(str, (name, stem, rules[stem], size, len(chosen.positions), digest, shown)))


def test_the_committed_manifest_is_what_the_rule_gives() -> None:
    assert list(manifest()) == MANIFEST.read_text().splitlines()


def test_the_manifest_can_be_checked_without_this_package() -> None:
    table = pd.read_csv(MANIFEST, sep="\t").set_index(["task", "list"])
    row = table.loc[("cifar", "train800")]
    hashes = sorted(range(50_000), key=lambda position: hashlib.sha256(str(position).encode()).digest())
    positions = " ".join(map(str, hashes[:45_000][:800]))
    assert row["positions"] == positions
    assert row["sha256"] == hashlib.sha256(positions.encode()).hexdigest()


def test_the_lists_have_the_sizes_of_the_card() -> None:
    table = pd.read_csv(MANIFEST, sep="\t").set_index(["task", "list"])["count"]
    for task in TASKS:
        card = load_card(task)
        assert card is not None
        assert table[task].to_dict() | {"train800val200": 1000} == card.sizes


@pytest.mark.parametrize("task", TASKS)
def test_no_image_is_in_two_lists(task: str) -> None:
    split = TASKS[task].split
    lists = choose(split, dict.fromkeys(split.sizes, 2500))
    images = [(chosen.part, position) for chosen in lists.values() for position in chosen.positions.tolist()]
    assert len(set(images)) == len(images) >= 1250


def test_ranges_are_those_of_the_published_split() -> None:
    sizes = {name: TASKS[name].split.sizes for name in ("cifar", "svhn", "oxford_iiit_pet", "dsprites_loc")}
    assert 50_000 * 90 // 100 == 45_000
    assert sizes["svhn"]["train"] * 90 // 100 == 65_931
    assert sizes["oxford_iiit_pet"]["trainval"] * 80 // 100 == 2_944
    assert sizes["dsprites_loc"]["train"] * 80 // 100 == 589_824
    val = choose(TASKS["svhn"].split, sizes["svhn"])["val200"].positions
    np.testing.assert_array_equal(val, order(73_257)[65_931 : 65_931 + 200])


def test_order_is_a_permutation_and_does_not_depend_on_what_follows() -> None:
    assert sorted(order(1000).tolist()) == list(range(1000))
    longer = order(1000)
    np.testing.assert_array_equal(longer[longer < 300], order(300))
