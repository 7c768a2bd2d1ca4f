from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpt.errors import ConfigError, RecordError
from vpt.sharding import Shard, claim, dissolve, fill, together

IMAGES = [Path(f"{number} \udcff.png") for number in range(7)]


@given(st.integers(0, 200), st.integers(1, 20), st.integers(1, 30))
def test_shards_are_whole_batches_in_order_as_even_as_can_be(images: int, batch_size: int, count: int) -> None:
    rows = list(range(images))
    parts = [rows[shard.rows(images, batch_size)] for shard in Shard(1, count).all()]
    assert [row for part in parts for row in part] == rows
    assert all(part[0] % batch_size == 0 for part in parts if part)
    batches = [-(-len(part) // batch_size) for part in parts]
    assert max(batches) - min(batches) <= 1


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "-1/2", "1/0", "1/2/3", "one/two", "1/9999999", "١/٢"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="A shard is I/N"):
        Shard.read(text)


def test_other_work_is_refused_and_told(tmp_path: Path) -> None:
    claim(tmp_path, Shard(1, 2), {"data": "a", "large": {"b": 1}})
    claim(tmp_path, Shard(2, 2), {"data": "a", "large": {"b": 1}})
    with pytest.raises(ConfigError, match=r"\(shards 2 then, 3 now\)"):
        claim(tmp_path, Shard(2, 3), {"data": "a", "large": {"b": 1}})
    with pytest.raises(ConfigError, match=r"\(data a then, c now; large differs\)"):
        claim(tmp_path, Shard(2, 2), {"data": "c", "large": {"b": 2}})
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(RecordError, match=r"plan\.json cannot be read"):
        claim(tmp_path, Shard(1, 2), {})


class Answers:
    """Rows of images, some of which are asked for."""

    def __init__(self, stop: int | None = None) -> None:
        self.asked: list[Path] = []
        self.stop = stop

    def __call__(self, images: Sequence[Path]) -> Iterator[dict[str, Any]]:
        for image in images:
            if len(self.asked) == self.stop:
                raise KeyboardInterrupt
            self.asked.append(image)
            yield {"path": str(image), "x": 0.1 * len(str(image)), "set": ["ä"], "none": None}


def test_a_table_is_there_once_all_shards_are_and_loses_nothing(tmp_path: Path) -> None:
    for number in (3, 1, 4):
        fill(tmp_path, Shard(number, 4), IMAGES, 2, Answers())
        assert together(tmp_path, Shard(number, 4), IMAGES, 2) is None
    fill(tmp_path, Shard(2, 4), IMAGES, 2, Answers())
    assert list(together(tmp_path, Shard(2, 4), IMAGES, 2) or ()) == list(Answers()(IMAGES))


def test_more_shards_than_batches_leave_some_without_work(tmp_path: Path) -> None:
    for shard in Shard(1, 9).all():
        fill(tmp_path, shard, IMAGES, 4, Answers())
    assert len(list(tmp_path.iterdir())) == 2
    assert list(together(tmp_path, Shard(1, 9), IMAGES, 4) or ()) == list(Answers()(IMAGES))


@pytest.mark.parametrize("damage", ["", '{"path": "0', '{"path": "other"}\n', "[]\n"])
def test_an_interrupted_shard_goes_on_at_a_whole_batch(tmp_path: Path, damage: str) -> None:
    whole = Shard(1, 1)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, whole, IMAGES, 2, Answers(stop=5))
    with (tmp_path / "1.jsonl").open("a") as file:
        file.write(damage)
    assert together(tmp_path, whole, IMAGES, 2) is None
    rest = Answers()
    fill(tmp_path, whole, IMAGES, 2, rest)
    assert rest.asked == (IMAGES if damage.endswith("\n") else IMAGES[4:])
    assert list(together(tmp_path, whole, IMAGES, 2) or ()) == list(Answers()(IMAGES))
    again = Answers()
    fill(tmp_path, whole, IMAGES, 2, again)
    assert not again.asked
    assert all(json.loads(line) for line in (tmp_path / "1.jsonl").read_text().splitlines())
    dissolve(tmp_path)
    dissolve(tmp_path)
    assert not tmp_path.exists()
