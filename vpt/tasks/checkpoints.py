"""How checkpoints are written, and what one must be to go on with a task: of a whole epoch, of the data's classes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import callbacks

from vpt.atomic_write import atomic_write
from vpt.errors import ConfigError


def last_checkpoint(folder: Path | None = None) -> callbacks.ModelCheckpoint:
    """Keeps the last epoch in ``last.ckpt``, written after every epoch; None for ``checkpoints`` in the run's folder.

    Which epoch is reported is part of the protocol: validation does not choose it. Lightning's own ``save_last`` with
    ``save_top_k=0`` would write at the very end only.
    """
    return _LastCheckpoint(folder, filename="last", enable_version_counter=False, save_on_train_epoch_end=True)


class _LastCheckpoint(callbacks.ModelCheckpoint):
    """What it is called in checkpoints is the name of its base, as in those of version 0.1.0."""

    @property
    def state_key(self) -> str:
        return super().state_key.replace(type(self).__qualname__, callbacks.ModelCheckpoint.__qualname__)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = _WholeCheckpoints()


class _WholeCheckpoints(TorchCheckpointIO):
    """Lightning copies a checkpoint over the one before: on a full disk, or killed meanwhile, both are lost."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = io.BytesIO()
        torch.save(checkpoint, content)
        with atomic_write(Path(path)) as partial:
            partial.write_bytes(content.getbuffer())


def check_whole_epoch(checkpoint: dict[str, Any], max_steps: int) -> None:
    """Refuses, by a ConfigError, Lightning's checkpoint of the middle of an epoch: loaders do not go on.

    Other images would follow than the run would have seen.
    """
    if "fit_loop" not in checkpoint.get("loops", {}):
        raise ConfigError("The checkpoint holds weights alone, from which training cannot go on: give last.ckpt.")
    batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    if not batches["is_last_batch"] and not 0 <= max_steps <= checkpoint["global_step"]:
        raise ConfigError(
            "The checkpoint ends in the middle of an epoch, from where training cannot go on exactly: give one of a "
            "whole epoch, such as last.ckpt, which is written after each."
        )


def _told(channels: Any) -> str:
    return "colours" if channels is None else f"channels {channels}"


def check_classes(checkpoint: dict[str, Any], data: Any, number: int, training: bool) -> list[str] | None:
    """Compares classes and channels of a checkpoint with those of data; for a test classes may be in any order.

    Returns the names; None of a checkpoint of version 0.1.0, which did not keep them. A ConfigError where the data have
    others, or, to train on, another order; or, where there are no names, other than `number` classes.
    """
    names: list[str] | None = checkpoint.get("class_names")
    if data is None:
        return names
    if "channels" in checkpoint and checkpoint["channels"] != (own := data.preset.to_dict().get("channels")):
        raise ConfigError(
            f"The checkpoint was trained on {_told(checkpoint['channels'])}, and images of {data.name} are read as "
            f"{_told(own)}: set data.channels as it was."
        )
    if names is None:
        if data.num_classes != number:
            raise ConfigError(
                f"The checkpoint has {number} classes without names (version 0.1.0), {data.name} "
                f"has {data.num_classes}: give the data that it was trained on."
            )
        return None
    if training and names != data.class_names:
        raise ConfigError(
            f"The checkpoint was trained on other classes than those of {data.name}, or on these in another "
            "order: training goes on with the data that it began with."
        )
    data.number_classes_as(names)
    return names
