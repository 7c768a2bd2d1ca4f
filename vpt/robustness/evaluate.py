"""The loop: every image is decoded once, then corrupted once per set and classified at every strength."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vpt.data import ImageDataset
from vpt.robustness import records
from vpt.robustness.records import Record
from vpt.robustness.shifts import EvaluationSet
from vpt.tuning.model import TunedModel

SAVE_EVERY = 60.0
"""Seconds of work that a killed evaluation loses at most."""


class Pair:
    """One evaluation set at one strength, filled image by image and resumed from its file.

    Attributes:
        item: The set.
        alpha: The strength.
        index: int64 (N,), positions in the list.
        done: How many of its images are classified, counted from the first.
    """

    def __init__(
        self,
        item: EvaluationSet,
        alpha: float,
        index: NDArray[np.int64],
        labels: NDArray[np.int64],
        num_classes: int,
        protocol: Mapping[str, Any],
        path: Path,
    ) -> None:
        """Takes up what an earlier evaluation under the same protocol has left.

        Args:
            item: The set.
            alpha: The strength in [0, 1].
            index: int64 (N,), positions in the list.
            labels: int64 (N,).
            num_classes: Width of the logits.
            protocol: How the answers come about.
            path: Where the record is kept.
        """
        self.item, self.alpha, self.path = item, alpha, path
        self.index, self._labels, self._protocol = index, labels, protocol
        self._logits = np.zeros((len(index), num_classes), dtype=np.float32)
        self.done = 0
        if (earlier := records.resume(path, protocol)) is not None:
            self.done = len(earlier.index)
            self._logits[: self.done] = earlier.logits
        self._saved = self.done

    def put(self, start: int, logits: Tensor) -> None:
        """Adds the answers to a batch; images that are done already keep the answer they have.

        Args:
            start: Position of the batch's first image, at most `done`.
            logits: (B, classes).
        """
        stop = start + len(logits)
        self._logits[self.done : stop] = logits[self.done - start :].float().cpu().numpy()
        self.done = stop

    def save(self) -> None:
        """Writes the record so far, if there is anything new."""
        if self.done > self._saved:
            records.write(self.path, self.record())
            self._saved = self.done

    def record(self) -> Record:
        """The record so far."""
        done = self.done
        complete = done == len(self.index)
        return Record(self.index[:done], self._labels[:done], self._logits[:done], self._protocol, complete)


@torch.inference_mode()
def evaluate(
    model: TunedModel,
    dataset: ImageDataset,
    index: NDArray[np.int64],
    pairs: Sequence[Pair],
    batch_size: int,
    advance: Callable[[int], None],
) -> None:
    """Fills all pairs of one list, and saves them even when it is interrupted.

    Args:
        model: In eval mode.
        dataset: The list's images.
        index: int64 (N,), which of them.
        pairs: All of the list.
        batch_size: Images in a forward pass.
        advance: Called with the number of answers given so far since the last call.
    """
    device = model.head.weight.device
    first = min(pair.done for pair in pairs) // batch_size * batch_size
    saved = time.monotonic()
    try:
        for start in range(first, len(index), batch_size):
            rows = index[start : start + batch_size]
            images = torch.stack([dataset[int(row)]["image"] for row in rows])
            for item, waiting in _by_set(pairs, start + len(rows)).items():
                variant = item.variant(images, rows).to(device)
                for pair, logits in zip(waiting, _answers(model, variant, waiting), strict=True):
                    advance(start + len(rows) - pair.done)
                    pair.put(start, logits)
            if time.monotonic() - saved > SAVE_EVERY:
                _save(pairs)
                saved = time.monotonic()
    finally:
        _save(pairs)


def _by_set(pairs: Sequence[Pair], stop: int) -> dict[EvaluationSet, list[Pair]]:
    """The pairs that still lack images before `stop`, by set."""
    groups: dict[EvaluationSet, list[Pair]] = {}
    for pair in pairs:
        if pair.done < stop:
            groups.setdefault(pair.item, []).append(pair)
    return groups


def _answers(model: TunedModel, images: Tensor, pairs: Sequence[Pair]) -> Iterator[Tensor]:
    for pair in pairs:
        model.set_strength(pair.alpha)
        yield model(images)


def _save(pairs: Sequence[Pair]) -> None:
    for pair in pairs:
        pair.save()
