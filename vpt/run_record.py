"""What a run leaves in its folder, and how `run.json` is read: plain values, without Lightning."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vpt.errors import ConfigError, RecordError
from vpt.image_size import is_size

RUN_FILE = "run.json"
TRIAL_FILE = "trial.json"  # of a run that an experiment started, and goes on with
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


def read_json(path: Path) -> dict[str, Any]:
    """Reads an object from a JSON file of an earlier run; a RecordError that names the file where it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise RecordError(f"{path} cannot be read ({reason}): repair it, or move it away.") from error
    if not isinstance(content, dict):
        raise RecordError(f"{path} cannot be read (it holds no object of JSON): repair it, or move it away.")
    return content


def read_record(folder: Path, name: str = RUN_FILE) -> dict[str, Any]:
    """Reads the ``run.json`` of a run's folder, or a copy of another `name`.

    A ConfigError where it has none, a RecordError where it is damaged.
    """
    path = folder / name
    if not os.path.lexists(path):
        raise ConfigError(f"{folder} is no run: it has no {name}.")
    record = read_json(path)
    if fault := misfit(record):
        raise RecordError(f"{path} is not the record of a run ({fault}): repair it, or move it away.")
    return record


def finished_record(folder: Path) -> dict[str, Any]:
    """Reads the ``run.json`` of a run that has ended and measured something; a ConfigError where it has not."""
    record = read_record(folder)
    if record.get("status") not in ENDED or not record.get("metrics"):
        raise ConfigError(f"{folder} is no finished run with metrics (status {record.get('status')}).")
    return record


def find_records(folders: Iterable[Path]) -> tuple[dict[Path, dict[str, Any]], list[str]]:
    """Reads every ``run.json`` in and below some folders.

    Gives the records by their folder, in order, and a sentence for each file or folder that cannot be read.
    """
    found: dict[Path, dict[str, Any]] = {}
    left_out: list[str] = []

    def unreadable(error: OSError) -> None:
        left_out.append(f"{error.filename} cannot be read ({error.strerror}).")

    for folder in folders:
        for home, inside, files in os.walk(folder, onerror=unreadable):
            if RUN_FILE in (*inside, *files):
                try:
                    found[Path(home)] = read_record(Path(home))
                except ConfigError as error:
                    left_out.append(str(error))
    return dict(sorted(found.items())), list(dict.fromkeys(left_out))


Form = Mapping[str, Callable[[Any], bool]]
"""What values fit where in a record, by dotted key; ``*`` is any key. A key may be absent."""


def of(*kinds: type | None) -> Callable[[Any], bool]:
    """Whether a value of JSON is of one of some types, None being null; numbers are finite, and True is none."""
    types = [type(None) if kind is None else kind for kind in kinds]
    return lambda value: (
        type(value) in types
        and (not isinstance(value, int) or abs(value) < 2**63)
        and (not isinstance(value, float) or math.isfinite(value))
    )


def count(value: Any) -> bool:
    """Whether a value is a whole number, 0 or above."""
    return of(int)(value) and value >= 0


def share(value: Any) -> bool:
    """Whether a value is a number in [0, 1]."""
    return of(int, float)(value) and 0 <= value <= 1


PROBE = "probe"
"""Of ``init_head``: no file, but a probe that is fitted before training."""
SCORES = {"acc": "top-1", "mean_ap": "mean AP", "r2": "R²"}
"""What runs are compared by, of one class, of several, and of numbers an image; and what it is called in tables."""


def score(record: Mapping[str, Any], split: str) -> float | None:
    """The one of `SCORES` that a run has of ``val`` or ``test``; None where it has none."""
    metrics = record.get("metrics", {})
    return next((float(metrics[key]) for name in SCORES if (key := f"{split}/{name}") in metrics), None)


def score_names(records: Iterable[Mapping[str, Any]]) -> str:
    """What the scores of some runs are called, such as ``top-1``, in a title."""
    measured = {key.partition("/")[2] for record in records for key in record.get("metrics", {})}
    return " or ".join(title for name, title in SCORES.items() if name in measured) or SCORES["acc"]


def global_seed() -> int | None:
    """The seed of the process, which Lightning keeps in its environment; a ConfigError where it is no whole number."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    if seed is not None and not seed.isdecimal():
        raise ConfigError(f"PL_GLOBAL_SEED is {seed!r:.40}, where a whole number is wanted: set it anew or remove it.")
    return None if seed is None else int(seed)


_GROUPS = ("best", "metrics", "hyperparameters", "backbone", "parameters", "read", "evaluated", "versions", "machine")
_OF_DATA = ("counts", "lists", "fingerprints", "shared_with_train")
_TEXTS = ("task", "status", "epoch_rule", "precision", "data.name", "data.preset", "data.fingerprint", "data.lists.*")
_COUNTS = ("epochs", "steps", "images", "read.*", "parameters.*", "data.counts.*", "data.shared_with_train.*")
_FORM: Form = {
    **dict.fromkeys(_GROUPS, of(dict)),
    **dict.fromkeys(("data", "data.subset", "evaluated.*", "training", "soup"), of(dict, None)),
    **dict.fromkeys(("best.*", "evaluated.*.chosen_by"), of(str)),
    **dict.fromkeys((f"data.{name}" for name in _OF_DATA), of(dict)),
    **dict.fromkeys((*_TEXTS, "backbone.name", "backbone.weights_id", "backbone.fingerprint"), of(str)),
    **dict.fromkeys(_COUNTS, count),
    "data.image_size": is_size,
    **dict.fromkeys(("seed", "data.seed"), of(int, None)),
    "max_epochs": of(int),
    **dict.fromkeys(("metrics.*", "seconds", "precision_measured.*"), of(int, float)),
    **dict.fromkeys([f"metrics.{split}/{name}" for split in ("val", "test") for name in ("acc", "mean_ap")], share),
    "data.complete": of(bool, None),
}


def misfit(record: Mapping[str, Any], form: Form = _FORM) -> str | None:
    """Says which value no run writes where it stands in a record; None if there is none."""
    for pattern, fits in form.items():
        for key, value in _matching(record, pattern):
            if not fits(value):
                return f"{key} is {json.dumps(value):.40}"
    counts = (record.get("data") or {}).get("counts") or {}
    for split, read in (record.get("read") or {}).items():
        if not 0 < read <= counts.get(split, read):
            return f"read.{split} is {read} of {counts.get(split, read)} images"
    return None


def _matching(value: Any, pattern: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values at a dotted key, whose parts may be ``*``, each with its own key; what is not there is left out."""
    first, _, rest = pattern.partition(".")
    if isinstance(value, Mapping):
        for key in value if first == "*" else value.keys() & {first}:
            if rest:
                yield from _matching(value[key], rest, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value[key]


def lacking(record: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Those of some dotted keys that a record has not."""
    return [key for key in keys if not any(True for _ in _matching(record, key))]


_NAMES = {"LinearProbe": "linear", "NearestNeighbours": "knn", "FineTuning": "full"}


def method_name(task: str, hyperparameters: Mapping[str, Any]) -> str:
    """Names the method of a task by class and hyperparameters, e.g. ``vpt_deep``, ``ncm``, ``prompt+lora`` or ``full``.

    A RecordError where these are not those of the class.
    """
    try:
        return _method_name(task, hyperparameters)
    except (KeyError, TypeError) as error:
        raise RecordError(f"The hyperparameters are not those of {task}.") from error


def _method_name(task: str, hyperparameters: Mapping[str, Any]) -> str:
    if task == "PromptTuning":
        return "vpt_deep" if hyperparameters["deep"] else "vpt_shallow"
    if task == "SegmentationTask":
        names = [str(delta["name"]) for delta in hyperparameters["deltas"] or []]
        return "full" if hyperparameters["full"] else "+".join(names) or "frozen"
    if task == "DeltaTuning":
        return "+".join(str(delta["name"]) for delta in hyperparameters["deltas"])
    if task == "LinearProbe" and (solver := hyperparameters.get("solver")) in ("ridge", "ncm"):
        return str(solver)  # no logistic regression, as the probes of both other solvers are
    return _NAMES.get(task, task.lower())


def images_read(record: Mapping[str, Any]) -> dict[str, int]:
    """How many images of each split an epoch of a run read: those of the lists, or fewer where batches were limited."""
    counts: dict[str, int] = (record.get("data") or {}).get("counts", {})
    read: dict[str, int] = record.get("read", {})
    return counts | read


def epoch_rule(record: Mapping[str, Any]) -> str:
    """Says which state of the training was tested.

    ``last``; ``best val/acc`` where that chose it, whichever it is; or e.g. ``epoch 5 of 6`` of a run that ended early,
    or was tested from an earlier checkpoint.
    """
    tested = (record.get("evaluated") or {}).get("test") or {}
    if "chosen_by" in tested:
        return f"best {tested['chosen_by']}"
    if record.get("status", "finished") == "finished" and tested.get("steps") in (None, record.get("steps")):
        return str(record.get("epoch_rule", "last"))
    return f"epoch {tested.get('epochs', record.get('epochs'))} of {record.get('max_epochs')}"


_RESULTS = ("status", "metrics", "epochs", "steps", "seconds", "images", "evaluated", "epoch_rule", "read.val", "best")
_ENVIRONMENT = ("machine", "versions", "parameters", "precision_measured")
_PLACES = ("hyperparameters.weights", "hyperparameters.init_", "hyperparameters._", "backbone.weights")
CHANNELS = tuple(f"{part}.normalization.{key}" for part in ("hyperparameters", "backbone") for key in ("mean", "std"))
"""Statistics of channels, by dotted key."""
# Change no other number but by rounding.
_EXACT = ("hyperparameters.micro_batch", "hyperparameters.metrics", "hyperparameters.compile")
# Options at what they do nothing by, as in runs from before they were there.
_IDLE = {
    "hyperparameters.loss": "cross_entropy",
    "hyperparameters.focal_gamma": 2.0,
    **dict.fromkeys((f"hyperparameters.{name}" for name in ("label_smoothing", "mixup", "cutmix", "ema_decay")), 0.0),
    **dict.fromkeys((f"hyperparameters.{name}" for name in ("head_lr_scale", "layer_decay")), 1.0),
    "hyperparameters.class_weights": None,
    "hyperparameters.targets": None,
    "hyperparameters.frozen_dtype": None,
    "hyperparameters.probe_l2": None,
    "hyperparameters.start_decay": None,
    "hyperparameters.keep_answers": None,
    "hyperparameters.pace": None,
    "hyperparameters.metric_learning": None,
}
_SEEDS = ("seed", "data.seed", "data.subset.seed", "data.subset.sha256", "data.shared_with_train")
_LENGTH = ("max_epochs", "training.max_steps", "training.callbacks", "read")


def cell_protocol(record: Mapping[str, Any]) -> dict[str, Any]:
    """All that runs must share to be averaged over seeds, by dotted key: all but results, places and seeds."""
    out: tuple[str, ...] = (*_RESULTS, *_ENVIRONMENT, *_PLACES, *_EXACT, *_SEEDS)
    if "fingerprints" in (record.get("data") or {}):  # of the whole lists, where this is of what a seed draws of them
        out = (*out, "data.fingerprint")
    if (record.get("data") or {}).get("subset"):  # whose channels have statistics of their own
        out = (*out, *CHANNELS)
    kept = {key: value for key, value in _flat("", record) if not below(key, out)}
    tested = ((record.get("evaluated") or {}).get("test") or {}).get("precision")
    other = {"test precision": tested} if tested not in (None, record.get("precision")) else {}
    return kept | {"epoch rule": epoch_rule(record)} | other


def training_protocol(record: Mapping[str, Any]) -> dict[str, Any]:
    """All that training must share with a checkpoint that it goes on from: all but its length and what follows."""
    out = (*_RESULTS, *_ENVIRONMENT, *_PLACES, *_EXACT, *_LENGTH)
    return {key: value for key, value in json.loads(json.dumps(dict(_flat("", record)))).items() if not below(key, out)}


def of_steps(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """A training protocol with the images of a step in place of the processes that share them.

    How many these are changes results by rounding alone, but for what each draws, as for dropout.
    """
    batch, processes = (protocol.get(key) for key in ("data.batch_size", "training.devices"))
    if batch is None or processes is None:
        return dict(protocol)
    rest = {key: value for key, value in protocol.items() if key not in ("data.batch_size", "training.devices")}
    return rest | {"images of a step": batch * processes}


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and (value or prefix not in _IDLE):  # {} is an option at its defaults, not left out
        for key, item in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), item)
    elif prefix not in _IDLE or value != _IDLE[prefix]:
        yield prefix, value


def below(key: str, names: Sequence[str]) -> bool:
    """Whether a dotted key is one of some names, or lies below one; a name that ends in ``_`` is a beginning."""
    return any(key == name or key.startswith(name if name.endswith("_") else f"{name}.") for name in names)


def subset_name(subset: Mapping[str, Any] | None) -> str:
    """Names how many images were trained on, None being all; which ones is a matter of seeds."""
    if subset is None:
        return "all images"
    return f"fraction {subset.get('fraction')}" if subset.get("shots") is None else f"{subset['shots']} shots"
