"""What a run leaves in its folder, and how `run.json` is read: plain values, without Lightning."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vpt.errors import ConfigError

RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
DELTA_FILE = "delta.safetensors"
INIT_FILE = "init.safetensors"
LAST_CHECKPOINT = Path("checkpoints", "last.ckpt")
ENDED = ("finished", "stopped early")
"""What the status of a run is that has nothing left to train; the second is EarlyStopping's."""


def identity(protocol: Any) -> str:
    """What is kept, reused, resumed, compared or averaged is known by this hash of all that it depends on.

    It is the sha256, hexadecimal, of plain JSON values; the order of keys does not matter, and a tuple is a list.
    """
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()


def file_identity(path: Path) -> str:
    """Returns the sha256 of a file's bytes, hexadecimal: a model is known by its delta file's."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_record(folder: Path) -> dict[str, Any]:
    """Reads the ``run.json`` of a run's folder; a ConfigError where it has none, or a damaged one."""
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
    """Names the method of a task by class and hyperparameters, e.g. ``vpt_deep``, ``prompt+lora`` or ``full``."""
    if task == "PromptTuning":
        return "vpt_deep" if hyperparameters["deep"] else "vpt_shallow"
    if task == "SegmentationTask":
        names = [str(delta["name"]) for delta in hyperparameters["deltas"] or []]
        return "full" if hyperparameters["full"] else "+".join(names) or "frozen"
    if task == "DeltaTuning":
        return "+".join(str(delta["name"]) for delta in hyperparameters["deltas"])
    return _NAMES.get(task, task.lower())


def images_read(record: Mapping[str, Any]) -> dict[str, int]:
    """How many images of each split an epoch of a run read: those of the lists, or fewer where batches were limited."""
    counts: dict[str, int] = (record.get("data") or {}).get("counts", {})
    read: dict[str, int] = record.get("read", {})
    return counts | read


def epoch_rule(record: Mapping[str, Any]) -> str:
    """Says which state of the training was tested.

    ``last``, or e.g. ``epoch 5 of 6`` of a run that ended early, or was tested from an earlier checkpoint.
    """
    tested = (record.get("evaluated") or {}).get("test") or {}
    if record.get("status", "finished") == "finished" and tested.get("steps") in (None, record.get("steps")):
        return str(record.get("epoch_rule", "last"))
    return f"epoch {tested.get('epochs', record.get('epochs'))} of {record.get('max_epochs')}"


_RESULTS = ("status", "metrics", "epochs", "steps", "seconds", "images", "evaluated", "epoch_rule", "read.val")
_ENVIRONMENT = ("machine", "versions", "parameters")
_PLACES = ("hyperparameters.weights", "hyperparameters.init_", "hyperparameters._", "backbone.weights")
_EXACT = ("hyperparameters.micro_batch",)  # changes no number but by rounding
_SEEDS = ("seed", "data.seed", "data.subset.seed", "data.subset.sha256", "data.shared_with_train")
_LENGTH = ("max_epochs", "training.max_steps", "training.callbacks", "read")


def cell_protocol(record: Mapping[str, Any]) -> dict[str, Any]:
    """All that runs must share to be averaged over seeds: everything that is recorded but results, places and seeds.

    Plain values by dotted key.
    """
    out: tuple[str, ...] = (*_RESULTS, *_ENVIRONMENT, *_PLACES, *_EXACT, *_SEEDS)
    if "fingerprints" in (record.get("data") or {}):  # of the whole lists, where this is of what a seed draws of them
        out = (*out, "data.fingerprint")
    kept = {key: value for key, value in _flat("", record) if not below(key, out)}
    tested = ((record.get("evaluated") or {}).get("test") or {}).get("precision")
    other = {"test precision": tested} if tested not in (None, record.get("precision")) else {}
    return kept | {"epoch rule": epoch_rule(record)} | other


def training_protocol(record: Mapping[str, Any]) -> dict[str, Any]:
    """All that training must share with a checkpoint that it goes on from: everything but its length and what follows.

    Args:
        record: What `run.json` says, of a run that begins.

    Returns:
        Plain values by dotted key.
    """
    out = (*_RESULTS, *_ENVIRONMENT, *_PLACES, *_EXACT, *_LENGTH)
    return {key: value for key, value in json.loads(json.dumps(dict(_flat("", record)))).items() if not below(key, out)}


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), item)
    else:
        yield prefix, value


def below(key: str, names: Sequence[str]) -> bool:
    """Whether a dotted key is one of some names, or lies below one; a name that ends in ``_`` is a beginning."""
    return any(key == name or key.startswith(name if name.endswith("_") else f"{name}.") for name in names)


def subset_name(subset: Mapping[str, Any] | None) -> str:
    """Names how many images were trained on, None being all; which ones is a matter of seeds."""
    if subset is None:
        return "all images"
    return f"fraction {subset['fraction']}" if subset["shots"] is None else f"{subset['shots']} shots"
