"""What a classifier says about images: classes with probabilities, sets of classes, and whether it would rather not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit, softmax
from torch import Tensor

from vpt.data.inference import Photo, in_batches, read_photos
from vpt.data.targets import Targets
from vpt.data.transforms import Preset
from vpt.errors import ConfigError, WeightsError, check_number
from vpt.metrics import conformal
from vpt.models.calibration import Calibration, HeldOut, LabelThresholds, Residuals

Declined = Literal["", "unsure", "unknown"]
Bar = Callable[[Iterable[int]], Iterable[int]]


class Classifier(Protocol):
    """What is needed of a model: see `vpt.models.classifier.TunedModel`."""

    class_names: list[str]
    targets: Targets
    preset: dict[str, Any]
    calibration: HeldOut | None
    backbone: Any
    training: bool

    def encode(self, images: Tensor) -> Tensor:
        """Features, (B, d)."""

    def classify(self, features: Tensor) -> Tensor:
        """Logits, (B, C)."""


@dataclass(frozen=True)
class Prediction:
    """What a model says about one image.

    Attributes:
        path: As it was given, or the image's position where it has no path.
        label: Name of the most probable class; empty where the image could not be read, and of models of numbers.
        probability: Of that class, in [0, 1]; at the calibration's temperature where there is one.
        top: The most probable classes with their probabilities, as many as were asked for.
        classes: The classes that together hold the right one as often as was asked for by `coverage`, the most probable
            first; None where it was not.
        distance: From the training images' features, high where the image is of none of the classes; None without a
            calibration.
        labels: The classes that the image is of, by a model of several labels an image: those whose probability reaches
            the threshold of the calibration, or 0.5; None of other models, whose probabilities sum to 1.
        values: By name the numbers that a model of numbers gives; None of other models.
        margins: How far each may lie from the truth as often as was asked for by `coverage`; None where it was not.
        declined: ``unknown`` above the distance that was asked for by `false_alarms`, ``unsure`` below the probability
            that was asked for by `max_risk`, else empty.
        fault: Why the image could not be read; empty if it could.
    """

    path: str
    label: str = ""
    probability: float = 0.0
    top: Sequence[tuple[str, float]] = ()
    classes: Sequence[str] | None = None
    distance: float | None = None
    labels: Sequence[str] | None = None
    values: Mapping[str, float] | None = None
    margins: Mapping[str, float] | None = None
    declined: Declined = ""
    fault: str = ""


class Rule(Protocol):
    """How outputs become predictions."""

    def apply(
        self, names: Sequence[str], paths: Sequence[str], outputs: NDArray[Any], features: NDArray[Any], top: int
    ) -> Iterator[Prediction]:
        """Turns outputs (B, C) and features (B, d) into predictions."""


def rule_of(
    model: Classifier,
    calibration: HeldOut | None,
    max_risk: float | None,
    coverage: float | None,
    set_rule: conformal.Rule,
    false_alarms: float | None,
) -> Rule:
    """Finds the thresholds; a ConfigError where there is no calibration, or none for a rate."""
    for name, rate in (("max_risk", max_risk), ("coverage", coverage), ("false_alarms", false_alarms)):
        if rate is None:
            continue
        check_number(name, rate, 0, 1)
        if rate in (0, 1):
            raise ConfigError(f"{name} lies between 0 and 1, got {rate:g}.")
        if model.targets != "multiclass" and not (model.targets == "regression" and name == "coverage"):
            raise ConfigError(f"{name} is not known of a model of {model.targets} targets: leave it out.")
        if calibration is None:
            raise ConfigError(f"{name} needs a calibrated model: `vpt calibrate --delta FILE` writes one.")
    if model.targets == "multilabel":
        known = calibration.values("thresholds") if isinstance(calibration, LabelThresholds) else None
        return LabelRule(np.zeros(len(model.class_names)) if known is None else known)
    if model.targets == "regression":
        fitted = isinstance(calibration, Residuals) and coverage is not None
        return ValueRule(cast("Residuals", calibration).margins(cast("float", coverage)) if fitted else None)
    own = calibration if isinstance(calibration, Calibration) else None
    return ClassRule(
        own,
        None if own is None or max_risk is None else own.confidence_for(max_risk),
        None if own is None or false_alarms is None else own.distance_for(false_alarms),
        set_rule,
        None if own is None or coverage is None else own.set_threshold(coverage, set_rule),
    )


@dataclass(frozen=True)
class LabelRule:
    """Of several labels an image: a class counts as seen from its threshold of the logits on, (C,)."""

    thresholds: NDArray[np.float64]

    def apply(
        self, names: Sequence[str], paths: Sequence[str], outputs: NDArray[Any], features: NDArray[Any], top: int
    ) -> Iterator[Prediction]:
        """See `Rule`."""
        probabilities = expit(outputs)
        order = np.argsort(-probabilities, axis=1, kind="stable")
        held = outputs.astype(np.float32) >= self.thresholds.astype(np.float32)
        for path, shares, ranked, seen_at in zip(paths, probabilities, order, held, strict=True):
            told = [(names[place], float(shares[place])) for place in ranked]
            seen = [names[place] for place in ranked if seen_at[place]]
            yield Prediction(path, *told[0], told[:top], labels=seen)


@dataclass(frozen=True)
class ValueRule:
    """Of numbers, each with a margin, (K,), if one was asked for."""

    margins: NDArray[np.float64] | None

    def apply(
        self, names: Sequence[str], paths: Sequence[str], outputs: NDArray[Any], features: NDArray[Any], top: int
    ) -> Iterator[Prediction]:
        """See `Rule`."""
        margins = None if self.margins is None else dict(zip(names, self.margins.tolist(), strict=True))
        for path, values in zip(paths, outputs.tolist(), strict=True):
            yield Prediction(path, values=dict(zip(names, values, strict=True)), margins=margins)


@dataclass(frozen=True)
class ClassRule:
    """Of one class an image: when the model declines, and which sets of classes it gives."""

    calibration: Calibration | None
    least_probability: float | None
    largest_distance: float | None
    set_rule: conformal.Rule
    set_threshold: float | None

    def apply(
        self, names: Sequence[str], paths: Sequence[str], outputs: NDArray[Any], features: NDArray[Any], top: int
    ) -> Iterator[Prediction]:
        """See `Rule`."""
        known = self.calibration
        probabilities = softmax(outputs / (1.0 if known is None else known.temperature), axis=1)
        order = np.argsort(-probabilities, axis=1, kind="stable")
        distances = [None] * len(outputs) if known is None else known.distances(features).tolist()
        held = None
        if self.set_threshold is not None:
            held = conformal.sets(probabilities, self.set_rule, self.set_threshold)
        for row, path in enumerate(paths):
            ranked = order[row]
            best, distance = float(probabilities[row, ranked[0]]), distances[row]
            yield Prediction(
                path,
                names[ranked[0]],
                best,
                [(names[place], float(probabilities[row, place])) for place in ranked[:top]],
                None if held is None else [names[place] for place in ranked if held[row, place]],
                distance,
                declined=self._declined(best, distance),
            )

    def _declined(self, probability: float, distance: float | None) -> Declined:
        if self.largest_distance is not None and distance is not None and distance > self.largest_distance:
            return "unknown"
        return "unsure" if self.least_probability is not None and probability < self.least_probability else ""


def answers(
    model: Classifier, images: Any, batch_size: int
) -> Iterator[tuple[list[Photo], NDArray[np.float64], NDArray[np.float32]]]:
    """Yields photos in batches, with logits (B, C) and features (B, d) of those that could be read.

    The model's own preprocessing is applied. A ConfigError where the model does not say which it is, or an image is
    none.
    """
    check_number("batch_size", batch_size, 1, 10**6, whole=True)
    if model.training:
        raise ConfigError("The model is in training mode, in which its answers are random: call model.eval() first.")
    if not model.preset:
        raise ConfigError(
            "The model does not say how images are to be prepared: save it with a preset, such as "
            "vpt.data.PRESETS['square'].to_dict()."
        )
    size, mean = model.backbone.image_size, model.backbone.mean
    photos = read_photos(images, Preset.from_dict(model.preset), size, ahead=2 * batch_size)
    for group, pixels in in_batches(photos, batch_size):
        if not len(pixels):
            empty = np.empty((0, len(model.class_names))), np.empty((0, 0), np.float32)
            yield group, *empty
            continue
        with torch.inference_mode():
            features = model.encode(pixels.to(mean.device))
            logits = model.classify(features)
        if not bool(logits.isfinite().all()):
            raise WeightsError("The model gives logits that are not finite: its weights are damaged.")
        yield group, logits.double().cpu().numpy(), features.float().cpu().numpy()


def batch_answers(
    model: Classifier, split: Any, rows: Sequence[int] | None = None, size: int = 64, bar: Bar = iter
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits (N, C) and features (N, d) of images of a split, at positions `rows` or all; `bar` shows how far it is."""
    rows = range(len(split)) if rows is None else rows
    logits, features, device = [], [], model.backbone.mean.device
    for start in bar(range(0, len(rows), size)):
        batch = split.batch([int(row) for row in rows[start : start + size]])
        with torch.inference_mode():
            found = model.encode(batch["image"].to(device))
            logits.append(model.classify(found).float().cpu().numpy())
        features.append(found.float().cpu().numpy())
    return np.concatenate(logits), np.concatenate(features)


def predictions(model: Classifier, images: Any, rule: Rule, top: int, batch_size: int) -> Iterator[Prediction]:
    """Yields what a model says about each image, in order; a damaged one keeps its place with a fault."""
    check_number("top", top, 1, 10**6, whole=True)
    for group, logits, features in answers(model, images, batch_size):
        read = [photo.name for photo in group if not photo.fault]
        said: Iterable[Prediction] = rule.apply(model.class_names, read, logits, features, top) if read else ()
        by_order = iter(said)
        for photo in group:
            yield Prediction(photo.name, fault=photo.fault) if photo.fault else next(by_order)
