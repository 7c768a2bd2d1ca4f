"""Which test sets there are: the clean test split, the data module's shifted lists, and corruptions of the first."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vpt.data import ImageDataModule
from vpt.data.corruptions import BASIC, CORRUPTIONS, SEVERITIES, corrupt
from vpt.errors import ConfigError, UnknownNameError, VPTWarning

CLEAN, VAL, SHIFT = "clean", "val", "shift"
"""Kinds of test sets that are not corrupted."""
VAL_CORRUPTED = "val-corrupted"
"""Validation images, each under one of the five common corruptions, of `VAL_SEVERITY`: shift without shifted data."""
VAL_SEVERITY = 3


@dataclass(frozen=True)
class EvaluationSet:
    """One set of test images, of the list `split`: ``"test"`` or a shift's name.

    Its kind is ``"clean"``, ``"val"``, ``"shift"`` (a list of its own), or the name of a corruption of the test list,
    of severity 1 (weak) to 5 (strong), or `VAL_CORRUPTED` of the list ``"val"``.
    """

    split: str
    kind: str
    severity: int | None = None

    @property
    def name(self) -> str:
        """``"clean"``, the shift's name, or e.g. ``"fog-3"``."""
        if self.severity is not None:
            return f"{self.kind}-{self.severity}"
        return self.kind if self.kind in (CLEAN, VAL_CORRUPTED) else self.split

    def variant(self, images: Tensor, names: Sequence[str]) -> Tensor:
        """Makes this set's images, uint8 (B, 3, H, W), out of those of its list; B names seed the noise.

        The pixels are the same whatever else is in the batch or the list. Raises a ConfigError for images too small to
        be corrupted.
        """
        if self.severity is None and self.kind != VAL_CORRUPTED:
            return images
        rows = images.permute(0, 2, 3, 1).contiguous().numpy()
        severity = self.severity or VAL_SEVERITY
        changed = [corrupt(row, self._corruption(name), severity, name) for row, name in zip(rows, names, strict=True)]
        return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2).contiguous()

    def _corruption(self, name: str) -> str:
        return BASIC[zlib.crc32(name.encode()) % len(BASIC)] if self.kind == VAL_CORRUPTED else self.kind


def evaluation_sets(
    data: ImageDataModule, severities: Sequence[int] = SEVERITIES, corruptions: Sequence[str] = BASIC
) -> list[EvaluationSet]:
    """Lists the test sets of a data module: clean first, then shifts, then corruptions by kind and severity.

    Images of channels are not corrupted, which a warning says. Raises an UnknownNameError if there is no such
    corruption, a ConfigError if a severity does not exist, a severity or corruption occurs twice, or a shift has the
    name of another set.
    """
    if not set(severities) <= set(SEVERITIES) or len(set(severities)) < len(severities):
        raise ConfigError(f"Severities are distinct numbers out of 1, 2, 3, 4, 5, got {list(severities)}.")
    for kind in corruptions:
        if kind not in CORRUPTIONS:
            raise UnknownNameError("corruption", kind, CORRUPTIONS)
        if list(corruptions).count(kind) > 1:
            raise ConfigError(f"The corruption {kind!r} is named twice: name it once.")
    if severities and corruptions and data.preset.channels is not None:
        text = f"Corruptions are of 8-bit colours, and {data.name} has {data.preset.image_kind}: none are made."
        warnings.warn(text, VPTWarning, stacklevel=2)
        severities = ()
    sets = [EvaluationSet("test", CLEAN)]
    sets += [EvaluationSet(name, SHIFT) for name in data.shift_names()]
    sets += [EvaluationSet("test", kind, severity) for kind in corruptions for severity in sorted(severities)]
    names = [item.name for item in sets]
    for name in names:
        if names.count(name) > 1 or name in (VAL, VAL_CORRUPTED):
            raise ConfigError(f"The list shift_{name} has the name of another test set: rename it.")
    return sets


def subset(labels: NDArray[np.int64], max_images: int | None, seed: int) -> NDArray[np.int64]:
    """Draws images of a list, of every class about the same share: ascending positions, int64 (min(N, max_images),).

    Class sizes are proportional to those of the list, rounded by largest remainders. Of None it takes all; a
    ConfigError if less than 1 is asked for.
    """
    if max_images is not None and max_images < 1:
        raise ConfigError(f"max_images must be at least 1, got {max_images}.")
    if max_images is None or max_images >= len(labels):
        return np.arange(len(labels))
    classes, sizes = np.unique(labels, return_counts=True)
    shares = sizes * max_images / len(labels)
    counts = np.floor(shares).astype(np.int64)
    remainders = np.argsort(counts - shares, kind="stable")
    counts[remainders[: max_images - counts.sum()]] += 1
    generator = np.random.default_rng(seed)
    drawn = [
        generator.choice(np.flatnonzero(labels == label), size=count, replace=False)
        for label, count in zip(classes, counts, strict=True)
    ]
    return np.sort(np.concatenate(drawn))


def groups(data: ImageDataModule, split: str) -> list[list[int]] | None:
    """Positions of each class's logits on a split, its label first; None if all classes of the data module count.

    Raises a ConfigError if an image's class is not among them.
    """
    found = data.groups(split) if hasattr(data, "groups") else None
    if found is None:
        return None
    if strange := sorted(set(data.split(split).labels.tolist()) - {group[0] for group in found}):
        raise ConfigError(f"Class {strange[0]} occurs in {split!r} of {data.name}, but its class mask leaves it out.")
    return [[int(position) for position in group] for group in found]
