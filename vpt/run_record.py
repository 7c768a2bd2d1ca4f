"""What a run leaves in its folder, and how `run.json` is read: plain values, without Lightning."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vpt.errors import ConfigError

RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
DELTA_FILE = "delta.safetensors"
INIT_FILE = "init.safetensors"
LAST_CHECKPOINT = Path("checkpoints", "last.ckpt")


def identity(protocol: Any) -> str:
    """What is kept, reused, resumed, compared or averaged is known by this hash of all that it depends on.

    Args:
        protocol: Plain JSON values; the order of keys does not matter, and a tuple is a list.

    Returns:
        sha256, hexadecimal.
    """
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()


def read_record(folder: Path) -> dict[str, Any]:
    """Reads what a run did and measured.

    Args:
        folder: Of the run.

    Returns:
        What its ``run.json`` says.

    Raises:
        ConfigError: It has none, or a damaged one.
    """
    path = folder / RUN_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder} is no run: it has no {RUN_FILE}.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not the record of a run ({error}).") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{path} is not the record of a run (it holds a {type(record).__name__}).")
    return record


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


def subset_name(subset: Mapping[str, Any] | None) -> str:
    """Names how many images were trained on; which ones is a matter of seeds.

    Args:
        subset: As the ``data`` of a record has it; None for all images.
    """
    if subset is None:
        return "all images"
    return f"fraction {subset['fraction']}" if subset["shots"] is None else f"{subset['shots']} shots"
