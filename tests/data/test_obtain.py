from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.mirror import Mirror
from vpt.data.catalog import download as home
from vpt.data.catalog.cards import Card, Download
from vpt.data.catalog.download import obtain
from vpt.data.images import ImageList
from vpt.errors import DataError, UnknownNameError

LABELS = b"labels"


def archive(name: str = "original/image.txt") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        info = tarfile.TarInfo(name)
        info.size = 3
        file.addfile(info, io.BytesIO(b"one"))
    return buffer.getvalue()


def made_up(suite: Any, files: dict[str, tuple[str, bytes]], **changes: Any) -> Card:
    """A card whose files come from these servers: name -> (address, what its checksum is of)."""
    downloads = [
        Download(name, [url], sha256=hashlib.sha256(content).hexdigest(), extract=name.endswith("gz"))
        for name, (url, content) in files.items()
    ]
    values: dict[str, Any] = {
        "title": "Made up",
        "num_classes": 2,
        "sizes": {},
        "licence": "l",
        "source": "s",
        "citation": "c",
    }
    return Card(name="made_up", suite=suite, downloads=downloads, **values | changes)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[[Card], None]:
    return lambda card: monkeypatch.setattr(home, "find_card", lambda name: card)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands for `vpt.data.prepare` and keeps what it was called with."""
    calls: list[Any] = []

    def prepare(task: str, source: Path, root: Path, allow_partial: bool) -> Path:
        calls.append((task, source, root, allow_partial))
        return root / task

    monkeypatch.setattr(home, "prepare", prepare)
    return calls


def test_an_original_on_the_disk_is_prepared_without_the_network(prepared: list[Any], tmp_path: Path) -> None:
    assert obtain("caltech101", tmp_path, tmp_path / "original") == tmp_path / "caltech101"
    assert prepared == [("caltech101", tmp_path / "original", tmp_path, False)]


def test_an_original_is_fetched_unpacked_and_prepared_and_all_of_it_once(
    card: Callable[[Card], None], prepared: list[Any], mirrors: Callable[..., Mirror], tmp_path: Path
) -> None:
    packed = archive()
    images, labels = mirrors(content=packed), mirrors(content=LABELS)
    card(made_up("vtab", {"images.tar.gz": (images.url, packed), "labels.mat": (labels.url, LABELS)}))
    for _ in range(2):
        assert obtain("made_up", tmp_path) == tmp_path / "made_up"
    source = tmp_path / "downloads" / "made_up"
    assert prepared == [("made_up", source, tmp_path, False)] * 2
    assert (source / "original" / "image.txt").read_bytes() == b"one"
    assert (source / "labels.mat").read_bytes() == LABELS
    assert len(images.ranges) == len(labels.ranges) == 1


def test_what_is_read_as_published_is_unpacked_where_it_is_looked_for(
    card: Callable[[Card], None], mirrors: Callable[..., Mirror], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def lists(name: str, root: Path) -> dict[str, ImageList]:
        read.append(name)
        return {}

    monkeypatch.setattr(home, "image_lists", lists)
    packed = archive()
    server = mirrors(content=packed)
    card(made_up("fgvc", {"images.tar.gz": (server.url, packed)}))
    image = tmp_path / "made_up" / "original" / "image.txt"
    for _ in range(2):
        assert obtain("made_up", tmp_path) == tmp_path / "made_up"
        assert image.read_bytes() == b"one"
        shutil.rmtree(image.parent)
    obtain("made_up", tmp_path)
    image.write_bytes(b"o")
    obtain("made_up", tmp_path)
    assert image.read_bytes() == b"one"
    assert read == ["made_up"] * 4
    assert len(server.ranges) == 1


def test_an_archive_that_escapes_is_refused_and_unpacked_no_second_time(
    card: Callable[[Card], None], mirrors: Callable[..., Mirror], tmp_path: Path
) -> None:
    packed = archive("../../evil")
    card(made_up("fgvc", {"images.tar.gz": (mirrors(content=packed).url, packed)}))
    for _ in range(2):
        with pytest.raises(DataError, match="leads out of the folder"):
            obtain("made_up", tmp_path / "root")
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize(
    ("suite", "then"), [("vtab", "vpt data prepare made_up --source FOLDER"), ("imagenet", "put the folder at")]
)
def test_what_may_not_be_fetched_gives_the_steps_of_its_card(
    card: Callable[[Card], None], suite: str, then: str, tmp_path: Path
) -> None:
    card(made_up(suite, {}, obtain="Register at example.org.", layout="made_up/\n  images/"))
    with pytest.raises(DataError) as caught:
        obtain("made_up", tmp_path)
    for part in ("Register at example.org.", then, "made_up/\n  images/"):
        assert part in str(caught.value)


def test_an_original_of_what_is_read_as_published_is_not_turned_into_anything(
    card: Callable[[Card], None], tmp_path: Path
) -> None:
    card(made_up("fgvc", {}))
    with pytest.raises(DataError, match=r"^--source is for VTAB tasks only: made_up is read as .* put the folder at"):
        obtain("made_up", tmp_path, tmp_path)
    card(made_up("fgvc", {"a.gz": ("https://example.org/a.gz", b"")}))
    with pytest.raises(DataError, match=r"put the folder at .*, or leave --source out to fetch it"):
        obtain("made_up", tmp_path, tmp_path)


def test_what_was_fetched_and_is_not_the_dataset_is_not_ready(
    card: Callable[[Card], None], mirrors: Callable[..., Mirror], tmp_path: Path
) -> None:
    packed = archive()
    made = made_up("fgvc", {"images.tar.gz": (mirrors(content=packed).url, packed)})
    card(replace(made, name="cub_200_2011"))
    with pytest.raises(DataError, match="cub_200_2011/images does not exist"):
        obtain("cub_200_2011", tmp_path)


def test_tasks_of_the_same_files_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [Download("a.zip", ["https://example.org/a.zip"])]
    cards = {name: made_up("vtab", {}) for name in ("clevr_count", "clevr_dist", "other")}
    for name, card in cards.items():
        vars(card).update(name=name, downloads=[] if name == "other" else files)
    monkeypatch.setattr(home, "card_names", lambda: list(cards))
    monkeypatch.setattr(home, "find_card", cards.__getitem__)
    assert home._shared(cards["clevr_dist"]) == home._shared(cards["clevr_count"]) == "clevr_count"


def test_what_needs_nothing_or_does_not_exist_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="made by this package"):
        obtain("digits", tmp_path)
    with pytest.raises(UnknownNameError, match="caltech101"):
        obtain("caltech11", tmp_path)
