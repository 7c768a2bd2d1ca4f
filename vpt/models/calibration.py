"""What a delta file keeps of held-out images, so that a classifier knows when it does not know.

Thresholds are not kept, but the scores that they are found among: any error rate, coverage or rate of false alarms can
be asked for later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor

from vpt.data.targets import Targets
from vpt.errors import ConfigError, DeltaFileError
from vpt.metrics import conformal, ood_detection
from vpt.metrics.calibration import risk_threshold

UnknownScore = Literal["mahalanobis", "knn"]
SCORES = ("confidence", "correct", "lac", "aps", "distance")
"""What is kept of each held-out image: its largest probability, whether it was right, and three scores."""
COVERAGES = (0.8, 0.9, 0.95, 0.99)
"""That an exported file tells thresholds for."""
_FITTED: dict[Any, tuple[str, ...]] = {"mahalanobis": ("means", "whitening"), "knn": ("neighbours",)}


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What is kept of held-out images: plain values and tensors.

    Attributes:
        about: ``data`` (which images), ``model`` (`model_digest` of what was measured), and what a subclass names.
        tensors: By name, float32.
    """

    about: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def values(self, name: str) -> NDArray[np.float64]:
        """One of the kept tensors as an array."""
        return self.tensors[name].double().numpy()

    def told(self) -> dict[str, Any]:
        """What a program that has nothing but a model's outputs can do with it, in plain values."""
        raise NotImplementedError

    def faults(self, num_classes: int) -> str:
        """Says what is wrong with it; nothing where it is whole."""
        raise NotImplementedError


class LabelThresholds(HeldOut):
    """Of a model of several labels an image: ``thresholds`` (C,), from which logit on a class counts as seen."""

    def told(self) -> dict[str, Any]:
        """``label_thresholds``, probabilities by class."""
        return {"label_thresholds": expit(self.values("thresholds")).tolist()}

    def faults(self, num_classes: int) -> str:
        """See `HeldOut.faults`."""
        fine = set(self.tensors) == {"thresholds"} and self.tensors["thresholds"].shape == (num_classes,)
        return "" if fine else "cannot be read"


class Residuals(HeldOut):
    """Of a model of numbers: ``residuals`` (N, K), by how much those of N held-out images were missed, without sign."""

    def margins(self, coverage: float) -> NDArray[np.float64]:
        """How far each number may lie from its truth, (K,), in a share `coverage` of images (split conformal)."""
        columns = self.values("residuals").T
        return np.array([conformal.quantile(column, coverage, f"a coverage of {coverage:g}") for column in columns])

    def told(self) -> dict[str, Any]:
        """``margins``, by coverage as far as the held-out images suffice."""
        found = {}
        for coverage in COVERAGES:
            try:
                found[str(coverage)] = self.margins(coverage).tolist()
            except ConfigError:
                continue
        return {"margins": found}

    def faults(self, num_classes: int) -> str:
        """See `HeldOut.faults`."""
        missed = self.tensors.get("residuals", torch.full((0, 0), torch.nan))
        fine = set(self.tensors) == {"residuals"} and missed.ndim == 2 and missed.shape[1] == num_classes
        return "" if fine and len(missed) and bool((missed >= 0).all()) else "cannot be read"


@dataclass(frozen=True, eq=False)
class Calibration(HeldOut):
    """Scores of N held-out images under the model that a file holds, and what tells known from unknown images.

    Attributes:
        about: Plain values: ``temperature`` (None where there is none), ``unknown`` (which score), ``k`` of the nearest
            neighbours, ``data`` (which images), ``model`` (`model_digest` of what was measured).
        tensors: float32 ``confidence``, ``correct``, ``lac``, ``aps`` and ``distance``, (N,), of probabilities at that
            temperature; and of the training images' features ``means`` (K, d) and ``whitening`` (d, d), or
            ``neighbours`` (M, d).
    """

    @property
    def temperature(self) -> float:
        """What logits are divided by; 1 where none was found."""
        return float(self.about["temperature"] or 1.0)

    def distances(self, features: NDArray[np.floating]) -> NDArray[np.float64]:
        """How far features (M, d) lie from those of the training images, (M,): high for unknown images."""
        if self.about["unknown"] == "mahalanobis":
            return ood_detection.mahalanobis(features, self.values("means"), self.values("whitening"))
        return ood_detection.nearest_neighbours(features, self.values("neighbours"), self.about["k"])

    def confidence_for(self, max_risk: float) -> float:
        """The probability from which on the share of errors is at most `max_risk` (`risk_threshold`)."""
        return risk_threshold(self.values("confidence"), self.values("correct") > 0, max_risk)

    def set_threshold(self, coverage: float, rule: conformal.Rule) -> float:
        """The nonconformity up to which a class belongs to a set that holds the truth with this `coverage`."""
        return conformal.quantile(self.values(rule), coverage, f"a coverage of {coverage:g}")

    def distance_for(self, false_alarms: float) -> float:
        """The distance above which an image counts as unknown, for this share of known images that do so too."""
        return conformal.quantile(self.values("distance"), 1 - false_alarms, f"false alarms of {false_alarms:g}")

    def thresholds(self) -> dict[str, dict[str, float]]:
        """Those for common rates, as far as the held-out images suffice: what an exported file tells."""
        asked = {
            "max_risk": ((0.01, 0.02, 0.05, 0.1), self.confidence_for),
            "coverage_lac": (COVERAGES, lambda share: self.set_threshold(share, "lac")),
            "coverage_aps": (COVERAGES, lambda share: self.set_threshold(share, "aps")),
        }
        found: dict[str, dict[str, float]] = {name: {} for name in asked}
        for name, (rates, threshold) in asked.items():
            for rate in rates:
                try:
                    found[name][str(rate)] = threshold(rate)
                except ConfigError:
                    continue
        return found

    def told(self) -> dict[str, Any]:
        """``temperature`` and ``thresholds``."""
        return {"temperature": self.temperature, "thresholds": self.thresholds()}

    def faults(self, num_classes: int) -> str:
        """See `HeldOut.faults`."""
        about, tensors = self.about, self.tensors
        unknown, temperature, k = about.get("unknown"), about.get("temperature"), about.get("k")
        if unknown not in get_args(UnknownScore) or set(tensors) != {*SCORES, *_FITTED[unknown]}:
            return "cannot be read"
        if not (temperature is None or (type(temperature) in (int, float) and temperature > 0)):
            return "has no valid temperature"
        count, fitted = tensors["confidence"].shape, [tensors[name].shape for name in _FITTED[unknown]]
        shaped = len(count) == 1 and count[0] > 0 and all(tensors[name].shape == count for name in SCORES)
        if not shaped or any(len(shape) != 2 or shape[1] != fitted[0][1] for shape in fitted):
            return "contradicts itself"
        if unknown == "mahalanobis" and fitted[1][0] != fitted[1][1]:
            return "contradicts itself"
        if unknown == "knn" and not (type(k) is int and 1 <= k <= fitted[0][0]):
            return "contradicts itself"
        shares = [tensors[name] for name in ("confidence", "correct", "lac", "aps")]
        if any(bool(((each < 0) | (each > 1)).any()) for each in shares) or bool((tensors["confidence"] <= 0).any()):
            return "holds a share outside 0 to 1"
        return ""


KINDS: Mapping[Targets, type[HeldOut]] = {
    "multiclass": Calibration,
    "multilabel": LabelThresholds,
    "regression": Residuals,
}
"""What is kept for a model of each kind of targets."""


def check_calibration(what: str, kept: HeldOut, num_classes: int, digest: str) -> None:
    """Refuses, by a DeltaFileError, what is no calibration of a model of such a digest; `what` names the file."""
    finite = all(each.dtype == torch.float32 and bool(each.isfinite().all()) for each in kept.tensors.values())
    fault = "" if finite else "holds what is no finite number"
    fault = fault or kept.faults(num_classes)
    if not fault and kept.about.get("model") != digest:
        fault = "is of other weights, classes or preprocessing"
    if fault:
        raise DeltaFileError(f"{what} has a calibration that {fault}: calibrate the model anew.")
