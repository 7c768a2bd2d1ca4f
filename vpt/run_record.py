"""What a run leaves in its folder, and how `run.json` is read: plain values, without Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
DELTA_FILE = "delta.safetensors"
INIT_FILE = "init.safetensors"
LAST_CHECKPOINT = Path("checkpoints", "last.ckpt")

_NAMES = {"LinearProbe": "linear", "FineTuning": "full"}


def method_name(task: str, hyperparameters: Mapping[str, Any]) -> str:
    """Names the method of a task.

    Args:
        task: Name of its class.
        hyperparameters: Its own.

    Returns:
        E.g. ``vpt_deep``, ``prompt+lora``, ``linear`` or ``full``.
    """
    if task == "PromptTuning":
        return "vpt_deep" if hyperparameters["deep"] else "vpt_shallow"
    if task == "SegmentationTask":
        names = [str(delta["name"]) for delta in hyperparameters["deltas"] or []]
        return "full" if hyperparameters["full"] else "+".join(names) or "frozen"
    if task == "DeltaTuning":
        return "+".join(str(delta["name"]) for delta in hyperparameters["deltas"])
    return _NAMES.get(task, task.lower())


def images_read(record: Mapping[str, Any]) -> dict[str, int]:
    """How many images of each split an epoch of a run read.

    Args:
        record: What `run.json` says.

    Returns:
        By split, those of the lists, or fewer where batches were limited.
    """
    counts: dict[str, int] = (record.get("data") or {}).get("counts", {})
    read: dict[str, int] = record.get("read", {})
    return counts | read
