"""Images of one size, each decoded when it is first asked for and then kept in a file that processes share.

This is for lists that would take long to decode before the first step. The file holds a row of pixels for each image,
and behind them an entry for each: the state of the image's file, from which the pixels were made, and their checksum.
A row is written before its entry, by one write each, so that a killed process leaves it out or whole, and processes
that write the same row write the same bytes. An entry is believed by a process once it has compared both.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from vpt.atomic_write import atomic_write
from vpt.errors import VPTWarning

_ENTRY = np.dtype([("state", "V16"), ("checksum", "<u4"), ("filled", "<u4")])
_FILLED = 0x76707431


class Decoder(Protocol):
    """N images of one shape and type, and the state of what each is made of."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> NDArray[Any]:
        """Decodes one."""

    def state(self, position: int) -> bytes | None:
        """16 bytes that change with the image's file; None where it may change without another state."""


class GrowingCache:
    """N images of a `Decoder`, (N, C, H, W); a pickle holds the place of the file and none of its contents."""

    def __init__(self, path: Path, images: Decoder, shape: tuple[int, int, int], dtype: np.dtype[Any]) -> None:
        """Opens the file, or makes an empty one, which takes no space; an OutputError where that is refused."""
        self.path, self.images, self.shape, self.dtype = path, images, shape, dtype
        if not path.is_file() or path.stat().st_size != self._num_bytes():
            with atomic_write(path) as partial, partial.open("wb") as file:
                file.truncate(self._num_bytes())
        self._open()

    def _row_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def _num_bytes(self) -> int:
        return len(self.images) * (self._row_bytes() + _ENTRY.itemsize)

    def _open(self) -> None:
        count = len(self.images)
        self._file = os.open(self.path, os.O_RDWR)
        flat = np.memmap(self.path, dtype=np.uint8, mode="r")
        self._rows = flat[: count * self._row_bytes()].view(self.dtype).reshape(count, *self.shape)
        self._entries = flat[count * self._row_bytes() :].view(_ENTRY)
        self._believed = np.zeros(count, dtype=bool)
        self._full = False

    def __getstate__(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("path", "images", "shape", "dtype")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):
            os.close(self._file)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> NDArray[Any]:
        image: NDArray[Any] = self.rows([position])[0]
        return image

    def rows(self, positions: Sequence[int] | NDArray[np.int64]) -> NDArray[Any]:
        """Images at M positions, (M, C, H, W); several are decoded at once, except in a loader's process."""
        index = np.asarray(positions, dtype=np.int64)
        found = np.empty((len(index), *self.shape), dtype=self.dtype)
        missing = [row for row, position in enumerate(index) if not self._known(int(position))]
        alone = len(missing) < 2 or get_worker_info() is not None
        if alone:
            made = [self._make(int(index[row])) for row in missing]
        else:
            with ThreadPoolExecutor(min(len(missing), os.cpu_count() or 1)) as pool:
                made = list(pool.map(self._make, index[missing].tolist()))
        kept = np.delete(np.arange(len(index)), missing)
        found[kept] = self._rows[index[kept]]
        for row, image in zip(missing, made, strict=True):
            found[row] = image
        return found

    def _known(self, position: int) -> bool:
        """Whether a row can be believed: made from the file as it is, and whole."""
        if self._believed[position]:
            return True
        entry = self._entries[position]
        if entry["filled"] != _FILLED or entry["state"].tobytes() != self.images.state(position):
            return False
        self._believed[position] = crc32(self._rows[position].tobytes()) == entry["checksum"]
        return bool(self._believed[position])

    def _make(self, position: int) -> NDArray[Any]:
        state = self.images.state(position)
        image = self.images[position]
        if state is None or self._full or state != self.images.state(position):
            return image
        row = np.ascontiguousarray(image).tobytes()
        entry = np.array((state, crc32(row), _FILLED), dtype=_ENTRY)
        try:
            _write_all(self._file, row, position * self._row_bytes())
            _write_all(self._file, entry.tobytes(), len(self) * self._row_bytes() + position * _ENTRY.itemsize)
        except OSError as error:  # of a full disk: what there is can still be read
            self._full = True
            warnings.warn(
                f"{self.path.name} cannot grow ({error.strerror}): images that it lacks are decoded anew in every "
                "epoch. Free space, or set VPT_CACHE to a folder on another disk.",
                VPTWarning,
                stacklevel=2,
            )
        return image


def _write_all(file: int, content: bytes, offset: int) -> None:
    while content:
        written = os.pwrite(file, content, offset)
        content, offset = content[written:], offset + written
