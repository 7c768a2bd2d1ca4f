"""Which images of an original are train800, val200 and test: by rule, without chance.

The reference takes "the first 800" in the order in which TensorFlow Datasets happens to store a dataset, which cannot
be reproduced without it. Here the images of a part are ordered by the SHA-256 of their position in the canonical
order, written as a decimal number. That needs no generator of random numbers, gives the same order everywhere and
forever, and anyone can recompute it. The ranges are those of VTAB (Zhai et al. 2019), applied to that order.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class SplitRule:
    """Where the three lists of a task come from.

    Attributes:
        sizes: Number of images of each part of the complete original.
        train: What train800 is taken from: a part, or a range such as ``"train[:90%]"``.
        val: Likewise for val200.
        test: The test list, whole.
    """

    sizes: Mapping[str, int]
    train: str
    val: str
    test: str


@dataclass(frozen=True)
class Chosen:
    """A list of a task: positions in the canonical order of a part."""

    part: str
    positions: Positions

    def sha256(self) -> str:
        """Hash of the positions, written as decimal numbers with a space between them."""
        return hashlib.sha256(" ".join(map(str, self.positions.tolist())).encode()).hexdigest()


@lru_cache(maxsize=2)
def order(count: int) -> Positions:
    """The positions 0..count-1, ordered by the SHA-256 of their decimal number.

    Args:
        count: Number of images.

    Returns:
        int64 (count,), read-only.
    """
    hashes = b"".join(hashlib.sha256(b"%d" % position).digest() for position in range(count))
    positions = np.lexsort(np.frombuffer(hashes, ">u8").reshape(-1, 4).T[::-1]).astype(np.int64)
    positions.setflags(write=False)
    return positions


def choose(split: SplitRule, sizes: Mapping[str, int]) -> dict[str, Chosen]:
    """Chooses the images of train800, val200 and test.

    Args:
        split: The rule.
        sizes: Number of images of each part; ``split.sizes`` for the complete original.

    Returns:
        The three lists; train800 and val200 in the order of the rule, test in the canonical order. Fewer images than
        800 and 200 only where there are fewer.
    """
    train, val, test = (_range(rule, sizes) for rule in (split.train, split.val, split.test))
    return {
        "train800": Chosen(train.part, train.positions[:800]),
        "val200": Chosen(val.part, val.positions[:200]),
        "test": Chosen(test.part, np.sort(test.positions)),
    }


def _range(rule: str, sizes: Mapping[str, int]) -> Chosen:
    part, start, stop = re.fullmatch(r"(\w+)(?:\[(?:(\d+)%)?:(?:(\d+)%)?\])?", rule).groups()  # type: ignore[union-attr]
    count = sizes[part]
    return Chosen(part, order(count)[count * int(start or 0) // 100 : count * int(stop or 100) // 100])


def manifest(splits: Mapping[str, SplitRule]) -> Iterator[str]:
    """Yields the lines of ``vpt/data/prepare/vtab_splits.tsv``.

    Args:
        splits: Rule of each task.
    """
    yield "task\tlist\tfrom\tpart_size\tcount\tsha256\tpositions"
    for task, split in splits.items():
        rules = {"train800": split.train, "val200": split.val, "test": split.test}
        for name, chosen in choose(split, split.sizes).items():
            positions = "" if name == "test" else " ".join(map(str, chosen.positions.tolist()))
            fields = (task, name, rules[name], split.sizes[chosen.part], len(chosen.positions), chosen.sha256())
            yield "\t".join(map(str, fields)) + f"\t{positions}"
