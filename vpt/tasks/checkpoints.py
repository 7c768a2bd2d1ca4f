"""What a checkpoint must be to go on with a task: of a whole epoch, and of the classes of the data."""

from __future__ import annotations

from typing import Any

from vpt.errors import ConfigError


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
