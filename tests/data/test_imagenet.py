from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.fakes_suites import make_class_folders, make_imagenet, picture
from vpt.data import ImageNetDataModule
from vpt.data.catalog.cards import load_card
from vpt.data.catalog.classes import imagenet_wnids, objectnet_folders, subset_ids
from vpt.data.corruptions import CORRUPTIONS
from vpt.data.datasets.imagenet import VARIANTS
from vpt.errors import ConfigError, DataError, UnknownNameError, VPTWarning

CARDS = [card for card in VARIANTS if card != "flickr_in1k_1000"]
SETS = {card: "imagenet_c-gaussian_noise-3" if card == "imagenet_c" else card for card in CARDS}
SIZES = {
    "imagenet_1k": 50000,
    "imagenet_v2": 10000,
    "imagenet_r": 30000,
    "imagenet_a": 7500,
    "imagenet_sketch": 50889,
    "objectnet": 18574,
    "imagenet_c": 50000,
}
every = pytest.mark.parametrize("card", CARDS)


def module(root: Path, variant: str, **options: Any) -> ImageNetDataModule:
    return ImageNetDataModule(variant, root, **({"image_size": 16, "allow_partial": True} | options))


def official(monkeypatch: pytest.MonkeyPatch, card: str, **sizes: int) -> None:
    """Makes other numbers of images the official ones of a card."""
    real = load_card(card)
    assert real is not None
    changed = replace(real, sizes=real.sizes | sizes)
    monkeypatch.setattr(
        "vpt.data.datasets.imagenet.find_card", lambda name: changed if name == card else load_card(name)
    )


@every
def test_labels_are_imagenet_ids_by_the_name_of_the_folder(tmp_path: Path, card: str) -> None:
    make_imagenet(tmp_path, card)
    data = module(tmp_path, SETS[card])
    assert (data.num_classes, len(set(data.class_names))) == (1000, 1000)
    test = data.split("test")
    assert test.images.shape == (6 if card != "objectnet" else 4, 3, 16, 16)
    wnids, folders = imagenet_wnids(), objectnet_folders()
    for path, label in zip(test.paths, test.labels, strict=True):
        folder = path.split("/")[0]
        if card == "imagenet_v2":
            assert int(folder) == label
        elif card == "objectnet":
            assert folders[folder][0] == label
        else:
            assert wnids[label] == folder


@every
def test_a_description_says_that_a_copy_is_partial(tmp_path: Path, card: str) -> None:
    make_imagenet(tmp_path, card)
    described = module(tmp_path, SETS[card]).describe()
    assert json.loads(json.dumps(described)) == described
    assert (described["name"], described["partial"], described["complete"]) == (SETS[card], True, False)
    assert described["official_counts"]["test"] == SIZES[card]


@every
def test_a_missing_root_is_answered_with_the_expected_tree(tmp_path: Path, card: str) -> None:
    with pytest.raises(DataError) as caught:
        module(tmp_path / "nowhere", SETS[card])
    expected = load_card(card)
    assert expected is not None
    assert str(caught.value).startswith(f"{tmp_path / 'nowhere'} does not exist; set VPT_DATA")
    assert expected.layout.strip() in str(caught.value)
    assert expected.obtain.strip() in str(caught.value)


@every
def test_missing_class_folders_are_an_error_that_names_the_first(tmp_path: Path, card: str) -> None:
    folder = make_imagenet(tmp_path, card)
    classes = {"imagenet_r": 200, "imagenet_a": 200, "objectnet": 113}.get(card, 1000)
    found = 2 if card == "objectnet" else 3
    message = rf"{re.escape(str(folder))} holds {found} of {classes} class folders, \S+ is missing"
    with pytest.raises(DataError, match=message):
        module(tmp_path, SETS[card], allow_partial=False)


@every
def test_an_empty_class_folder_is_an_error(tmp_path: Path, card: str) -> None:
    folder = make_imagenet(tmp_path, card, classes=1000, each=1)
    victim = folder / ("backpack" if card == "objectnet" else "1" if card == "imagenet_v2" else "n07720875")
    for file in victim.iterdir():
        file.rename(file.with_suffix(".txt"))
    with pytest.raises(DataError, match=re.escape(f"{victim} is a class folder without images")):
        module(tmp_path, SETS[card], allow_partial=False)
    with pytest.warns(VPTWarning, match=r"Not read of .*: 1 of [\d,]+ files \(1 \.txt\)"):
        partial = module(tmp_path, SETS[card])
    assert partial.describe()["partial"] is True


@pytest.mark.parametrize(("card", "sizes"), [("imagenet_r", 200), ("imagenet_a", 200), ("objectnet", 113)])
def test_wrong_counts_are_errors_and_right_ones_complete(
    tmp_path: Path, card: str, sizes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_imagenet(tmp_path, card, classes=300, each=1)
    with pytest.raises(DataError, match=f"{card}: found {sizes} images, expected {SIZES[card]:,}; complete the copy"):
        module(tmp_path, card, allow_partial=False)
    official(monkeypatch, card, test=sizes)
    described = module(tmp_path, card, allow_partial=False).describe()
    assert (described["partial"], described["complete"]) == (False, True)
    assert described["classes"]["test"]["number"] == sizes


def test_only_the_classes_of_a_set_count(tmp_path: Path) -> None:
    for card in ("imagenet_r", "imagenet_a", "objectnet", "imagenet_sketch"):
        make_imagenet(tmp_path, card)
    data = module(tmp_path, "imagenet_r", shifts=["imagenet_a", "objectnet", "imagenet_sketch"])
    assert data.shift_names() == ["imagenet_a", "objectnet", "imagenet_sketch"]
    assert data.groups() == tuple((each,) for each in subset_ids("imagenet_r"))
    assert data.groups("imagenet_a") == tuple((each,) for each in subset_ids("imagenet_a"))
    objectnet = data.groups("objectnet")
    assert objectnet is not None
    assert set(objectnet) == set(objectnet_folders().values())
    assert {group[0] for group in objectnet} >= set(data.split("objectnet").labels)
    assert data.groups("imagenet_sketch") is None
    described = data.describe()["classes"]
    assert {name: entry["number"] for name, entry in described.items()} == {
        "test": 200, "imagenet_a": 200, "objectnet": 113,
    }  # fmt: skip
    assert described["objectnet"]["ids_sha256"].startswith("c0cf4c952efb")


def test_of_objectnet_the_classes_that_match_none_are_left_out(tmp_path: Path) -> None:
    folder = make_imagenet(tmp_path, "objectnet")
    assert sorted(path.name for path in folder.iterdir()) == ["air_freshener", "alarm_clock", "backpack"]
    assert {path.split("/")[0] for path in module(tmp_path, "objectnet").split("test").paths} == {
        "alarm_clock",
        "backpack",
    }


def test_objectnets_border_is_really_cut_off_and_the_record_says_so(tmp_path: Path) -> None:
    folder = make_imagenet(tmp_path, "objectnet", classes=2, each=1)
    pixels = np.full((20, 20, 3), (255, 0, 0), np.uint8)
    pixels[2:-2, 2:-2] = (0, 0, 255)
    file = next((folder / "alarm_clock").iterdir())
    Image.fromarray(pixels).save(file.with_suffix(".png"))
    file.unlink()
    for crop, border in ((True, [0, 0, 255]), (False, [255, 0, 0])):
        data = module(tmp_path, "objectnet", crop_border=crop, preset="square")
        image = data.split("test").images[0]
        assert image[:, 0, 0].tolist() == border
        assert image[:, 8, 8].tolist() == [0, 0, 255]
        assert data.describe()["crop_border"] is crop
    make_imagenet(tmp_path, "imagenet_r")
    assert module(tmp_path, "imagenet_r").describe()["crop_border"] is None


def test_an_image_that_is_all_border_is_named(tmp_path: Path) -> None:
    folder = make_imagenet(tmp_path, "objectnet", classes=2, each=1)
    file = next((folder / "alarm_clock").iterdir())
    Image.new("RGB", (4, 9)).save(file)
    with pytest.raises(DataError, match=re.escape(f"{file} has (4, 9) pixels, no more than its border")):
        module(tmp_path, "objectnet").split("test")


@pytest.mark.parametrize("card", [card for card in CARDS if card != "imagenet_1k"])
def test_test_sets_cannot_be_trained_on(tmp_path: Path, card: str) -> None:
    make_imagenet(tmp_path, card)
    why = "must never be trained on, its licence says" if card == "objectnet" else "is a test set"
    data = module(tmp_path, SETS[card])
    for stage in ("fit", "validate"):
        with pytest.raises(ConfigError, match=why):
            data.setup(stage)
    data.setup("test")
    with pytest.raises(ConfigError, match=why):
        module(tmp_path, SETS[card], train="train")


def test_objectnet_is_the_one_set_whose_card_forbids_training() -> None:
    restricted = [card for card in CARDS if (found := load_card(card)) and found.restrictions]
    assert restricted == ["objectnet"]


def test_one_in_fifty_training_images_is_val_and_the_train_folder_is_read_when_asked_for(tmp_path: Path) -> None:
    make_imagenet(tmp_path, "imagenet_1k")
    data = module(tmp_path, "imagenet_1k", train="train")
    assert data.describe()["counts"] == {"train": 58, "val": 2, "test": 6}
    assert data.describe()["shared_with_train"] == {"val": 0, "test": 0}
    for folder in (tmp_path / "imagenet_1k" / "train").iterdir():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    only = module(tmp_path, "imagenet_1k")
    assert only.describe()["counts"] == {"train": 0, "val": 0, "test": 6}
    with pytest.raises(ConfigError, match="are read with train=train only"):
        only.setup("fit")
    with pytest.raises(DataError, match="holds 0 of 1000 class folders"):
        module(tmp_path, "imagenet_1k", train="train")
    with pytest.raises(ConfigError, match="has one list to train on"):
        module(tmp_path, "imagenet_1k", train="train800")


def test_the_sizes_of_val_follow_from_the_1281167_training_images() -> None:
    card = load_card("imagenet_1k")
    assert card is not None
    assert (card.sizes["train"] + card.sizes["val"], card.sizes["val"]) == (1281167, -(-1281167 // 50))


def test_a_flat_validation_folder_is_answered_with_the_layout(tmp_path: Path) -> None:
    (tmp_path / "imagenet" / "val").mkdir(parents=True)
    (tmp_path / "imagenet" / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(picture())
    with pytest.raises(DataError, match=r"holds 0 of 1000 class folders(.|\n)*published flat, to be sorted by class"):
        module(tmp_path, "imagenet_1k")


def test_v2_with_wordnet_ids_is_refused_with_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / "imagenetv2-matched-frequency-format-val"
    make_class_folders(folder, imagenet_wnids()[:2], each=20)
    with pytest.raises(DataError, match=r"n0144\d+: ImageNet-V2's folders are the numbers 0\.\.999"):
        module(tmp_path, "imagenet_v2")


def test_v2_with_20_images_a_class_is_refused_with_the_reason(tmp_path: Path) -> None:
    make_class_folders(tmp_path / "imagenet_v2", ["0", "1", "2", "10"], each=10)
    assert np.bincount(module(tmp_path, "imagenet_v2").split("test").labels).tolist() == [10] * 3 + [0] * 7 + [10]
    make_class_folders(tmp_path / "imagenet_v2", ["2"], each=20)
    with pytest.raises(DataError, match="2 has 20 images, no class of ImageNet-V2 has more than 10"):
        module(tmp_path, "imagenet_v2")


def test_v2_folder_10_comes_after_folder_2(tmp_path: Path) -> None:
    make_class_folders(tmp_path / "imagenet_v2", ["0", "2", "10", "100"])
    assert module(tmp_path, "imagenet_v2").split("test").labels.tolist() == [0, 2, 10, 100]


@pytest.mark.parametrize("card", ["imagenet_r", "imagenet_sketch", "imagenet_v2"])
def test_a_folder_that_is_no_class_is_named(tmp_path: Path, card: str) -> None:
    folder = make_imagenet(tmp_path, card)
    make_class_folders(folder, ["imagenet_r_extra"])
    (folder / "README.txt").write_text("files are not classes")
    with pytest.raises(DataError, match=re.escape(f"{folder / 'imagenet_r_extra'} is no class of {card}")):
        module(tmp_path, card)


def test_imagenet_c_is_never_enlarged_nor_cropped(tmp_path: Path) -> None:
    folder = tmp_path / "imagenet_c" / "fog" / "2" / "n01440764"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    for preset in ("timm", "square", "vpt"):
        image = module(tmp_path, "imagenet_c-fog-2", preset=preset, image_size=224).split("test").images[0]
        np.testing.assert_array_equal(image, pixels.transpose(2, 0, 1))
    with pytest.raises(ConfigError, match="image_size is 384, ImageNet-C has 224×224 pixels"):
        module(tmp_path, "imagenet_c-fog-2", image_size=384)
    make_imagenet(tmp_path, "imagenet_1k")
    with pytest.raises(ConfigError, match="image_size is 384"):
        module(tmp_path, "imagenet_1k", shifts=["imagenet_c-fog-2"], image_size=384)


def test_imagenet_c_has_19_kinds_at_five_severities(tmp_path: Path) -> None:
    assert len(set(CORRUPTIONS)) == 19
    for variant, message in (
        ("imagenet_c", "is 95 test sets: name one by kind and severity"),
        ("imagenet_c-fogg-3", "did you mean 'fog'"),
        ("imagenet_c-fog-6", "Unknown severity of ImageNet-C '6': [Kk]nown are 1, 2, 3, 4, 5"),
        ("imagenet_r-fog-3", "Unknown ImageNet test set"),
        ("imagenet-r", "did you mean 'imagenet_r'"),
    ):
        with pytest.raises((UnknownNameError, DataError), match=message):
            module(tmp_path, variant)
    make_imagenet(tmp_path, "imagenet_c")
    make_imagenet(tmp_path, "imagenet_1k")
    assert module(tmp_path, "imagenet_1k", shifts=["imagenet_c-fog-3"]).shift_names() == ["imagenet_c-fog-3"]
    with pytest.raises(DataError, match=r"gaussian_noise/2 does not exist"):
        module(tmp_path, "imagenet_1k", shifts=["imagenet_c"])
    with pytest.raises(DataError, match=r"fog/5 does not exist; the expected layout is"):
        module(tmp_path, "imagenet_c-fog-5")


def test_a_set_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="The test set imagenet_r is named twice"):
        module(tmp_path, "imagenet_r", shifts=["imagenet_r"])


def test_non_ascii_names_and_hidden_files(tmp_path: Path) -> None:
    folder = make_imagenet(tmp_path / "données été", "imagenet_a", classes=1, each=1)
    file = next(folder.rglob("*.JPEG"))
    file.rename(file.with_name("mésange 鳥.jpg"))
    file.with_name("._mésange.jpg").write_bytes(b"left by a Mac")
    with pytest.warns(VPTWarning, match=r"Not read of .*imagenet-a: 1 of 2 files \(1 hidden\)"):
        data = module(tmp_path / "données été", "imagenet_a")
    assert data.split("test").paths == [f"{file.parent.name}/mésange 鳥.jpg"]


def test_a_text_file_named_jpg_is_named(tmp_path: Path) -> None:
    file = next(make_imagenet(tmp_path, "imagenet_r").rglob("*.JPEG"))
    file.write_text("not found")
    with pytest.raises(DataError, match=re.escape(f"{file} is not an image; restore the file from the archive")):
        module(tmp_path, "imagenet_r").split("test")


def test_photos_with_imagenet_labels_in_a_table(tmp_path: Path) -> None:
    folder = tmp_path / "flickr_in1k_1000"
    make_class_folders(folder, ["images"], each=3)
    table = folder / "labels.csv"
    names = sorted(path.name for path in (folder / "images").iterdir())
    table.write_text("file,in1k_index_0based\n" + "".join(f"images/{name},{i * 400}\n" for i, name in enumerate(names)))
    data = module(tmp_path, "flickr_in1k_1000")
    assert data.split("test").labels.tolist() == [0, 400, 800]
    assert data.groups() is None
    for text, message in (
        (f"file,in1k_index_0based\nimages/{names[0]},1000\n", r"line 2: label 1000 is outside 0\.\.999"),
        (f"file,in1k_index_0based\nimages/{names[0]},1\nimages/{names[0]},2\n", "is listed twice, as number 1 and 2"),
        ("file,label\n", "has no column 'in1k_index_0based'; it has 'file', 'label'"),
        ("file,in1k_index_0based\na.jpg,dog\n", "line 2: 'dog' is no whole number"),
    ):
        table.write_text(text)
        with pytest.raises(DataError, match=message):
            module(tmp_path, "flickr_in1k_1000")
