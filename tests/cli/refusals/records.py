"""What earlier runs and evaluations left, damaged: the file is named."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from . import Row

_RUN: dict[str, Any] = {
    "task": "PromptTuning",
    "status": "finished",
    "hyperparameters": {"deep": True},
    "seed": 0,
    "max_epochs": 1,
    "epochs": 1,
    "data": {
        "name": "digits",
        "preset": "square",
        "image_size": 64,
        "complete": True,
        "subset": None,
        "lists": {"test": "digits/test"},
        "counts": {"train": 8, "test": 8},
    },
    "backbone": {"weights_id": "vit"},
    "parameters": {"trainable": 1, "total": 2},
    "metrics": {"test/acc": 0.5},
}

_PROTOCOL: dict[str, Any] = {
    "data": {
        "name": "digits",
        "fingerprint": "f",
        "preset": "square",
        "image_size": 64,
        "complete": True,
        "counts": {"test": 2},
    },
    "backbone": {"name": "vit", "weights_id": "vit", "fingerprint": "b"},
    "delta": {"sha256": "d", "specs": []},
    "start": None,
    "way": "head",
    "head": "tuned",
    "logits": "float32",
    "precision": "fp32",
}
_ROW: dict[str, Any] = {
    "set": "clean",
    "kind": "clean",
    "severity": None,
    "n": 2,
    "alpha": 1.0,
    "record": "clean.parquet",
    "top1": 0.5,
    "low": 0.1,
    "high": 0.9,
    "mean_per_class": 0.5,
    "ends": None,
}
_EVALUATION: dict[str, Any] = {"protocol": _PROTOCOL, "alpha": {"why_not": "one α only"}, "rows": [_ROW]}

_HEADER: dict[str, Any] = {
    "format": "vpt-delta/1",
    "backbone": {
        "name": "vit_nano_patch8_64",
        "weights": "pretrained",
        "weights_id": "vpt/vit_nano_patch8_64",
        "fingerprint": "f",
        "image_size": 64,
        "normalization": "weights",
    },
    "specs": [],
    "class_names": ["a", "b"],
    "preset": {},
    "tensors": ["head.bias", "head.weight"],
}


def _with(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy in which a dotted key has another value, or is missing where that is `...`."""
    changed = copy.deepcopy(values)
    *above, last = key.split(".")
    place = changed
    for part in above:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return changed


# by the folder that it lies in; what is text is written as it is
_RECORDS: dict[str, Any] = {
    "truncated": json.dumps(_RUN)[:-20],
    "empty": "",
    "list": "[]",
    "text": "hello",
    "number": "1",
    "null": "null",
    "nested": "[" * 100_000,
    "digits": f'{{"seed": {"9" * 5000}}}',
    "no_metrics": _with(_RUN, "metrics", None),
    "metrics_list": _with(_RUN, "metrics", []),
    "metric_null": _with(_RUN, "metrics.test/acc", None),
    "metric_text": _with(_RUN, "metrics.test/acc", "0.9"),
    "metric_true": _with(_RUN, "metrics.test/acc", True),
    "metric_nan": _with(_RUN, "metrics.test/acc", float("nan")),
    "metric_infinite": _with(_RUN, "metrics.test/loss", float("inf")),
    "metric_percent": _with(_RUN, "metrics.test/acc", 93.2),
    "data_text": _with(_RUN, "data", "digits"),
    "data_named_5": _with(_RUN, "data.name", 5),
    "counts_text": _with(_RUN, "data.counts", "many"),
    "count_negative": _with(_RUN, "data.counts.test", -1),
    "seed_text": _with(_RUN, "seed", "zero"),
    "backbone_null": _with(_RUN, "backbone", None),
    "parameters_text": _with(_RUN, "parameters.trainable", "few"),
}
# records that `runs` shows, and of which `report` can make no row
_INCOMPLETE: dict[str, tuple[Any, str]] = {
    "untested": (_with(_RUN, "metrics", {}), "No tested run below"),
    "no_data": (_with(_RUN, "data", None), "it has no data.name"),
    "without_data": (_with(_RUN, "data", ...), "it has no data.name"),
    "no_counts": (_with(_RUN, "data.counts", {}), "it has no data.counts.train"),
    "no_weights": (_with(_RUN, "backbone", {}), "it has no backbone.weights_id"),
    "no_options": (_with(_RUN, "hyperparameters", {}), "hyperparameters are not those of PromptTuning"),
    "odd_deltas": (
        _with(_with(_RUN, "task", "DeltaTuning"), "hyperparameters.deltas", [1]),
        "not those of DeltaTuning",
    ),
}
_EVALUATIONS: dict[str, Any] = {
    "truncated": json.dumps(_EVALUATION)[:-9],
    "list": "[]",
    "nothing": "{}",
    "no_rows": _with(_EVALUATION, "rows", []),
    "rows_text": _with(_EVALUATION, "rows", "many"),
    "row_list": _with(_EVALUATION, "rows", [[]]),
    "row_short": _with(_EVALUATION, "rows", [_with(_ROW, "n", ...)]),
    "row_more": _with(_EVALUATION, "rows", [_ROW | {"colour": "red"}]),
    "no_images": _with(_EVALUATION, "rows", [_ROW | {"n": 0}]),
    "alpha_2": _with(_EVALUATION, "rows", [_ROW | {"alpha": 2.0}]),
    "percent": _with(_EVALUATION, "rows", [_ROW | {"top1": 50.0}]),
    "nan": _with(_EVALUATION, "rows", [_ROW | {"top1": float("nan")}]),
    "ends": _with(_EVALUATION, "rows", [_ROW | {"ends": 3}]),
    "protocol_null": _with(_EVALUATION, "protocol", None),
    "no_weights": _with(_EVALUATION, "protocol.backbone.weights_id", ...),
    "data_text": _with(_EVALUATION, "protocol.data", "digits"),
    "odd_way": _with(_EVALUATION, "protocol.way", "sideways"),
}
_INFOS: dict[str, Any] = {
    "data": "digits",
    "metrics": {"test/acc": "good"},
    "read": {"test": "all"},
    "versions": [],
    "parameters": {"trainable": None},
    "hyperparameters": 3,
    "seed": "zero",
    "task": 7,
    "evaluated": {"test": "yes"},
}


def files(here: Path) -> None:
    """Makes what the rows name."""
    for name, content in (_RECORDS | {name: content for name, (content, _) in _INCOMPLETE.items()}).items():
        _write(here / "runs" / name / "run.json", content)
        (here / "runs" / name / "config.yaml").write_text("not: read")
    for name, content in _EVALUATIONS.items():
        _write(here / "evaluations" / name / "robustness.json", content)
    for name in ("lost", "garbage"):
        _write(here / "evaluations" / name / "robustness.json", _EVALUATION)
    _write(here / "evaluations" / "garbage" / "records" / "clean.parquet", "PAR1 and no more")
    (here / "runs" / "folder" / "run.json").mkdir(parents=True)
    (here / "runs" / "utf16").mkdir()
    (here / "runs" / "utf16" / "run.json").write_text(json.dumps(_RUN), encoding="utf-16")
    (here / "runs" / "dangling").mkdir()
    (here / "runs" / "dangling" / "run.json").symlink_to(here / "gone")
    _write(here / "runs" / "running" / "run.json", _with(_RUN, "status", "running"))
    (here / "runs" / "running" / "config.yaml").write_text("not: read")
    (here / "text.safetensors").write_text("text")
    for key, value in _INFOS.items():
        _delta(here / f"{key}.safetensors", {key: value})
    for name, beside in (("run.json", "{"), ("config.yaml", "a: [")):
        _delta(here / "pushed" / name / "delta.safetensors", {})
        _write(here / "pushed" / name / name, beside)


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def _delta(path: Path, info: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"head.weight": torch.zeros(2, 192), "head.bias": torch.zeros(2)}
    save_file(tensors, path, metadata={"vpt": json.dumps(_HEADER | {"info": info})})


_DAMAGED = [*_RECORDS, "folder", "utf16", "dangling"]
_ONE_FORMAT = "export --delta {delta} --format"

ROWS = [
    *(Row(f"runs runs/{name}", "a damaged record", f"{name}/run.json") for name in _DAMAGED),
    *(Row(f"report runs/{name}", "a damaged record", f"{name}/run.json") for name in _DAMAGED),
    *(Row(f"rerun runs/{name}", "a damaged record", f"{name}/run.json") for name in _RECORDS),
    *(Row(f"transfer runs/{name} --out o", "a damaged record", f"{name}/run.json") for name in _DAMAGED[:8]),
    *(Row(f"report runs/{name}", "an incomplete record", says) for name, (_, says) in _INCOMPLETE.items()),
    Row("runs", "no folder named runs/ of runs only", "Not in the table: runs/"),
    Row("runs nowhere", "no such folder", "No run.json below nowhere"),
    Row("runs text.safetensors", "a file", "No run.json below text.safetensors"),
    Row("report nowhere", "no such folder", "No tested run below nowhere"),
    Row("report", "no folder", "runs"),
    Row("rerun nowhere", "no such folder", "nowhere is no run"),
    Row("rerun runs/running", "a run that did not end", "is no finished run"),
    Row("rerun", "no run", "run"),
    Row("profile --run nowhere", "no such run", "nowhere is no run"),
    Row("transfer nowhere --out o", "no such run", "nowhere is no run"),
    Row("transfer runs/untested --out o", "a run that was not tested", "was not tested"),
    *(
        Row(f"robustness {action} evaluations/{name}", "a damaged evaluation", f"{name}/robustness.json")
        for action in ("report", "compare")
        for name in _EVALUATIONS
    ),
    *(
        Row(f"robustness {action} nowhere", "no such folder", "nowhere holds no evaluation")
        for action in ("report", "compare")
    ),
    Row("robustness report evaluations/lost", "a record that is not there", "lacks records/clean.parquet"),
    Row("robustness report evaluations/garbage", "a damaged record", "clean.parquet is not a record"),
    Row("robustness compare evaluations/lost", "no α = 0", "no records at α = 0 and 1"),
    Row("robustness report evaluations/lost evaluations/lost", "a folder twice", "twice"),
    *(Row(f"push --delta {key}.safetensors --repo a/b", "odd info", f"info ({key}") for key in _INFOS),
    Row("push --delta pushed/run.json/delta.safetensors --repo a/b", "damaged", "run.json cannot be read"),
    Row("push --delta pushed/config.yaml/delta.safetensors --repo a/b", "damaged", "config.yaml cannot be read"),
    *(
        Row(f"{start} {file}", "no delta file", file)
        for start in ("push --repo a/b --delta", "export --format onnx --delta")
        for file in ("nowhere", "text.safetensors", "runs", "runs/list/run.json")
    ),
    *(Row(f"push --delta {{delta}} --repo {name}", "no name", "write user/name") for name in ("x", "a/b/c", "'a b/c'")),
    Row(f"{_ONE_FORMAT} tflite", "an unknown format", "tflite"),
    Row(f"{_ONE_FORMAT} onnx --out text.safetensors", "a file that is there", "exists already"),
    Row(f"{_ONE_FORMAT} onnx --out text.safetensors/x", "a folder that is a file", "is not a folder"),
    Row(f"{_ONE_FORMAT} onnx --out {'n' * 300}", "a name of 300 characters", "name too long"),
    Row(f"{_ONE_FORMAT} peft --out text.safetensors", "a file", "is a file"),
    Row(f"{_ONE_FORMAT} torch --weights nowhere", "no such weights", "nowhere"),
]
