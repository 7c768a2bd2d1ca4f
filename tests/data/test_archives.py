from __future__ import annotations

import gzip
import io
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpt.data.catalog import archives
from vpt.data.catalog.archives import unpack
from vpt.errors import DataError

FILES = {"images/a.txt": b"one", "images/deep/b.txt": b"two" * 50_000, "ü/c.txt": b""}


def tar(path: Path, members: list[tuple[str, bytes] | tarfile.TarInfo], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                file.addfile(info, io.BytesIO(member[1]))
    return path


def zipped(path: Path, members: list[tuple[str | zipfile.ZipInfo, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members:
            file.writestr(name, content)
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_file_of_any_compression_is_unpacked_whatever_its_name(mode: str, tmp_path: Path) -> None:
    unpack(tar(tmp_path / "a.bin", list(FILES.items()), mode), tmp_path / "out")
    assert contents(tmp_path / "out") == FILES


def test_a_zip_file_is_unpacked_with_its_empty_folders(tmp_path: Path) -> None:
    unpack(zipped(tmp_path / "a.bin", [*FILES.items(), ("empty/", b"")]), tmp_path / "out")
    assert contents(tmp_path / "out") == FILES
    assert (tmp_path / "out" / "empty").is_dir()


def test_two_archives_share_a_folder_and_a_second_time_changes_nothing(tmp_path: Path) -> None:
    first = tar(tmp_path / "a.tar", [("training/x", b"1")])
    second = tar(tmp_path / "b.tar", [("training/y", b"2")])
    for archive in (first, second, first):
        unpack(archive, tmp_path / "out")
    assert contents(tmp_path / "out") == {"training/x": b"1", "training/y": b"2"}


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "..", "a\\..\\..\\evil", "C:evil"])
@pytest.mark.parametrize("make", [tar, zipped])
def test_a_path_that_leads_out_is_refused_and_nothing_lies_outside(
    make: Callable[[Path, list[tuple[str, bytes]]], Path], name: str, tmp_path: Path
) -> None:
    archive = make(tmp_path / "a", [("good", b"1"), (name, b"2")])
    before = set(tmp_path.rglob("*"))
    with pytest.raises(DataError, match="leads out of the folder: do not trust it"):
        unpack(archive, tmp_path / "inner" / "out")
    assert {path.name for path in set(tmp_path.rglob("*")) - before} <= {"inner", "out", "good"}


@pytest.mark.parametrize(
    "member",
    [
        special("link", tarfile.SYMTYPE, "../../outside"),
        special("link", tarfile.SYMTYPE, "inside"),
        special("link", tarfile.LNKTYPE, "/etc/passwd"),
        special("pipe", tarfile.FIFOTYPE),
        special("disk", tarfile.BLKTYPE),
    ],
)
def test_links_and_devices_in_a_tar_file_are_refused(member: tarfile.TarInfo, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a link or device"):
        unpack(tar(tmp_path / "a.tar", [member]), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*"))


def test_a_link_and_then_a_file_through_it_writes_nothing(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    archive = tar(tmp_path / "a.tar", [special("door", tarfile.SYMTYPE, str(outside)), ("door/evil", b"1")])
    with pytest.raises(DataError, match="a link or device"):
        unpack(archive, tmp_path / "out")
    assert not list(outside.iterdir())


def test_a_link_in_a_zip_file_is_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(DataError, match="'link', a link or device"):
        unpack(zipped(tmp_path / "a.zip", [(link, b"/etc/passwd")]), tmp_path / "out")


def test_a_link_that_lies_there_already_is_not_followed(tmp_path: Path) -> None:
    outside, out = tmp_path / "outside", tmp_path / "out"
    for folder in (outside, out):
        folder.mkdir()
    (outside / "kept").write_bytes(b"old")
    (out / "door").symlink_to(outside)
    (out / "file").symlink_to(outside / "kept")
    with pytest.raises(DataError, match="by a link that is there"):
        unpack(tar(tmp_path / "a.tar", [("door/evil", b"1")]), out)
    unpack(tar(tmp_path / "b.tar", [("file", b"new")]), out)
    assert contents(outside) == {"kept": b"old"}
    assert (out / "file").read_bytes() == b"new"


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_bomb_is_refused_before_it_fills_the_disk(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_SMALL", 200_000)
    members = [("bomb", bytes(5_000_000))]
    path = tmp_path / f"a.{kind}"
    archive = tar(path, list(members), "w:gz") if kind == "tar" else zipped(path, list(members))
    assert archive.stat().st_size * archives.MAX_RATIO < 5_000_000
    with pytest.raises(DataError, match="more bytes than a dataset of its size"):
        unpack(archive, tmp_path / "out")
    assert sum(len(content) for content in contents(tmp_path / "out").values()) <= 1_000_000


def test_a_header_without_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "_SMALL", 200_000)
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 50_000_000
    path = tmp_path / "a.tar.gz"
    with gzip.open(path, "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT) + bytes(5_000_000))
    with pytest.raises(DataError, match="more bytes than a dataset of its size"):
        unpack(path, tmp_path / "out")


def test_the_bound_in_bytes_holds_whatever_the_ratio(tmp_path: Path) -> None:
    archive = tar(tmp_path / "a.tar", [("a", os.urandom(30_000)), ("b", os.urandom(30_000))])
    with pytest.raises(DataError, match="more bytes"):
        unpack(archive, tmp_path / "out", max_bytes=40_000)
    unpack(archive, tmp_path / "out", max_bytes=100_000)
    assert len(contents(tmp_path / "out")) == 2


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "zip"])
def test_a_truncated_archive_is_refused(mode: str, tmp_path: Path) -> None:
    members = [("a", os.urandom(50_000))]
    path = tmp_path / "a"
    archive = zipped(path, list(members)) if mode == "zip" else tar(path, list(members), mode)
    os.truncate(archive, archive.stat().st_size // 2)
    with pytest.raises(DataError, match="is damaged, or no tar or zip file"):
        unpack(archive, tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK nonsense", b"\x1f\x8b nonsense"])
def test_what_is_no_archive_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DataError, match="is damaged, or no tar or zip file"):
        unpack(tmp_path / "a", tmp_path / "out")


@given(st.text(st.sampled_from("ab./\\:\0é "), min_size=1, max_size=12))
def test_any_name_ends_below_the_folder_or_is_refused(name: str) -> None:
    folder = Path("/nowhere/at/all")
    try:
        target = archives._inside(folder, name)
    except archives._RefusedError:
        return
    assert Path(os.path.normpath(target)).is_relative_to(folder)
