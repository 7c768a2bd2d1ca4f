from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import timm.data

from vpt.data.catalog import classes

ROOT = Path(__file__).parents[2]
FOLDER = Path(classes.__file__).parent


def rows(name: str) -> list[list[str]]:
    text = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    return [line.split("\t") for line in text.splitlines()[1:]]


@pytest.mark.parametrize(
    ("name", "sha256"),
    [
        ("imagenet_a", "973e8c3e530bf5dbd49999d046e74084ba5184ab98036b42b111d8dcdecf1015"),
        ("imagenet_r", "a1d9a9ace3098120f5db861d97049116efe80683f4e48c65a62f9bd30fc3366a"),
    ],
)
def test_the_ids_of_a_subset_are_the_published_ones(name: str, sha256: str) -> None:
    ids = classes.subset_ids(name)
    assert (len(ids), ids) == (200, sorted(ids))
    assert classes.ids_sha256(ids) == sha256


def test_a_and_r_share_86_classes() -> None:
    assert len(set(classes.subset_ids("imagenet_a")) & set(classes.subset_ids("imagenet_r"))) == 86


def test_objectnet_matches_125_ids_with_113_classes_of_which_nine_have_several() -> None:
    folders = classes.objectnet_folders()
    ids = [each for group in folders.values() for each in group]
    assert (len(folders), len(ids), len(set(ids))) == (113, 125, 125)
    assert classes.ids_sha256(ids) == "c0cf4c952efbb7da9721bf339aadd36ca26f74c4515906ff4706765538790436"
    assert all(list(group) == sorted(group) for group in folders.values())
    several = {folder for folder, group in folders.items() if len(group) > 1}
    assert several == {"alarm_clock", "bicycle", "chair", "helmet", "pen", "skirt", "still_camera", "tie", "wheel"}


def test_objectnet_folders_match_what_they_are_called() -> None:
    names, folders = classes.imagenet_names(), classes.objectnet_folders()
    assert [names[each] for each in folders["alarm_clock"]] == ["analog clock", "digital clock"]
    assert [names[each] for each in folders["full_sized_towel"]] == ["bath towel"]
    assert [names[each] for each in folders["pop_can"]] == ["pop bottle"]


def test_imagenet_ids_are_the_order_of_the_wordnet_ids_and_all_names_differ() -> None:
    wnids, names = classes.imagenet_wnids(), classes.imagenet_names()
    assert wnids == sorted(wnids)
    assert (len(wnids), len(set(names))) == (1000, 1000)
    assert (wnids[0], names[0], wnids[999], names[999]) == ("n01440764", "tench", "n15075141", "toilet tissue")
    assert (names[134], names[517]) == ("crane (n02012849)", "crane (n03126707)")
    info = timm.data.ImageNetInfo()
    assert wnids == [info.index_to_label_name(label) for label in range(1000)]


def test_the_kept_script_writes_the_shipped_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("make", ROOT / "datasets" / "classes" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    lemmas = dict(line.split("\t") for line in make.lines("imagenet_synset_to_lemma.txt"))
    synonyms = [lemmas[wnid] for wnid in classes.imagenet_wnids()]
    matched = {name: "; ".join(synonyms[int(each)] for each in ids.split(",")) for _, name, ids in rows("objectnet")}
    folders = {"air_freshener": "Air freshener"} | {folder: name for folder, name, _ in rows("objectnet")}
    (tmp_path / "objectnet_to_imagenet_1k.json").write_text(json.dumps(matched))
    (tmp_path / "folder_to_objectnet_label.json").write_text(json.dumps(folders))
    monkeypatch.setattr(make, "TARGET", tmp_path / "made")
    make.main(tmp_path)
    made = {file.name: file.read_bytes() for file in (tmp_path / "made").iterdir()}
    assert made == {file.name: file.read_bytes() for file in FOLDER.glob("*.txt")}
    assert len(made) == 4
