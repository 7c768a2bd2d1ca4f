"""Which validation images count: those that are trained on do not."""

from __future__ import annotations

from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from vpt.errors import ConfigError

Batch = dict[str, Tensor]


class CountedImages:
    """The validation images of a run that are not trained on.

    Images are compared by their contents. Those of large lists (`ImageDataModule.hashed`) are read for that before the
    first validation that counts; until then names decide whether any are to be validated on.

    Attributes:
        none: Whether all are trained on.
    """

    def __init__(self) -> None:
        """All count."""
        self.none = False
        self._left_out: Tensor | None = None
        self._unread = False

    def look(self, data: Any, training: bool, trained: str | None) -> str:
        """Finds which of a data module's images count, and says how many do not; `trained` is a list that does not."""
        known = not training or getattr(data, "hashed", True)
        shared = torch.from_numpy(data.shared("val") if known else data.shared_names("val"))
        self.none = len(shared) > 0 and (bool(shared.all()) or (known and trained == data.fingerprint("val")))
        self._unread = not known and not self.none
        self._left_out = shared if shared.any() and not self.none else None
        found = _found(shared)
        if self._left_out is not None and known:
            rank_zero_info(f"{found}: the others are evaluated.")
        return found

    def read(self, trainer: L.Trainer) -> None:
        """Compares large lists by what their images are, in one process first: the others find it kept.

        A ConfigError where all images are trained on, under other names.
        """
        if not self._unread:
            return
        self._unread, data = False, cast("Any", trainer).datamodule
        if trainer.is_global_zero:
            data.describe()
        trainer.strategy.barrier()
        data.warn_of_contradictions()
        shared = torch.from_numpy(data.shared("val"))
        if len(shared) and bool(shared.all()):
            raise ConfigError(
                f"All validation images of {data.name} are trained on, under other names: give others, or none by "
                "--trainer.limit_val_batches 0."
            )
        self._left_out = shared if shared.any() else None
        if self._left_out is not None:
            rank_zero_info(f"{_found(shared)}: the others are evaluated.")

    def of(self, batch: Batch) -> Batch:
        """Leaves those of a batch that count."""
        if self._left_out is None:
            return batch
        kept = ~self._left_out.to(batch["index"].device)[batch["index"]]
        return {key: column[kept] for key, column in batch.items()}


def all_trained(data: Any) -> str | None:
    """The fingerprint of a data module's validation images where all of them are trained on, else None."""
    return data.fingerprint("val") if hasattr(data, "shared") and bool(data.shared("val").all()) else None


def _found(shared: Tensor) -> str:
    return f"{int(shared.sum()):,} of {len(shared):,} validation images are trained on"
