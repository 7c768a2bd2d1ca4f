"""`run`: a delta file, measured on the clean test set, on every shift and under corruption, at every strength."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import vpt
from vpt.data import ImageDataModule
from vpt.data.corruptions import BASIC, PARAMETERS
from vpt.errors import ConfigError
from vpt.robustness.evaluate import Pair, evaluate
from vpt.robustness.heads import read_anchor
from vpt.robustness.result import RobustnessResult, score
from vpt.robustness.shifts import EvaluationSet, evaluation_sets, subset
from vpt.tuning import TunedModel, load
from vpt.tuning.files import identity

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
_PACKAGES = ("torch", "timm", "numpy", "albumentations", "opencv-python-headless", "pillow")


def run(
    delta: Path,
    data: ImageDataModule,
    alphas: Sequence[float],
    out: Path,
    anchor: Path | None = None,
    max_images: int | None = None,
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    batch_size: int = 64,
    seed: int = 0,
    weights: str | None = None,
    corruptions: Sequence[str] = BASIC,
) -> RobustnessResult:
    """Evaluates a delta file in and out of distribution and keeps every answer.

    Finished records under `out` are reused and interrupted ones continued where their protocol is the same.

    Args:
        delta: A delta file. Without prompts there is nothing to interpolate and only α = 1 is evaluated.
        data: The task it was trained on; its test split and shifts are used.
        alphas: Strengths in [0, 1]: 0 is the bare backbone, 1 the tuned model.
        out: Folder for ``robustness.json`` and ``records/*.parquet``.
        anchor: A linear probe's delta file, whose head belongs to α = 0; None for the tuned head at every α.
        max_images: Of each list, drawn by class; None for all.
        severities: Of each corruption; empty for no corruptions.
        batch_size: Images in a forward pass.
        seed: Of the draw for `max_images`.
        weights: Where the backbone's weights are; None for where they were at training time.
        corruptions: Kinds of corruption (:data:`vpt.data.corruptions.CORRUPTIONS`).

    Returns:
        The scores.

    Raises:
        UnknownNameError: There is no such corruption.
        ConfigError: An argument is out of range, or delta, anchor and data do not belong together.
        DeltaFileError: A file is not a delta file, or belongs to other weights.
        DataError: An image cannot be read.
        WeightsError: The backbone's weights cannot be found.
    """
    _check_numbers(alphas, batch_size)
    sets = evaluation_sets(data, severities, corruptions)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(delta, weights).to(device)  # before the anchor, which follows the head's device
    check_data(delta, model, data)
    if anchor is not None:
        if model.delta is None:
            raise ConfigError(f"{delta} holds no prompts, so an anchor has nothing to be interpolated with.")
        model.set_anchor(read_anchor(anchor, model))
    if model.delta is None:
        alphas = (1.0,)
    protocol = _protocol(delta, model, data, anchor) | {"device": device}
    pairs = _pairs(data, sets, sorted(alphas), protocol, out / "records", max_images, seed)
    with _progress() as progress:
        answers = sum(len(pair.index) for pair in pairs)
        bar = progress.add_task(str(data.name), total=answers, completed=sum(pair.done for pair in pairs))
        for split in dict.fromkeys(item.split for item in sets):
            group = [pair for pair in pairs if pair.item.split == split]
            index = group[0].index
            evaluate(model, data.split(split), index, group, batch_size, lambda n: progress.advance(bar, n))
    rows = [score(pair.record(), pair.path.name) for pair in pairs]
    result = RobustnessResult(rows, protocol | {"max_images": max_images}, out)
    result.write()
    return result


def _check_numbers(alphas: Sequence[float], batch_size: int) -> None:
    if not alphas or len(set(alphas)) < len(alphas) or not all(0.0 <= alpha <= 1.0 for alpha in alphas):
        raise ConfigError(f"alphas are distinct numbers between 0 (backbone) and 1 (tuned), got {list(alphas)}.")
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}.")


def check_data(delta: Path, model: TunedModel, data: ImageDataModule) -> None:
    """Refuses data that a delta was not trained for.

    Args:
        delta: Its file, for the message.
        model: The model in it.
        data: What it is to be used on.

    Raises:
        ConfigError: Classes, image size or preset differ.
    """
    ours, theirs = model.class_names, data.class_names
    if len(ours) != len(theirs):
        raise ConfigError(f"{delta} has {len(ours)} classes, {data.name} has {len(theirs)}: give its own task.")
    for position, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        if our != their:
            raise ConfigError(
                f"Class {position} is {our!r} in {delta} and {their!r} in {data.name}: give its own task."
            )
    if model.backbone.image_size != data.image_size:
        raise ConfigError(
            f"{delta} takes images of {model.backbone.image_size} px, the data give {data.image_size} px: "
            f"set the data's image_size to {model.backbone.image_size}."
        )
    if model.preset != data.preset.to_dict():
        raise ConfigError(
            f"{delta} was trained with preset {model.preset.get('name', 'unknown')!r}, the data use "
            f"{data.preset.name!r}: set the data's preset to that of the delta."
        )


def _protocol(delta: Path, model: TunedModel, data: ImageDataModule, anchor: Path | None) -> dict[str, Any]:
    """What all records of a run have in common. No path of this machine: the files are named by their contents."""
    backbone = {key: value for key, value in identity(model).items() if key != "weights"}
    described = data.describe()
    keys = ("name", "preset", "image_size", "num_classes", "fingerprint", "complete", "shared_with_train")
    return {
        "backbone": backbone,
        "delta": {"sha256": _sha256(delta), "specs": [] if model.delta is None else model.delta.specs},
        "training": model.info,
        "anchor": None if anchor is None else {"sha256": _sha256(anchor)},
        "head": "tuned" if anchor is None else "interpolated",
        "data": {key: described[key] for key in keys},
        "versions": {"vpt": vpt.__version__, "python": platform.python_version()} | {p: version(p) for p in _PACKAGES},
    }


def _pairs(
    data: ImageDataModule,
    sets: Sequence[EvaluationSet],
    alphas: Sequence[float],
    protocol: dict[str, Any],
    folder: Path,
    max_images: int | None,
    seed: int,
) -> list[Pair]:
    lists, pairs = data.describe()["lists"], []
    groups: Any = getattr(data, "groups", lambda _: None)
    for item in sets:
        dataset = data.split(item.split)
        index = subset(dataset.labels, max_images, seed)
        own = {
            "set": item.name,
            "kind": item.kind,
            "severity": item.severity,
            "parameter": None if item.severity is None else PARAMETERS[item.kind][item.severity - 1],
            "list": lists[item.split],
            "groups": groups(item.split),  # which classes count, where not all do
            "n": len(index),
            "seed": None if len(index) == len(dataset) else seed,
        }
        for alpha in alphas:
            full = protocol | own | {"alpha": float(alpha)}
            path = folder / f"{item.name}-alpha-{float(alpha)}.parquet"
            pairs.append(Pair(item, float(alpha), index, dataset.labels[index], data.num_classes, full, path))
    return pairs


def _sha256(path: Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _progress() -> Progress:
    return Progress(
        TextColumn("Evaluating {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
