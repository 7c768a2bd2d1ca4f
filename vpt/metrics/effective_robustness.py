"""Effective robustness: accuracy under shift beyond what accuracy on ImageNet predicts (Taori et al., NeurIPS 2020).

Models trained on ImageNet alone lie on a line when both accuracies are on logit axes, β(x) = σ(a·logit(x) + b). What a
model has above β is robustness that accuracy does not explain. A second population are the models that timm has
measured, of any pretraining.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from scipy.special import logit as log_odds

from vpt.argument_types import checked
from vpt.errors import ConfigError, UnknownNameError, VPTWarning

_INSIDE = 1e-12  # keeps the log-odds of an accuracy of 0 or 1 finite


@dataclass(frozen=True)
class Line:
    """Slope a and intercept b on logit axes, fitted on n models, of whose variance the line explains the share r2."""

    slope: float
    intercept: float
    n: int
    r2: float

    def predict(self, reference: float) -> float:
        """β, the accuracy expected under shift; 0 and 1 are moved inwards by 1e-12: it is finite for any slope."""
        inside = np.clip(reference, _INSIDE, 1 - _INSIDE)
        return float(expit(self.slope * log_odds(inside) + self.intercept))


@dataclass(frozen=True)
class Baseline:
    """What models of standard training reach under a shift, by their accuracy on the set `reference`.

    `line` is β above the `knee`, an accuracy there, if there is one, and `below` is β below it. It `begins` at the
    lowest accuracy among the models that the lines were fitted on, which is AlexNet's.
    """

    reference: str
    begins: float
    line: Line
    below: Line | None = None
    knee: float = 0.0

    def predict(self, reference: float) -> float:
        """β, the accuracy expected under shift; at the knee the upper line holds."""
        line = self.below if self.below is not None and reference < self.knee else self.line
        return line.predict(reference)


BASELINES: dict[str, Baseline] = {
    "imagenet_v2": Baseline("imagenet_val", 0.5652, Line(0.9232, -0.4977, 85, 0.996)),
    "imagenet_sketch": Baseline("imagenet_val", 0.5652, Line(1.0709, -2.3701, 85, 0.869)),
    "imagenet_r": Baseline("imagenet_val_r", 0.7691, Line(0.6368, -2.1077, 80, 0.889)),
    "objectnet": Baseline("imagenet_val_objectnet", 0.5661, Line(0.9809, -1.9283, 85, 0.953)),
    "imagenet_a": Baseline(
        "imagenet_val_a",
        0.7615,
        Line(2.9560, -10.2774, 51, 0.905),
        below=Line(0.6894, -5.1400, 33, 0.410),
        knee=0.9186,
    ),
}
"""Ordinary least squares on logit axes over the models of standard training in `robustness_top1s.csv` of the ImageNet
testbed (github.com/modestyachts/imagenet-testbed, commit 0170eec), by its own rules. V2 is matched-frequency in the
format of the validation set, ObjectNet its beta release. ImageNet-A has a knee at ResNet-50, whose errors selected its
images; ResNet-50 itself, with 0 % there, is in neither line.

`imagenet_val_r`, `_a` and `_objectnet` are ImageNet's validation images of the shift's classes, scored among these
classes: a slice of one record, see `logits.matched`."""


TIMM: dict[str, Baseline] = {
    "imagenet_v2": Baseline("imagenet_val", 0.4098, Line(0.9156, -0.4851, 1266, 0.993)),
    "imagenet_sketch": Baseline("imagenet_val", 0.4098, Line(1.3852, -2.7352, 1266, 0.857)),
    "imagenet_r": Baseline("imagenet_val_r", 0.6398, Line(0.9783, -2.9677, 1266, 0.751)),
    "imagenet_a": Baseline("imagenet_val_a", 0.6216, Line(2.1519, -7.7689, 1265, 0.911)),
}
"""The same fit over all models of timm's results of 2025-10-30 (github.com/huggingface/pytorch-image-models, commit
4e5207c, ``results/results-*.csv``), whatever they were trained on, each at its first listed resolution: what one may
expect of a released checkpoint of that accuracy, not of training on ImageNet alone."""

POPULATIONS = {"ImageNet testbed": BASELINES, "timm, 2025-10-30": TIMM}
"""Baselines by the population of models that they were fitted on."""


@checked
def effective_robustness(
    shift: str, accuracy: float, references: Mapping[str, float], population: str = "ImageNet testbed"
) -> float:
    """Measures ρ, the accuracy above the baseline, in percentage points; above 0 is more robust than expected.

    `shift` is a key of the baselines of a `population`, one of `POPULATIONS`; accuracies lie in [0, 1], both ends
    included, since only β is computed on logit axes. The references, by name, must hold the one that the shift is
    compared with, e.g. ``imagenet_val_r`` for ``imagenet_r``. An UnknownNameError where there is no such population or
    baseline, a ConfigError where the reference is missing or an accuracy is no share; a UserWarning where the reference
    lies below `begins`, so that the baseline is extrapolated.
    """
    if population not in POPULATIONS:
        raise UnknownNameError("population of effective robustness", population, POPULATIONS)
    baselines = POPULATIONS[population]
    if shift not in baselines:
        raise UnknownNameError("set with a baseline population for effective robustness", shift, baselines)
    baseline = baselines[shift]
    if baseline.reference not in references:
        raise ConfigError(
            f"Effective robustness on {shift} compares with accuracy on {baseline.reference}, "
            f"got {', '.join(references) or 'none'}: score ImageNet's validation record on the shift's classes."
        )
    reference = references[baseline.reference]
    for name, value in ((shift, accuracy), (baseline.reference, reference)):
        if not 0 <= value <= 1:
            raise ConfigError(f"Accuracy is a share between 0 and 1, got {value} on {name}.")
    if reference < baseline.begins:
        warnings.warn(
            f"Accuracy {100 * reference:.1f} % on {baseline.reference} is below {100 * baseline.begins:.1f} %, where "
            f"the baseline of {shift} begins: effective robustness is extrapolated.",
            VPTWarning,
            stacklevel=2,
        )
    return 100 * (accuracy - baseline.predict(reference))
