"""Several processes train what one would: the mean of a step is over all their images, and each counts once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from vpt.data.samplers import EpochSampler
from vpt.errors import ConfigError

Batch = dict[str, Tensor]
Weighed = tuple[Tensor, Tensor | int]
"""A mean over a batch, a scalar, and what the batch weighs in it: how many images or pixels, or the sum of weights."""


def check_strategy(trainer: L.Trainer) -> None:
    """Refuses, by a ConfigError, strategies whose processes hold parts of a model: its files are those of a whole."""
    whole = isinstance(trainer.strategy, SingleDeviceStrategy) or type(trainer.strategy) is DDPStrategy
    if not whole:
        raise ConfigError(
            f"trainer.strategy is {type(trainer.strategy).__name__}, and vpt trains models that every process has as a "
            "whole: use ddp, with model.micro_batch or trainer.precision bf16-mixed where memory is short."
        )


def without_repeat(batch: Batch, batch_idx: int, trainer: L.Trainer) -> tuple[Batch, bool]:
    """Leaves out the image that a process reads at the end of an epoch only because others have one more.

    A batch of nothing else stays as it is; whether a batch counts is told beside it.
    """
    sampler = _sampler_of_last(batch_idx, trainer)
    if sampler is None or not sampler.repeats:
        return batch, True
    rest = {key: column[:-1] for key, column in batch.items()}
    return (rest, True) if len(rest["index"]) else (batch, False)


def images_of_step(batch: Batch, batch_idx: int, trainer: L.Trainer) -> int:
    """How many images all processes train on in a step, in which this one has a batch."""
    sampler = _sampler_of_last(batch_idx, trainer)
    repeated = 0 if sampler is None else -len(cast("Any", sampler).dataset) % trainer.world_size
    return len(batch["index"]) * trainer.world_size - repeated


def _sampler_of_last(batch_idx: int, trainer: L.Trainer) -> EpochSampler | None:
    loader: Any = trainer.train_dataloader
    sampler = getattr(loader, "sampler", None)
    return sampler if isinstance(sampler, EpochSampler) and batch_idx + 1 == len(loader) else None


def joint_loss(task: Any, batch: Batch, batch_idx: int) -> Tensor:
    """This process's part of the mean loss of a batch that a `TuningTask` trains on, a scalar (`joint_mean`)."""
    batch, counts = without_repeat(batch, batch_idx, task.trainer)
    batch = task.mixed(batch, batch_idx)
    penalties = [(each, len(batch["index"])) for each in task.model.penalties()]
    return joint_mean([*task.training_losses(batch), *penalties], task.trainer, counts)


def joint_mean(losses: Sequence[Weighed], trainer: L.Trainer, counts: bool = True) -> Tensor:
    """The sum of the means, a scalar.

    Of several processes it is this one's part of the means over all of their batches: the mean of the parts, and of
    their gradients, which is what `DistributedDataParallel` takes. The part is 0 where the batch does not count.
    """
    if trainer.world_size == 1:
        return cast("Tensor", sum(mean for mean, _ in losses))
    means = torch.stack([mean for mean, _ in losses])
    weights = torch.stack([torch.as_tensor(weight, dtype=torch.float64, device=means.device) for _, weight in losses])
    weights = weights * counts
    total = cast("Tensor", trainer.strategy.reduce(weights.clone(), reduce_op="sum"))
    shares = trainer.world_size * weights / total.clamp(min=torch.finfo(total.dtype).tiny)
    return (means * shares.to(means.dtype)).sum()
