"""What a delta of one task is worth on another: Delta Tuning's transfer matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vpt.atomic_write import write_json
from vpt.data import ImageDataModule
from vpt.data.targets import check_multiclass
from vpt.errors import ConfigError, RecordError
from vpt.experiments.executors import Engine
from vpt.experiments.trial import Config, Failure, Record, Trial, identity, merged
from vpt.models.classifier import TunedModel
from vpt.models.delta_file import load_classifier
from vpt.models.logistic_regression import choose_l2, fit_logistic
from vpt.run_record import DELTA_FILE, file_identity, images_read, lacking, read_json, read_record
from vpt.run_record import identity as hash_of
from vpt.tasks.build import build_data

Mode = Literal["init", "frozen"]
PENALTIES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
BATCH = 64


@dataclass(frozen=True)
class Source:
    """A finished run, its config and its `run.json`: a task, its delta, and the accuracy that it was stored with."""

    folder: Path
    config: Config
    record: Record

    @property
    def name(self) -> str:
        """Of the task."""
        return str(self.record["data"]["name"])

    @functools.cached_property
    def key(self) -> list[Any]:
        """All that its delta and its accuracy depend on."""
        return [file_identity(self.folder / DELTA_FILE), identity(self.config)]

    @property
    def accuracy(self) -> float:
        """Stored test accuracy in [0, 1]."""
        return float(self.record["metrics"]["test/acc"])


def read_source(folder: Path, config: Config) -> Source:
    """Reads a run with its `tested_record`."""
    return Source(folder, config, tested_record(folder))


def tested_record(folder: Path) -> Record:
    """Reads the ``run.json`` of a run that was tested and has a delta file; a ConfigError for any other."""
    record = read_record(folder)
    check_multiclass((record.get("data") or {}).get("targets", "multiclass"), "vpt transfer is")
    if lacking(record, ["data.name", "metrics.test/acc"]):
        raise ConfigError(f"{folder} was not tested: vpt test -c {folder}/config.yaml --ckpt_path ... first.")
    if not (folder / DELTA_FILE).is_file():
        raise ConfigError(f"{folder} is no finished run: it has no {DELTA_FILE}.")
    return record


def transfer(
    runs: Mapping[Path, Config], root: Path, engine: Engine, mode: Mode = "init"
) -> dict[str, dict[str, float]]:
    """Carries the delta of every task over to every other.

    Args:
        runs: One finished run for each task, by folder, with its config; of the same deltas on the same backbone.
        root: Folder of the experiment.
        engine: Runs the trials of ``init``.
        mode: ``init`` trains on the target as the target's own run did, from the source's delta; ``frozen`` keeps the
            delta as it is and puts the best linear head on it (penalty chosen on the target's validation images), in
            single precision.

    Returns:
        Test accuracy in [0, 1] by source and target. The diagonal is measured again from the files, and equals what is
        stored. Also written to ``transfer-MODE.json``.

    Raises:
        ConfigError: Two runs are of one task, or a stored accuracy cannot be repeated.
        VPTError: A trial failed.
    """
    sources = [read_source(folder, config) for folder, config in runs.items()]
    names = [source.name for source in sources]
    if len(set(names)) < len(names) or len(names) < 2:
        raise ConfigError(f"A transfer needs at least two runs, each of another task; got {', '.join(names)}.")
    path = root / f"transfer-{mode}.json"
    kept = _Kept(path)
    for source in sources:
        kept.get(f"{source.name}>{source.name}", (source.key, source.accuracy), partial(_again, source))
    cells = _repeat(sources, root, engine) if mode == "init" else _probe(kept, sources)
    cells |= {f"{source.name}>{source.name}": source.accuracy for source in sources}
    matrix = {one: {other: cells[f"{one}>{other}"] for other in names} for one in names}
    write_json(path, {"mode": mode, "cells": kept.cells, "accuracy": matrix})
    return matrix


class _Kept:
    """Numbers that an earlier call has finished, each under a name and the hash of all that it depends on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        kept = read_json(path).get("cells") if path.is_file() else {}
        if not isinstance(kept, dict) or not all(isinstance(each, float) for each in kept.values()):
            raise RecordError(f"{path} holds no accuracies: repair it, or move it away.")
        self.cells: dict[str, float] = kept

    def get(self, name: str, depends: Any, measure: Callable[[], float]) -> float:
        name = f"{name} {hash_of(depends)[:12]}"
        if name not in self.cells:
            self.cells[name] = measure()
            write_json(self._path, {"cells": self.cells})
        return self.cells[name]


def _repeat(sources: Sequence[Source], root: Path, engine: Engine) -> dict[str, float]:
    trials = {
        f"{source.name}>{target.name}": Trial(
            f"{source.name}-to-{target.name}-{hash_of((source.key, target.config))[:12]}",
            merged(target.config, {"model.init_delta": str((source.folder / DELTA_FILE).resolve())}),
            test=True,
        )
        for source in sources
        for target in sources
        if source is not target
    }
    results = engine(list(trials.values()), root)
    cells = {}
    for cell, trial in trials.items():
        result = results[trial.name]
        if isinstance(result, Failure):
            raise ConfigError(f"{trial.name}: {result.reason}")
        cells[cell] = float(result["metrics"]["test/acc"])
    return cells


def _probe(kept: _Kept, sources: Sequence[Source]) -> dict[str, float]:
    cells = {}
    for target in sources:
        data, own = build_data(target.config), identity(target.config)["data"]
        for source in sources:
            if source is not target:
                cell = f"{source.name}>{target.name}"
                cells[cell] = kept.get(cell, (source.key, target.config["data"], own), partial(probe, source, data))
    return cells


def _again(source: Source) -> float:
    """Measures a run's delta file on its own test split; what does not equal the stored number is no basis."""
    data = build_data(source.config)
    total, tested = len(data.split("test")), images_read(source.record).get("test")
    if tested != total:
        raise ConfigError(f"{source.folder} was tested on {tested} of {total} images: test it on all of them.")
    model = _model(source)
    given = source.config["data"]["init_args"].get("batch_size") or BATCH  # rounding may depend on it
    batches = DataLoader(data.split("test"), batch_size=given)
    with torch.inference_mode(), _as_tested(source):
        hits = sum(int((model(batch["image"]).argmax(1).cpu() == batch["label"]).sum()) for batch in batches)
    if round(source.accuracy * total) != hits:
        raise ConfigError(
            f"{source.folder} has {source.accuracy:.4f} stored, its delta file gives {hits / total:.4f} on {total} "
            "images: test it again on this machine."
        )
    return source.accuracy


def _as_tested(source: Source) -> torch.autocast:
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(source.record.get("precision", ""))
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", half, enabled=half is not None)


def probe(source: Source, data: ImageDataModule) -> float:
    """Test accuracy, in [0, 1], of the best linear head for some data on the features that a source's delta gives."""
    model = _model(source)
    if (theirs := model.preset.get("channels")) != (ours := data.preset.to_dict().get("channels")):
        raise ConfigError(f"{source.folder} is of channels {theirs}, {data.name} of {ours}: give runs of the same.")
    parts = {name: _features(model.backbone, data, name) for name in ("train", "val", "test")}
    apart = torch.from_numpy(~data.shared("train", "val"))
    features, labels = parts["train"]
    l2 = choose_l2((features[apart], labels[apart]), parts["val"], data.num_classes, list(PENALTIES))
    weight, bias = fit_logistic(features, labels, data.num_classes, l2)
    predicted = (parts["test"][0] @ weight.T + bias).argmax(1)
    return float((predicted == parts["test"][1]).float().mean())


def _model(source: Source) -> TunedModel:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_classifier(source.folder / DELTA_FILE, source.config["model"]["init_args"].get("weights")).to(device)


def _features(backbone: torch.nn.Module, data: ImageDataModule, split: str) -> tuple[Tensor, Tensor]:
    rows = []
    with torch.inference_mode():
        for batch in DataLoader(data.split(split), batch_size=BATCH):
            rows.append((backbone(batch["image"]).float().cpu(), batch["label"]))
    return torch.cat([row[0] for row in rows]).clone(), torch.cat([row[1] for row in rows])
