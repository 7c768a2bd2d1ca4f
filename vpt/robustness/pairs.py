"""One evaluation set at one strength, filled image by image, saved and resumed."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vpt.atomic_write import make_folder, reserve, writing
from vpt.data import ImageDataset
from vpt.robustness import logit_records
from vpt.robustness.evaluation_sets import EvaluationSet
from vpt.robustness.logit_records import Record
from vpt.robustness.wise_ft import Swept
from vpt.sharding import Shard

SAVE_EVERY = 60.0
"""Seconds of work that a killed evaluation loses at most, or twenty times what saving takes."""

CHUNK = 4
"""Batches that are classified at one α before the model moves to the next."""


def table(pairs: int, images: int, classes: int, half: bool, folder: Path) -> NDArray[np.floating[Any]]:
    """Space for the logits of one set, on disk, so that many α of many images need no more memory than one.

    Returns (pairs, images, classes) in float32, or float16 where `half`, for at least 1 image. The file lies in
    `folder`, has no name, and goes with the process.
    """
    make_folder(folder)
    kind, shape = np.float16 if half else np.float32, (pairs, images, classes)
    with writing(folder), tempfile.TemporaryFile(dir=folder) as file:
        reserve(file.fileno(), math.prod(shape) * np.dtype(kind).itemsize)
        return np.memmap(file, kind, "w+", shape=shape)


@dataclass
class Target:
    """What is to be answered: one evaluation set at one strength, of images at the positions `index` (N,) of its list.

    `labels` are (N,); the record lies at `path`.
    """

    item: EvaluationSet
    alpha: float
    index: NDArray[np.int64]
    labels: NDArray[np.int64]
    protocol: Mapping[str, Any]
    path: Path

    def part(self, shard: Shard, batch_size: int, folder: Path) -> Target:
        """The share of a shard, in a folder of its own below that of all shards."""
        rows, path = shard.rows(len(self.index), batch_size), folder / str(shard.number) / self.path.name
        return replace(self, index=self.index[rows], labels=self.labels[rows], path=path)

    def answered(self) -> Record | None:
        """The record, if it is complete."""
        found = logit_records.resume(self.path, self.protocol)
        return found if found is not None and found.complete and np.array_equal(found.index, self.index) else None


def gather(whole: Target, *parts: Target) -> bool:
    """Writes the record of the whole out of those of its parts, once all are complete; whether it is there."""
    if whole.answered() is None:
        found = [part.answered() for part in parts if len(part.index)]
        records = [record for record in found if record is not None]
        if len(records) == len(found):
            index, labels, logits = (
                np.concatenate([getattr(record, name) for record in records]) for name in ("index", "label", "logits")
            )
            logit_records.write(whole.path, Record(index, labels, logits, whole.protocol, complete=True))
    return whole.answered() is not None  # else another process may just have put them together


@dataclass
class Pair(Target):
    """A target that is filled image by image and resumed from its file.

    `done` of its images are classified, counted from the first. Answers go into `logits` (N, classes).
    """

    logits: NDArray[np.floating[Any]]
    done: int = 0

    def __post_init__(self) -> None:
        """Takes up what an earlier evaluation under the same protocol has left."""
        earlier = logit_records.resume(self.path, self.protocol)
        if earlier is not None and np.array_equal(earlier.index, self.index[: len(earlier.index)]):
            self.done = len(earlier.index)
            self.logits[: self.done] = earlier.logits
        self._saved = self.done

    def put(self, start: int, logits: Tensor) -> None:
        """Adds the logits (B, classes) of a batch that starts at `done` or before; what is done keeps its logits."""
        stop = start + len(logits)
        self.logits[self.done : stop] = logits[self.done - start :].float().cpu().numpy()
        self.done = stop

    def save(self) -> None:
        """Writes the record so far, if there is anything new."""
        if self.done > self._saved:
            logit_records.write(self.path, self.record())
            self._saved = self.done

    def record(self) -> Record:
        """The record so far."""
        done = slice(self.done)
        complete = self.done == len(self.index)
        return Record(self.index[done], self.labels[done], self.logits[done], self.protocol, complete)


def make_pairs(targets: Sequence[Target], classes: int, folder: Path) -> list[Pair]:
    """Gives targets room for their logits, in `table`s of each set, and takes up what is answered already."""
    pairs = []
    for _, several in groupby(targets, key=lambda target: target.item):
        group = list(several)
        half = group[0].protocol["logits"] == "float16"
        rooms = table(len(group), len(group[0].index), classes, half, folder)
        pairs += [Pair(**vars(each), logits=logits) for each, logits in zip(group, rooms, strict=True)]
    return pairs


@torch.inference_mode()
def evaluate(
    swept: Swept, dataset: ImageDataset, pairs: Sequence[Pair], batch_size: int, advance: Callable[[int], None]
) -> None:
    """Fills all pairs of one list, which have one index, and saves them even when it is interrupted.

    `advance` is called with the number of answers given since its last call.
    """
    device = swept.model.backbone.mean.device
    encode, answer = swept.halves()
    index = pairs[0].index
    first = min(pair.done for pair in pairs) // batch_size * batch_size
    saved, pause = time.monotonic(), SAVE_EVERY
    try:
        for start in range(first, len(index), batch_size * CHUNK):
            rows = index[start : start + batch_size * CHUNK]
            if not (waiting := [pair for pair in pairs if pair.done < start + len(rows)]):
                continue
            images = torch.stack([dataset[int(row)]["image"] for row in rows])
            names = [dataset.paths[row] for row in rows]
            for item, group in groupby(waiting, key=lambda pair: pair.item):
                batches = torch.split(item.variant(images, names).to(device), batch_size)
                encoded = [encode(batch) for batch in batches]
                for pair in group:
                    swept.set_alpha(pair.alpha)
                    for begin, batch in zip(range(start, len(index), batch_size), encoded, strict=False):
                        if begin + len(batch) > pair.done:
                            advance(begin + len(batch) - pair.done)
                            pair.put(begin, answer(batch))
            if (now := time.monotonic()) - saved > pause:
                for pair in pairs:
                    pair.save()
                saved = time.monotonic()
                pause = max(SAVE_EVERY, 20 * (saved - now))
    finally:
        for pair in pairs:
            pair.save()
