from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.mirror import Mirror
from vpt.data.catalog import download
from vpt.data.catalog.cards import Download
from vpt.data.catalog.download import fetch
from vpt.errors import DataError

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256, MD5 = hashlib.sha256(CONTENT).hexdigest(), hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()


@pytest.fixture
def serve(mirrors: Callable[..., Mirror]) -> Callable[..., Mirror]:
    """Starts a server of the file, or of other content."""
    return lambda *faults, **settings: mirrors(*faults, **{"content": CONTENT} | settings)


def wanted(*mirrors: Mirror, **changes: Any) -> Download:
    return Download(**{"file": "data.bin", "urls": [mirror.url for mirror in mirrors], "sha256": SHA256} | changes)


def get(download: Download, folder: Path, timeout: float = 10.0) -> Path:
    return fetch(download, folder, timeout, pause=0.0)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("stated", [{}, {"size": 300_000}, {"sha256": None, "md5": MD5}, {"sha256": SHA256.upper()}])
def test_a_file_is_fetched_once_and_leaves_nothing_else(
    serve: Callable[..., Mirror], tmp_path: Path, stated: dict[str, Any]
) -> None:
    mirror = serve()
    for _ in range(2):
        path = get(wanted(mirror, **stated), tmp_path / "new")
        assert path.read_bytes() == CONTENT
    assert mirror.ranges == [None]
    assert names(tmp_path / "new") == ["data.bin"]


def test_a_connection_that_is_cut_is_resumed_where_it_stopped(serve: Callable[..., Mirror], tmp_path: Path) -> None:
    mirror = serve("cut", "cut", "")
    assert get(wanted(mirror), tmp_path).read_bytes() == CONTENT
    assert mirror.ranges == [None, "bytes=150000-", "bytes=225000-"]


def test_a_stalled_connection_is_given_up_and_resumed(serve: Callable[..., Mirror], tmp_path: Path) -> None:
    mirror = serve("stall", "")
    assert get(wanted(mirror), tmp_path, timeout=0.5).read_bytes() == CONTENT
    assert mirror.ranges == [None, "bytes=150000-"]


def test_a_later_call_goes_on_where_an_earlier_one_stopped(serve: Callable[..., Mirror], tmp_path: Path) -> None:
    mirror = serve("cut", 404)
    with pytest.raises(DataError, match="HTTP 404"):
        get(wanted(mirror), tmp_path)
    assert names(tmp_path) == ["data.bin.part", "data.bin.part.json"]
    mirror.faults = [""]
    assert get(wanted(mirror), tmp_path).read_bytes() == CONTENT
    assert mirror.ranges[-1] == "bytes=150000-"


def test_another_mirror_goes_on_with_the_bytes_of_the_first(serve: Callable[..., Mirror], tmp_path: Path) -> None:
    first, second = serve("cut", 503), serve(version='"its own"')
    assert get(wanted(first, second), tmp_path).read_bytes() == CONTENT
    assert second.ranges == ["bytes=150000-"]


def test_without_a_checksum_another_mirror_begins_anew(serve: Callable[..., Mirror], tmp_path: Path) -> None:
    first, second = serve("cut", 404), serve(content=CONTENT[::-1])
    assert get(wanted(first, second, sha256=None), tmp_path).read_bytes() == CONTENT[::-1]
    assert second.ranges == [None]


def test_a_file_that_has_changed_meanwhile_is_fetched_anew(serve: Callable[..., Mirror], tmp_path: Path) -> None:
    mirror = serve("cut", 404)
    with pytest.raises(DataError):
        get(wanted(mirror, sha256=None), tmp_path)
    mirror.faults, mirror.version, mirror.content = [""], '"two"', CONTENT[::-1]
    assert get(wanted(mirror, sha256=None), tmp_path).read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("fault", ["deaf", "shifted"])
def test_a_server_that_cannot_resume_sends_all_of_it(serve: Callable[..., Mirror], tmp_path: Path, fault: str) -> None:
    mirror = serve("cut", fault, "")
    assert get(wanted(mirror), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("faults", [[404], [503], ["cut", 410]])
def test_the_next_mirror_is_taken_when_one_fails(
    serve: Callable[..., Mirror], tmp_path: Path, faults: list[Any]
) -> None:
    assert get(wanted(serve(*faults), serve()), tmp_path).read_bytes() == CONTENT


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(serve: Callable[..., Mirror], tmp_path: Path) -> None:
    busy, missing = serve(503, 503, ""), serve(404)
    assert get(wanted(missing, busy), tmp_path).read_bytes() == CONTENT
    assert (len(missing.ranges), len(busy.ranges)) == (1, 3)


@pytest.mark.parametrize("stated", [{}, {"sha256": None, "md5": MD5}])
def test_a_wrong_checksum_is_refused_and_nothing_is_kept(
    serve: Callable[..., Mirror], tmp_path: Path, stated: dict[str, Any]
) -> None:
    wrong = serve(content=CONTENT[::-1])
    with pytest.raises(DataError, match=r"has (sha256|md5) \w+, where \w+ was expected\); fetch it by hand to"):
        get(wanted(wrong, **stated), tmp_path)
    assert names(tmp_path) == []
    assert get(wanted(wrong, serve(), **stated), tmp_path).read_bytes() == CONTENT


def test_a_damaged_beginning_is_replaced_once(serve: Callable[..., Mirror], tmp_path: Path) -> None:
    (tmp_path / "data.bin.part").write_bytes(b"x" * 1000)
    mirror = serve()
    assert get(wanted(mirror), tmp_path).read_bytes() == CONTENT
    assert mirror.ranges == ["bytes=1000-", None]


@pytest.mark.parametrize("kept", [CONTENT, CONTENT + b"more"])
def test_a_beginning_that_is_whole_or_too_long_ends_well(
    serve: Callable[..., Mirror], tmp_path: Path, kept: bytes
) -> None:
    (tmp_path / "data.bin.part").write_bytes(kept)
    assert get(wanted(serve()), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("note", ["", "[]", "{}", '{"url": 3}'])
def test_a_note_that_is_damaged_is_no_obstacle(serve: Callable[..., Mirror], tmp_path: Path, note: str) -> None:
    (tmp_path / "data.bin.part").write_bytes(CONTENT[:1000])
    (tmp_path / "data.bin.part.json").write_text(note)
    assert get(wanted(serve()), tmp_path).read_bytes() == CONTENT


def test_a_size_that_is_not_the_stated_one_is_refused_before_it_is_fetched(
    serve: Callable[..., Mirror], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="300,000 bytes, where 1,000 were expected"):
        get(wanted(serve(), size=1000), tmp_path)
    with pytest.raises(DataError, match="more than the 1,000 bytes"):
        get(wanted(serve(length=False), size=1000), tmp_path)
    assert names(tmp_path) == []


def test_a_server_without_an_end_is_stopped(
    serve: Callable[..., Mirror], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_LARGEST", 1000)
    with pytest.raises(DataError, match="more than the 1,000 bytes"):
        get(wanted(serve(length=False)), tmp_path)
    with pytest.raises(DataError, match="300,000 bytes, which is no dataset"):
        get(wanted(serve()), tmp_path)


def test_a_full_disk_is_seen_before_it_is_full(
    serve: Callable[..., Mirror], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(DataError, match="the same call goes on when that is mended"):
        get(wanted(serve()), tmp_path)


def test_a_folder_that_cannot_be_made_is_named(serve: Callable[..., Mirror], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"below/data\.bin cannot be written"):
        get(wanted(serve()), tmp_path / "file" / "below")


def test_a_foreign_file_in_the_place_is_left_and_named(serve: Callable[..., Mirror], tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(b"mine")
    with pytest.raises(DataError, match="remove it to fetch it again"):
        get(wanted(serve()), tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == b"mine"


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://127.0.0.1:1/x"])
def test_an_address_that_does_not_answer_or_is_not_http_is_named(url: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(url)):
        get(Download("data.bin", [url]), tmp_path)


def test_the_note_says_where_the_bytes_are_from(serve: Callable[..., Mirror], tmp_path: Path) -> None:
    mirror = serve("cut", 404)
    with pytest.raises(DataError):
        get(wanted(mirror), tmp_path)
    note = json.loads((tmp_path / "data.bin.part.json").read_text())
    assert note == {"url": mirror.url, "version": '"one"'}
