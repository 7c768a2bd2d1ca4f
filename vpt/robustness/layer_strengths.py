"""Strengths of layers that are learned by forward passes alone, on validation images that no model was trained on.

The search is CMA-ES (Hansen and Ostermeier, 2001), from the best single α on; the result is never worse than that α by
its own objective.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from vpt.argument_types import checked
from vpt.atomic_write import write_json
from vpt.backbones.strength import Strength, checked_strength
from vpt.backbones.target_modules import layer_numbers
from vpt.data import ImageDataModule
from vpt.data.corruptions import BASIC, PUBLISHED, SMALLEST, can_corrupt
from vpt.data.targets import check_multiclass
from vpt.errors import ConfigError, DataError, check_number
from vpt.models.delta_file import unfilled
from vpt.models.delta_format import read_header
from vpt.robustness.evaluate import check_data
from vpt.robustness.evaluation_result import why_val_cannot_choose
from vpt.robustness.evaluation_sets import VAL, VAL_CORRUPTED, VAL_SEVERITY, EvaluationSet, subset
from vpt.robustness.test_time import LARGEST_SEED
from vpt.robustness.wise_ft import Swept, sweep
from vpt.run_record import file_identity, read_json
from vpt.screen import console

FORMAT = "vpt-strengths/1"
Objective = Literal["accuracy", "nll"]
GRID = tuple(step / 10 for step in range(11))
"""Of the single α, with which the search begins."""
SPREAD = 0.15
"""Standard deviation of the first generation."""
Score = tuple[float, float]
"""Larger is better: the objective, then what decides between equal ones."""


@dataclass(frozen=True)
class Learned:
    """What was found: the strengths of all layers, what they score, and what the best single α scores.

    Scores are accuracies in [0, 1], or the mean log-likelihood in nats.
    """

    strengths: tuple[float, ...]
    score: float
    alpha: float
    alpha_score: float


@checked
def learn(
    delta: Path,
    data: ImageDataModule,
    out: Path,
    anchor: Path | None = None,
    objective: Objective = "accuracy",
    corrupted: bool = False,
    evaluations: int = 200,
    max_images: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    weights: str | None = None,
    bf16: bool = False,
) -> Learned:
    """Finds a strength for each layer of a tuned model and writes it to a JSON file.

    What an interrupted search has measured lies in `out`, and is not measured again.

    Args:
        delta: A delta file.
        data: The task it was trained on; its validation images decide.
        out: File to write.
        anchor: A linear probe's delta file, whose head belongs to strength 0; None for the tuned head.
        objective: ``accuracy``, of equal ones the smaller negative log-likelihood; or that alone, ``nll``.
        corrupted: Each image under one of five common corruptions, of severity 3, instead of as it is.
        evaluations: How many strengths are tried, at least 12: eleven single α, then the search.
        max_images: Of the validation images, drawn by class; None for all.
        batch_size: Images in a forward pass.
        seed: Of the search, and of the draw.
        weights: Where the backbone's weights are; None for where they were at training time.
        bf16: Forward passes under autocast to bfloat16.

    Raises:
        ConfigError: Delta, anchor and data do not belong together, validation images were trained on, cannot be
            corrupted, or `out` holds another search.
        DeltaFileError: A file is not a delta file, or belongs to other weights.
    """
    check_number("evaluations", evaluations, len(GRID) + 1, 10**6, whole=True)
    check_number("batch_size", batch_size, 1, 10**6, whole=True)
    check_number("seed", seed, 0, LARGEST_SEED, whole=True)
    model, tensors = unfilled(delta, weights)
    check_data(delta, model, data)
    check_multiclass(model.targets, "vpt robustness is")
    files = [file for file in (delta, anchor) if file is not None]
    if reason := why_val_cannot_choose([read_header(file)["info"] for file in files], data):
        raise ConfigError(f"Strengths are learned on validation images: {reason}")
    if corrupted and not can_corrupt(data):
        can = f"8-bit colours of at least {SMALLEST} pixels can"
        raise ConfigError(f"These images cannot be corrupted ({can}): leave it out.")
    swept = sweep(delta, model.to("cuda" if torch.cuda.is_available() else "cpu"), tensors, [0.0, 1.0], anchor)
    if swept.way in ("none", "head"):
        raise ConfigError(f"{delta} trains a head alone: no layer has a strength. Give a delta of the backbone.")
    images, labels = _images(data, corrupted, max_images, seed)
    told = {
        "format": FORMAT,
        "delta": file_identity(delta),
        "anchor": None if anchor is None else file_identity(anchor),
        "objective": objective,
        "images": {"list": data.describe()["fingerprints"][VAL], "n": len(labels), "seed": seed},
        "corrupted": [BASIC, VAL_SEVERITY, PUBLISHED] if corrupted else None,
        "precision": "bf16" if bf16 else "fp32",
    }
    trace = _Trace(out, told, seed, evaluations)
    device = model.backbone.mean.device

    def measure(strength: Strength) -> Score:
        swept.set_strength(strength)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = [swept.model(batch.to(device)).float().cpu() for batch in torch.split(images, batch_size)]
        return score(torch.cat(logits), labels, objective)

    columns = (TextColumn("Learning strengths"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True)) as progress:
        bar = progress.add_task("", total=evaluations)
        found = _search(swept, lambda strength: trace.scored(measure, strength), evaluations, seed, progress, bar)
    trace.write(found)
    return found


def score(logits: Tensor, labels: Tensor, objective: Objective) -> Score:
    """Scores logits (N, classes) of images with labels (N,)."""
    fit = -float(torch.nn.functional.cross_entropy(logits.double(), labels))
    return (fit, 0.0) if objective == "nll" else (float((logits.argmax(dim=1) == labels).double().mean()), fit)


def _search(
    swept: Swept, scored: Callable[[Strength], Score], evaluations: int, seed: int, progress: Progress, bar: Any
) -> Learned:
    try:
        from cmaes import CMA
    except ImportError as error:
        raise ConfigError("The search needs cmaes: pip install 'vpt[strengths]'.") from error
    backbone = swept.model.backbone
    number = layer_numbers(backbone)[1] + 1
    tried: list[tuple[Score, tuple[float, ...]]] = []

    def add(values: Sequence[float]) -> Score:
        found = scored(checked_strength(values, backbone))
        tried.append((found, tuple(values)))
        progress.advance(bar)
        return found

    singles = {alpha: add([alpha] * number) for alpha in GRID}
    alpha = max(singles, key=lambda each: (singles[each], -abs(each - 0.5)))
    bounds = np.tile([0.0, 1.0], (number, 1))
    start = np.full(number, min(max(alpha, SPREAD), 1 - SPREAD))
    optimizer = CMA(mean=start, sigma=SPREAD, bounds=bounds, seed=seed)
    while len(tried) < evaluations:
        asked = [optimizer.ask() for _ in range(optimizer.population_size)]
        found = [add([float(value) for value in each.clip(0, 1)]) for each in asked[: evaluations - len(tried)]]
        if len(found) < len(asked):
            break
        order = sorted(range(len(found)), key=lambda index: found[index], reverse=True)
        optimizer.tell([(asked[index], float(rank)) for rank, index in enumerate(order)])  # it reads ranks alone
    best, strengths = max(tried, key=lambda each: each[0])  # of equal ones the first, a single α
    return Learned(strengths, best[0], alpha, singles[alpha][0])


def _images(data: ImageDataModule, corrupted: bool, max_images: int | None, seed: int) -> tuple[Tensor, Tensor]:
    dataset = data.split(VAL)
    index = subset(dataset.labels, max_images, seed)
    index = index[~data.shared(VAL)[index]]
    item = EvaluationSet(VAL, VAL_CORRUPTED if corrupted else VAL)
    images = torch.stack([dataset[int(row)]["image"] for row in index])
    return item.variant(images, [dataset.paths[row] for row in index]), torch.from_numpy(dataset.labels[index])


class _Trace:
    """What was measured so far, in the order of the search, which follows from its seed."""

    def __init__(self, path: Path, told: Mapping[str, Any], seed: int, evaluations: int) -> None:
        self.path = path
        self.told = json.loads(json.dumps({**told, "seed": seed, "evaluations": evaluations}))  # as it is read again
        self.scores: list[list[float]] = []
        self.at = 0
        if path.is_file():
            kept = read_json(path)
            if differ := sorted(key for key in self.told if kept.get(key) != self.told[key]):
                raise ConfigError(f"{path} holds another search ({', '.join(differ)} differ): name another --out.")
            self.scores = kept["scores"]

    def scored(self, measure: Callable[[Strength], Score], strength: Strength) -> Score:
        if self.at == len(self.scores):
            self.scores.append(list(measure(strength)))
            if self.at % 10 == 0:
                self.write(None)
        first, second = self.scores[self.at]
        self.at += 1
        return first, second

    def write(self, found: Learned | None) -> None:
        told: dict[str, Any] = {**self.told, "scores": self.scores}
        if found is not None:
            told |= {"strengths": list(found.strengths), "score": found.score}
            told |= {"alpha": found.alpha, "alpha_score": found.alpha_score}
        write_json(self.path, told)


def strengths_of(given: Sequence[str], delta: Path, anchor: Path | None) -> float | list[float]:
    """Reads strengths from a command line: one number, several, or a file that `learn` wrote for these two files.

    A ConfigError where it is neither, or of another delta file; a DataError where its search was not finished.
    """
    try:
        numbers = [float(each) for each in given]
        return numbers[0] if len(numbers) == 1 else numbers
    except ValueError:
        if len(given) > 1 or not (path := Path(given[0])).is_file():
            raise ConfigError(f"Strengths are numbers from 0 to 1 or one file, got {' '.join(given):.80}.") from None
    kept = read_json(path)
    if kept.get("format") != FORMAT:
        raise ConfigError(f"{path} is no file of `vpt robustness strengths`.")
    if kept["delta"] != file_identity(delta):
        raise ConfigError(f"The strengths in {path} were learned for another delta file than {delta}.")
    if kept["anchor"] != (None if anchor is None else file_identity(anchor)):
        given_then = "without an anchor" if kept["anchor"] is None else "with another anchor"
        raise ConfigError(f"The strengths in {path} were learned {given_then}: give --anchor as it was then.")
    if "strengths" not in kept:
        raise DataError(f"The search in {path} was not finished: the same command goes on with it.")
    return [float(each) for each in kept["strengths"]]
