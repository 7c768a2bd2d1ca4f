"""A file is whole or not there, whoever else writes it, and whoever was killed before."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vpt.atomic_write import atomic_write, write_json, write_text


def test_a_file_is_replaced_when_its_successor_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_text(path, "first")
    with atomic_write(path) as partial:
        partial.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    assert [*path.parent.iterdir()] == [path]


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"n": 1})
    before = path.read_bytes()

    def stopped() -> None:
        with atomic_write(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with atomic_write(path) as one, atomic_write(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"  # the outer block ends last
    assert [*tmp_path.iterdir()] == [path]


def test_what_a_killed_process_left_is_used_again_once_it_is_old(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    left = tmp_path / ".a.txt.part"
    left.write_text("half of something")
    with atomic_write(path) as partial:
        assert partial != left  # it may be alive
        partial.write_text("whole")
    os.utime(left, (0, 0))
    write_text(path, "again")
    assert path.read_text() == "again"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.skipif(os.name == "nt", reason="rights of another kind")
@pytest.mark.parametrize(("mask", "rights"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_a_file_has_the_rights_of_any_other(tmp_path: Path, mask: int, rights: int) -> None:
    before = os.umask(mask)
    try:
        for name in ("a", "b"):
            with atomic_write(tmp_path / name) as outer, atomic_write(tmp_path / name) as partial:
                outer.touch()
                save_file({"a": torch.zeros(1)}, partial)  # which keeps others out
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == rights
    finally:
        os.umask(before)
