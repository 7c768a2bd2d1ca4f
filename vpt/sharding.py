"""Shares of a list of images, which processes or machines answer apart from each other, and where the answers meet."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpt.atomic_write import write_json, write_text, writing
from vpt.errors import ConfigError
from vpt.row_files import Row
from vpt.run_record import read_json

_PLAN = "plan.json"


@dataclass(frozen=True)
class Shard:
    """The share `number`, from 1, of `count` shares, as even as whole batches allow.

    Batches are those of a single process, so that an answer that depends on its batch by rounding is the same.
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        """Refuses, by a ConfigError, a share that there is not."""
        if not 1 <= self.number <= self.count <= 10**5:
            raise ConfigError(f"A shard is I/N, the I-th of N, with I from 1 to N: got {self.number}/{self.count}.")

    @classmethod
    def read(cls, text: str) -> Shard:
        """Reads ``I/N``; a ConfigError for anything else."""
        if (found := re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)) is None:
            raise ConfigError(f"A shard is I/N, the I-th of N, for instance 2/8: got {text!r:.80}.")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def rows(self, images: int, batch_size: int) -> slice:
        """Which of so many images, in order, are in it; none where there are fewer batches than shards."""
        batches = -(-images // batch_size)
        first, last = (batches * number // self.count * batch_size for number in (self.number - 1, self.number))
        return slice(first, min(last, images))

    def all(self) -> list[Shard]:
        """All shards of the list, in order."""
        return [Shard(number, self.count) for number in range(1, self.count + 1)]


def claim(folder: Path, shard: Shard, plan: Mapping[str, Any]) -> None:
    """Begins a folder of shards, or refuses, by a ConfigError that says in what, one of other work than this `plan`.

    A RecordError where the plan of the folder is damaged.
    """
    path, now = folder / _PLAN, json.loads(json.dumps({"shards": shard.count, **plan}))
    if not path.is_file():
        write_json(path, now)
    there = read_json(path)
    if differs := sorted(key for key in there.keys() | now.keys() if there.get(key) != now.get(key)):
        told = "; ".join(_told(key, there.get(key), now.get(key)) for key in differs[:4])
        raise ConfigError(
            f"{folder} holds shards of other work ({told}): give what they were begun with, or another --out."
        )


def _told(key: str, then: Any, now: Any) -> str:
    large = isinstance(then, dict | list) or isinstance(now, dict | list)
    return f"{key} differs" if large else f"{key} {then!s:.24} then, {now!s:.24} now"


def fill(
    folder: Path, shard: Shard, images: Sequence[Path], batch_size: int, rows: Callable[[Sequence[Path]], Iterator[Row]]
) -> None:
    """Writes a shard of a table, a row for each image with its ``path``; goes on where an earlier call has stopped.

    `rows` gives those of some of the images, in order; they are kept, batch by batch, as lines of JSON, which lose
    nothing.
    """
    mine, part = images[shard.rows(len(images), batch_size)], _part(folder, shard)
    done = kept if (kept := _kept(part, mine)) == len(mine) else kept // batch_size * batch_size
    if done == len(mine):
        return
    write_text(part, "".join(part.read_text(encoding="ascii").splitlines(keepends=True)[:done] if done else ()))
    with writing(part), part.open("a", encoding="ascii") as file:
        for place, row in enumerate(rows(mine[done:]), 1):
            file.write(json.dumps(row) + "\n")
            if place % batch_size == 0:
                file.flush()


def together(folder: Path, shard: Shard, images: Sequence[Path], batch_size: int) -> Iterator[Row] | None:
    """All rows of a table, in order, once every shard is complete; None before that."""
    parts = {_part(folder, each): images[each.rows(len(images), batch_size)] for each in shard.all()}
    if any(_kept(part, mine) != len(mine) for part, mine in parts.items()):
        return None
    files = [part.open(encoding="ascii") for part, mine in parts.items() if mine]
    return (json.loads(line) for file in files for line in file)


def _part(folder: Path, shard: Shard) -> Path:
    return folder / f"{shard.number}.jsonl"


def _kept(part: Path, images: Sequence[Path]) -> int:
    """How many images, from the first, have a row in a part; 0 where it is missing, damaged or of others."""
    count = 0
    try:
        with part.open(encoding="ascii") as file:
            for line in file:
                if not line.endswith("\n"):
                    break
                if json.loads(line)["path"] != str(images[count]):
                    return 0
                count += 1
    except (OSError, ValueError, LookupError, TypeError):
        return 0
    return count


def dissolve(folder: Path) -> None:
    """Removes the shards of what is put together, though another process may be doing the same."""
    shutil.rmtree(folder, ignore_errors=True)
