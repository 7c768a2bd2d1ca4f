"""Frozen-prefix cache: what lies before the first trained parameter is a constant of the image."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Hashable
from pathlib import Path

import torch
from torch import Tensor

from vpt.atomic_write import reserve, writing

RAM_SHARE = 0.25
"""Above this share of the machine's memory, kept features lie in a memory-mapped file."""
DISK_SHARE = 0.5
"""Above this share of the free space for temporary files, nothing is kept."""


Stores = dict[str, "_Store | None"]
_shared: dict[Hashable, Stores] | None = None


def share() -> None:
    """Lets models of this process that are trained one after another on the same images share what they have in common.

    The features of the last backbone, cut and data stay in memory until others replace them.
    """
    global _shared
    if _shared is None:
        _shared = {}


def _stores(key: Hashable) -> Stores:
    if _shared is None:
        return {}
    if key not in _shared:
        _shared.clear()
        _shared[key] = {}
    return _shared[key]


class FeatureCache:
    """What a frozen function makes of each image, computed once per image.

    Valid only without random augmentation, and as long as nothing before the cut is trained.
    """

    def __init__(self, compute: Callable[[Tensor], Tensor], key: Hashable = None) -> None:
        """Starts empty, or with what a cache of the same key, all that the results depend on, has kept (`share`)."""
        self.compute = compute
        self._stores = {} if key is None else _stores(key)

    @torch.inference_mode(False)  # what is kept outlives a validation under inference mode
    @torch.no_grad()
    def __call__(self, split: str, length: int, index: Tensor, images: Tensor) -> Tensor:
        """Looks up features (B, ...), without gradient, and computes those that are missing.

        Index (B,) is the position of each of the images, (B, 3, H, W), in a set of that name and length.
        """
        rows = index.cpu()
        if split not in self._stores:
            first = self.compute(images)
            self._stores[split] = _store(length, first)
            if (store := self._stores[split]) is not None:
                store.put(rows, first)
            return first
        store = self._stores[split]
        if store is None:
            return self.compute(images)
        missing = ~store.known[rows]
        if bool(missing.any()):
            store.put(rows[missing], self.compute(images[missing.to(images.device)]))
        return store.values[rows].to(images.device)


class _Store:
    """Rows in memory, or in a file that is gone with the process."""

    def __init__(self, length: int, like: Tensor, mapped: bool) -> None:
        shape = (length, *like.shape[1:])
        if mapped:
            number, path = tempfile.mkstemp(prefix="vpt-features-")
            with writing(Path(path)):
                reserve(number, length * like[0].numel() * like.element_size())
            os.close(number)
            values = torch.from_file(path, shared=True, size=length * like[0].numel(), dtype=like.dtype)
            Path(path).unlink()  # the mapping holds it; nothing is left behind, however the process ends
            self.values = values.view(shape)
        else:
            self.values = torch.empty(shape, dtype=like.dtype)
        self.known = torch.zeros(length, dtype=torch.bool)

    def put(self, rows: Tensor, features: Tensor) -> None:
        self.values[rows] = features.to("cpu", self.values.dtype)
        self.known[rows] = True


def _store(length: int, like: Tensor) -> _Store | None:
    """A store for a set, or None if it would be too large."""
    needed = length * like[0].numel() * like.element_size()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed <= RAM_SHARE * memory:
        return _Store(length, like, mapped=False)
    free = shutil.disk_usage(tempfile.gettempdir()).free
    return _Store(length, like, mapped=True) if needed <= DISK_SHARE * free else None
