"""`calibrate`: what held-out images say about a classifier's answers, kept in its delta file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from scipy.special import softmax

from vpt.argument_types import checked
from vpt.atomic_write import check_writable, write_json
from vpt.data import ImageDataModule, ImageDataset
from vpt.errors import ConfigError, WeightsError
from vpt.metrics import conformal, ood_detection
from vpt.metrics.accuracy import wilson
from vpt.metrics.calibration import equal_width, temperature
from vpt.metrics.logits import check_table, predictions
from vpt.metrics.multilabel import f1_thresholds, mean_f1
from vpt.models import TunedModel
from vpt.models.calibration import Calibration, HeldOut, LabelThresholds, Residuals, UnknownScore
from vpt.models.delta_file import load_classifier
from vpt.models.delta_format import model_digest, read_delta, write_delta
from vpt.models.prediction import batch_answers
from vpt.robustness.evaluate import check_data
from vpt.robustness.evaluation_result import why_val_cannot_choose
from vpt.robustness.evaluation_sets import subset
from vpt.screen import console

FITTED = 20_000
"""Training images, at most, whose features say what is known; drawn by class."""
NEIGHBOURS, K = 2_000, 1
"""How many features the nearest neighbours are looked for among, and which of them counts."""
RATES: Mapping[str, Sequence[float]] = {
    "max_risk": (0.02, 0.05, 0.1),
    "coverage_lac": (0.8, 0.9, 0.95),
    "coverage_aps": (0.8, 0.9, 0.95),
    "false_alarms": (0.01, 0.05, 0.1),
}
"""What is measured on test images."""


@dataclass(frozen=True)
class Answers:
    """Outputs (N, C), features (N, d) and labels of the images of a split."""

    logits: NDArray[np.float32]
    features: NDArray[np.float32]
    labels: NDArray[Any]


@checked
def calibrate(
    delta: Path,
    data: ImageDataModule,
    out: Path,
    unknown: UnknownScore | None = None,
    batch_size: int = 64,
    weights: str | None = None,
    test: bool = False,
) -> dict[str, Any]:
    """Writes a delta file with a calibration by validation images that were not trained on.

    Args:
        delta: A delta file.
        data: The task that it was trained on: its training images say what is known.
        out: The delta file to write, the same model with a calibration; beside it, ``.json``, what is returned.
        unknown: The score of unknown images: ``mahalanobis``, of features of length 1 and one covariance, which None
            stands for, or ``knn``.
        batch_size: Images in a forward pass.
        weights: Where the backbone's weights are; None for where they were at training time.
        test: Measure on the test images what the calibration promises.

    Returns:
        ``temperature``, ``data``, ``unknown``, ``calibration_error`` on the validation images before and after; and
        ``test``, for each kind of promise and each of its `RATES` what was measured. Of a model of several labels an
        image ``label_thresholds``, and ``f1``, the mean over classes with 0.5 and with these; of one of numbers
        ``margins`` by coverage. Neither has an unknown score, and both measure no promise on test images.

    Raises:
        ConfigError: There are no such validation images, delta and data do not belong together, or an option is of
            other targets.
        DeltaFileError: The file is not a delta file of a classifier.
        DataError: An image cannot be read.
    """
    check_writable(out)
    header, tensors = read_delta(delta)
    model = load_classifier(delta, weights)
    if model.targets != "multiclass" and (unknown is not None or test):
        option = "--unknown" if unknown is not None else "--test"
        raise ConfigError(
            f"A model of {model.targets} targets knows no unknown images, and no promise to test: leave {option} out."
        )
    unknown = unknown or "mahalanobis"
    check_data(delta, model, data)
    if (reason := why_val_cannot_choose([header["info"]], data)) is not None:
        raise ConfigError(f"{delta} cannot be calibrated on these validation images: {reason}")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    held_out = np.flatnonzero(~data.shared("val"))
    val = _answers(model, data.split("val"), held_out, batch_size, "validation")
    described = data.describe()
    of = {"name": data.name, "images": len(held_out), "fingerprint": described["fingerprints"]["val"]}
    if model.targets != "multiclass":
        told = _other_targets(model, val, {"data": of, "model": model_digest(header, tensors)})
        write_delta(out, header, tensors, told[0], model.activations)
        write_json(out.with_suffix(".json"), told[1])
        return told[1]
    labels = data.split("train").labels
    train = _answers(model, data.split("train"), subset(labels, FITTED, 0), batch_size, "training")
    about = {
        "temperature": temperature(val.logits, val.labels),
        "unknown": unknown,
        **({"k": min(K, len(train.labels))} if unknown == "knn" else {}),
        "data": {
            **of,
            "training_images": len(train.labels),
            "training_fingerprint": described["fingerprints"]["train"],
        },
        "model": model_digest(header, tensors),
    }
    fitted = _fitted(train, unknown)
    kept = Calibration(about, fitted | _scores(val, Calibration(about, fitted)))
    found = {key: about[key] for key in ("temperature", "unknown", "data")} | {
        "calibration_error": {"before": _error(val, 1.0), "after": _error(val, kept.temperature)}
    }
    if test:
        every = np.arange(len(data.split("test").labels))
        found["test"] = measured(kept, _answers(model, data.split("test"), every, batch_size, "test"))
    write_delta(out, header, tensors, kept, model.activations)
    write_json(out.with_suffix(".json"), found)
    return found


def _other_targets(model: TunedModel, val: Answers, about: dict[str, Any]) -> tuple[HeldOut, dict[str, Any]]:
    """What is kept for a model of several labels an image or of numbers, and what is told of it."""
    kept: HeldOut
    if model.targets == "regression":
        kept = Residuals(about, {"residuals": _kept(np.abs(val.logits - val.labels))})
        return kept, {"data": about["data"], **kept.told()}
    kept = LabelThresholds(about, {"thresholds": _kept(f1_thresholds(val.logits, val.labels))})
    limits = kept.values("thresholds").astype(np.float32)
    told = {"before": mean_f1(val.logits >= 0, val.labels), "after": mean_f1(val.logits >= limits, val.labels)}
    return kept, {"data": about["data"], **kept.told(), "f1": told}


def _answers(model: TunedModel, split: ImageDataset, rows: NDArray[np.int64], size: int, what: str) -> Answers:
    """What the model says of some images of a split."""
    bar = partial(track, description=f"Reading {what} images", console=console(stderr=True))
    answers = Answers(*batch_answers(model, split, rows.tolist(), size, bar), np.asarray(split.labels)[rows])
    if model.targets == "multiclass":
        check_table(answers.logits, answers.labels)
    elif not np.isfinite(answers.logits).all():
        raise WeightsError("The model gives outputs that are not finite: its weights are damaged.")
    return answers


def _fitted(train: Answers, unknown: UnknownScore) -> dict[str, torch.Tensor]:
    if unknown == "mahalanobis":
        means, whitening = ood_detection.fit_mahalanobis(train.features, train.labels)
        return {"means": _kept(means), "whitening": _kept(whitening)}
    rows = subset(train.labels, NEIGHBOURS, 0)
    return {"neighbours": _kept(ood_detection.normalized(train.features[rows]))}


def _scores(val: Answers, kept: Calibration) -> dict[str, torch.Tensor]:
    probabilities = softmax(val.logits.astype(np.float64) / kept.temperature, axis=1)
    own = np.arange(len(val.labels)), val.labels
    found = {
        "confidence": probabilities.max(axis=1),
        "correct": probabilities.argmax(axis=1) == val.labels,
        "distance": kept.distances(val.features),
        **{rule: conformal.nonconformity(probabilities, rule)[own] for rule in ("lac", "aps")},
    }
    return {name: _kept(values) for name, values in found.items()}


def _kept(values: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def _error(answers: Answers, temperature: float) -> float:
    found = predictions(answers.logits, answers.labels, temperature)
    return equal_width(found.confidence, found.correct).error


def measured(kept: Calibration, test: Answers) -> dict[str, dict[str, Any]]:
    """What a calibration promises, on images that it has not seen: for each of `RATES` what was measured.

    Each is None where the validation images do not suffice for the rate. Of ``max_risk`` the share that is ``answered``
    and the share ``wrong`` of these; of ``coverage_*`` how often the truth is in the set, ``covered``, and the mean
    ``size``; of ``false_alarms`` how many test images count as ``unknown``. Each with its 95 % interval.
    """
    found = predictions(test.logits, test.labels, kept.temperature)
    probabilities = softmax(test.logits.astype(np.float64) / kept.temperature, axis=1)
    distances = kept.distances(test.features)

    def risk(rate: float) -> dict[str, Any]:
        answered = found.confidence >= kept.confidence_for(rate)
        wrong = ~found.correct[answered]
        return {"answered": _share(answered), "wrong": _share(wrong) if len(wrong) else None}

    def coverage(rule: conformal.Rule, rate: float) -> dict[str, Any]:
        held = conformal.sets(probabilities, rule, kept.set_threshold(rate, rule))
        sizes = held.sum(axis=1)
        margin = 1.96 * sizes.std(ddof=1) / np.sqrt(len(sizes)) if len(sizes) > 1 else 0.0
        size = [float(sizes.mean()), float(sizes.mean() - margin), float(sizes.mean() + margin)]
        return {"covered": _share(held[np.arange(len(held)), test.labels]), "size": size}

    measures: dict[str, Callable[[float], dict[str, Any]]] = {
        "max_risk": risk,
        "coverage_lac": lambda rate: coverage("lac", rate),
        "coverage_aps": lambda rate: coverage("aps", rate),
        "false_alarms": lambda rate: {"unknown": _share(distances > kept.distance_for(rate))},
    }
    told: dict[str, dict[str, Any]] = {}
    for name, rates in RATES.items():
        told[name] = {}
        for rate in rates:
            try:
                told[name][str(rate)] = measures[name](rate)
            except ConfigError:
                told[name][str(rate)] = None
    return told


def _share(hits: NDArray[np.bool_]) -> list[float]:
    return [float(hits.mean()), *wilson(int(hits.sum()), len(hits))]
