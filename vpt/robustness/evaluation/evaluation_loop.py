"""The loop: every image is decoded once, then corrupted once per set and classified at every α."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vpt.data import ImageDataset
from vpt.robustness.evaluation import logit_records
from vpt.robustness.evaluation.evaluation_sets import EvaluationSet
from vpt.robustness.evaluation.logit_records import Record
from vpt.robustness.interpolation.wise_ft import Swept

SAVE_EVERY = 60.0
"""Seconds of work that a killed evaluation loses at most, or twenty times what saving takes."""

CHUNK = 4
"""Batches that are classified at one α before the model moves to the next."""


def table(pairs: int, images: int, classes: int, half: bool, folder: Path) -> NDArray[np.floating[Any]]:
    """Room for the answers of one set, on disk, so that many α of many images need no more memory than one.

    Returns (pairs, images, classes) in float32, or float16 where `half`, for at least 1 image. The file lies in
    `folder`, has no name, and goes with the process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, np.float16 if half else np.float32, "w+", shape=(pairs, images, classes))


class Pair:
    """One evaluation set at one strength, filled image by image and resumed from its file.

    `index` (N,) are positions in the list; `done` of its images are classified, counted from the first.
    """

    def __init__(
        self,
        item: EvaluationSet,
        alpha: float,
        index: NDArray[np.int64],
        labels: NDArray[np.int64],
        logits: NDArray[np.floating[Any]],
        protocol: Mapping[str, Any],
        path: Path,
    ) -> None:
        """Takes up what an earlier evaluation under the same protocol has left; answers go into `logits`."""
        self.item, self.alpha, self.path = item, alpha, path
        self.index, self._labels, self._protocol = index, labels, protocol
        self._logits = logits
        self.done = 0
        if (earlier := logit_records.resume(path, protocol)) is not None:
            self.done = len(earlier.index)
            self._logits[: self.done] = earlier.logits
        self._saved = self.done

    def put(self, start: int, logits: Tensor) -> None:
        """Adds the answers (B, classes) to a batch that starts at `done` or before; what is done keeps its answer."""
        stop = start + len(logits)
        self._logits[self.done : stop] = logits[self.done - start :].float().cpu().numpy()
        self.done = stop

    def save(self) -> None:
        """Writes the record so far, if there is anything new."""
        if self.done > self._saved:
            logit_records.write(self.path, self.record())
            self._saved = self.done

    def record(self) -> Record:
        """The record so far."""
        done = self.done
        complete = done == len(self.index)
        return Record(self.index[:done], self._labels[:done], self._logits[:done], self._protocol, complete)


@torch.inference_mode()
def evaluate(
    swept: Swept,
    dataset: ImageDataset,
    index: NDArray[np.int64],
    pairs: Sequence[Pair],
    batch_size: int,
    advance: Callable[[int], None],
) -> None:
    """Fills all pairs of one list at its images `index` (N,), and saves them even when it is interrupted.

    `advance` is called with the number of answers given since its last call.
    """
    device = swept.model.head.weight.device
    encode, answer = swept.halves()
    first = min(pair.done for pair in pairs) // batch_size * batch_size
    saved, pause = time.monotonic(), SAVE_EVERY
    try:
        for start in range(first, len(index), batch_size * CHUNK):
            rows = index[start : start + batch_size * CHUNK]
            images = torch.stack([dataset[int(row)]["image"] for row in rows])
            names = [dataset.paths[row] for row in rows]
            for item, waiting in _by_set(pairs, start + len(rows)).items():
                batches = torch.split(item.variant(images, names).to(device), batch_size)
                encoded = [encode(batch) for batch in batches]
                for pair in waiting:
                    swept.set_alpha(pair.alpha)
                    for begin, batch in zip(range(start, len(index), batch_size), encoded, strict=False):
                        if begin + len(batch) > pair.done:
                            advance(begin + len(batch) - pair.done)
                            pair.put(begin, answer(batch))
            if (now := time.monotonic()) - saved > pause:
                _save(pairs)
                saved = time.monotonic()
                pause = max(SAVE_EVERY, 20 * (saved - now))
    finally:
        _save(pairs)


def _by_set(pairs: Sequence[Pair], stop: int) -> dict[EvaluationSet, list[Pair]]:
    """The pairs that still lack images before `stop`, by set."""
    groups: dict[EvaluationSet, list[Pair]] = {}
    for pair in pairs:
        if pair.done < stop:
            groups.setdefault(pair.item, []).append(pair)
    return groups


def _save(pairs: Sequence[Pair]) -> None:
    for pair in pairs:
        pair.save()
