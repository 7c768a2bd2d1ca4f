from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes import make_folder, make_task
from tests.fakes_suites import make_imagenet
from vpt.data.catalog.cards import card_names, find_card

from .conftest import Vpt


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_list_names_every_dataset_and_fits_a_terminal(vpt: Vpt, tmp_path: Path) -> None:
    make_task(tmp_path / "signdigits10", classes=10, size=(8, 8))
    answer = vpt("data", "list", "--root", str(tmp_path))
    assert answer.status == 0, answer.err
    lines = {line.split()[0]: line for line in answer.out.splitlines() if line.startswith("  ")}
    assert sorted(lines) == card_names()
    assert "1,000 + 983 60 + 30" in " ".join(lines["signdigits10"].split())
    assert " – " in lines["caltech101"]
    assert "built in" in lines["digits"]
    assert max(map(len, answer.out.splitlines())) <= 80


def test_list_says_why_it_cannot_read_what_is_here(vpt: Vpt, tmp_path: Path) -> None:
    make_task(tmp_path / "signdigits10", classes=11, size=(8, 8))
    (tmp_path / "signdigits10" / "test.txt").write_text("nonsense\n")
    answer = vpt("data", "list", "--root", str(tmp_path))
    assert "see below" in answer.out
    assert "test.txt, line 1: expected" in answer.out


def test_list_says_what_is_counted(vpt: Vpt, tmp_path: Path) -> None:
    make_imagenet(tmp_path, "imagenet_c")
    make_imagenet(tmp_path, "imagenet_1k")
    out = vpt("data", "list", "--root", str(tmp_path)).out
    lines = {line.split()[0]: " ".join(line.split()) for line in out.splitlines() if line.startswith("  ")}
    assert "1,000 95 × 50,000 4 of 95 sets" in lines["imagenet_c"]
    assert "1,000 1,281,167 + 50,000 60 + 6" in lines["imagenet_1k"]
    assert lines["objectnet"].startswith("objectnet 113 18,574 –")
    assert lines["imagenet_a"].startswith("imagenet_a 200 ")
    assert "classes     113 of 1,000" in vpt("data", "show", "objectnet").out


def test_show_prints_the_card(vpt: Vpt) -> None:
    answer = vpt("data", "show", "vtab/caltech101")
    assert answer.status == 0
    assert "test 6,084" in answer.out
    assert "yin_yang" in answer.out


def test_verify_reports_and_succeeds_on_a_whole_task(vpt: Vpt, task: Path) -> None:
    answer = vpt("data", "verify", task.name, "--root", str(task.parent))
    assert answer.status == 0, answer.err
    assert "train800val200      18         –   3 of 3        6–6" in answer.out
    assert "✓ every image" in answer.out


def test_verify_lists_all_faults_and_fails_with_one_sentence(vpt: Vpt, tmp_path: Path) -> None:
    task = make_task(tmp_path / "signdigits10", classes=10, per_class=(80, 20, 1), size=(8, 8))
    (task / "images/test/class 3/0.jpg").unlink()
    answer = vpt("data", "verify", "local/signdigits10", "--root", str(task.parent))
    assert answer.sentence == (
        "signdigits10 is not as it should be: test has 10 images and officially 983 (and 1 more, see above)."
    )
    assert sum(line.startswith("✗") for line in answer.out.splitlines()) == 2


def test_verify_takes_your_own_images_and_fits_a_terminal(vpt: Vpt, tmp_path: Path) -> None:
    photos = make_folder(tmp_path / "photos", {"train": 3, "val": 1, "test": 2})
    assert vpt("data", "verify", "photos").status == 0
    (photos / "test/cat/0.jpg").write_bytes((photos / "train/cat/0.jpg").read_bytes())
    (photos / "train/dog/1.jpg").write_bytes((photos / "train/dog/0.jpg").read_bytes())
    answer = vpt("data", "verify", str(photos))
    assert "a test image is a training or validation image too" in answer.sentence
    assert "! 1 times a training image is there twice" in answer.out
    assert all(len(line) <= 80 or line.split()[0].startswith("/") for line in answer.out.splitlines())
    assert "dataset, folder or table" in vpt("data", "verify", "nothing").sentence


def test_verify_prefers_your_own_images_to_a_generated_task_of_their_name(vpt: Vpt) -> None:
    make_folder(Path("shapes"), {"train": 3, "test": 2})
    answer = vpt("data", "verify", "shapes")
    assert answer.status == 0, answer.err
    assert "train (held out)" in answer.out


def test_steps_by_hand_name_the_address(vpt: Vpt) -> None:
    cards = [card for card in map(find_card, card_names()) if card.suite == "vtab"]
    assert not any("above" in card.obtain or "{" in card.obtain for card in cards)
    by_hand = [card for card in cards if not card.downloads]  # the others would be fetched
    assert "kitti" in {card.name for card in by_hand}
    for card in by_hand:
        answer = vpt("data", "prepare", f"vtab/{card.name}")
        assert answer.status == 1
        assert "http" in answer.err


def test_a_cache_that_is_a_file_is_named(vpt: Vpt, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.txt").write_text("mine")
    monkeypatch.setenv("VPT_CACHE", "mine.txt")
    assert vpt("data", "cache", "--clear").sentence == "VPT_CACHE is mine.txt, a file: set it to a folder."


def test_the_root_is_that_of_the_environment(vpt: Vpt, task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VPT_DATA", str(task.parent))
    assert vpt("data", "verify", task.name).status == 0


def test_the_cache_is_measured_and_cleared(
    vpt: Vpt, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vpt.data import VTABDataModule

    monkeypatch.setenv("VPT_CACHE", str(tmp_path / "cache"))
    assert vpt("data", "cache").out == f"0 files, 0.0 MB in {tmp_path / 'cache'}\n"
    VTABDataModule(task.name, task.parent).split("test")
    kept = tmp_path / "cache" / "mine.txt"
    kept.write_text("not ours")
    assert vpt("data", "cache").out.startswith("1 file, 1.4 MB in ")
    assert vpt("data", "cache", "--clear").out.startswith("1 file, 1.4 MB removed from ")
    assert list(kept.parent.iterdir()) == [kept]


def test_the_gallery_is_drawn_of_any_image(vpt: Vpt, task: Path) -> None:
    image = str(next(task.rglob("*.jpg")))
    answer = vpt("data", "corruptions", "--out", "gallery.png", "--image", image)
    assert answer.status == 0, answer.err
    assert Path("gallery.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "part"),
    [
        ([], "ACTION"),
        (["lost"], "invalid choice"),
        (["show"], "name"),
        (["show", "caltech11"], "did you mean 'caltech101'?"),
        (["verify", "digits"], "made by this package"),
        (["verify", "caltech11"], "did you mean 'caltech101'?"),
        (["prepare", "digits"], "nothing to prepare"),
        (["prepare", "caltech11"], "did you mean"),
        (["corruptions", "--out=a.png", "--image=none.jpg"], "none.jpg does not exist"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(vpt: Vpt, args: list[str], part: str) -> None:
    assert part in vpt("data", *args).sentence


@pytest.mark.slow
@pytest.mark.parametrize("name", ["signdigits10", "pacs7_photo"])
def test_real_tasks_are_whole_and_no_image_is_in_two_splits(vpt: Vpt, real_data: Path, name: str) -> None:
    answer = vpt("data", "verify", name, "--root", str(real_data))
    assert answer.status == 0, answer.err


@pytest.mark.slow
def test_the_subset_of_caltech101_is_told_from_the_official_test_set(vpt: Vpt, real_data: Path) -> None:
    answer = vpt("data", "verify", "caltech101", "--root", str(real_data))
    assert answer.sentence == "caltech101 is not as it should be: test has 1,530 images and officially 6,084."
