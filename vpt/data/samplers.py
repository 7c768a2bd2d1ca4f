"""In which order images are read: shuffled by seed and epoch, or as they are listed."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any, cast

import numpy as np
from torch import distributed
from torch.utils.data import Dataset, DistributedSampler

from vpt.errors import ConfigError


class EpochSampler(DistributedSampler[Any]):
    """Shuffles by (seed, epoch) alone and yields ``(epoch, index)``.

    A resumed run therefore sees the order that it would have seen. Lightning calls ``set_epoch`` on any sampler that
    has it, and leaves a ``DistributedSampler`` as it is on several devices.
    """

    def __init__(self, dataset: Sized, seed: int) -> None:
        replicas, rank = _share()
        # The parent seeds with seed + epoch: unspread, seed 1 would be seed 0 one epoch later.
        spread = int(np.random.SeedSequence(seed).generate_state(1)[0])
        super().__init__(cast("Dataset[Any]", dataset), num_replicas=replicas, rank=rank, seed=spread)

    def __iter__(self) -> Iterator[Any]:
        return ((self.epoch, index) for index in super().__iter__())

    @property
    def repeats(self) -> bool:
        """Whether the last image of this process is another's: it is there so that all have as many."""
        return 0 < len(cast("Sized", self.dataset)) % self.num_replicas <= self.rank


class ListSampler(DistributedSampler[Any]):
    """List order, each image in one process only: torch's own repeats some so that all get as many, and counts them.

    Raises:
        ConfigError: There are more processes than images: one without any would not take part in what all compute.
    """

    def __init__(self, dataset: Sized) -> None:
        replicas, rank = _share()
        if replicas > max(1, len(dataset)):
            raise ConfigError(
                f"{len(dataset)} images cannot be evaluated in {replicas} processes: set --trainer.devices to "
                f"{len(dataset)} at most."
            )
        super().__init__(cast("Dataset[Any]", dataset), num_replicas=replicas, rank=rank, shuffle=False)
        self._own = range(rank, len(dataset), replicas)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)


def _share() -> tuple[int, int]:
    """How many processes there are, and which one this is."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size(), distributed.get_rank()
    return 1, 0
