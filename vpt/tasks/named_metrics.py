"""Any score of classification that torchmetrics has, by the name of its class."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, classification
from torchmetrics.wrappers.abstract import WrapperMetric

from vpt.errors import ConfigError, UnknownNameError

KNOWN: dict[str, type[Metric]] = {
    name: each for name, each in vars(classification).items() if name.startswith("Multiclass")
}


class _OfProbabilities(WrapperMetric):
    """torchmetrics takes logits that happen to lie in [0, 1] for probabilities: it is given these."""

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self.metric = metric

    def update(self, logits: Tensor, target: Tensor) -> None:
        self.metric.update(logits.softmax(dim=1), target)

    def compute(self) -> Any:
        return self.metric.compute()

    def reset(self) -> None:
        self.metric.reset()
        super().reset()


def named_metrics(given: Sequence[str | Mapping[str, Any]], num_classes: int) -> dict[str, Metric]:
    """Builds metrics of logits (B, num_classes) and labels (B,), by what they are called behind the split.

    That is ``f1_score`` for ``MulticlassF1Score``.

    Args:
        given: Names of classes of `torchmetrics.classification`, ``MulticlassF1Score`` and so on; or dicts of a
            ``name`` and arguments, as ``{name: MulticlassCohenKappa, weights: quadratic}``.
        num_classes: At least 2.

    Raises:
        ConfigError: An argument is refused by torchmetrics, a metric gives more than one number, or one is there twice.
        UnknownNameError: There is no such class.
    """
    found: dict[str, Metric] = {}
    for each in given:
        options = {"name": each} if isinstance(each, str) else dict(each)
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise ConfigError(f"An entry of metrics is a name, or has one: {each!r:.80} has none.")
        if name not in KNOWN:
            raise UnknownNameError("metric", name, KNOWN)
        key = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name.removeprefix("Multiclass")).lower()
        if key in found:
            raise ConfigError(f"metrics has {name} twice, and both would be called {key}: drop one.")
        found[key] = _built(name, options, num_classes)
    return found


def _built(name: str, options: dict[str, Any], num_classes: int) -> Metric:
    """Builds one, and tries it on two images."""
    answers = torch.nn.functional.one_hot(torch.tensor([0, num_classes - 1]), num_classes).float()
    try:
        metric = _OfProbabilities(KNOWN[name](num_classes=num_classes, **options))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about classes without images
            metric.update(answers, answers.argmax(dim=1))
            value = metric.compute()
    except Exception as error:  # whatever torchmetrics raises for arguments that it does not take
        raise ConfigError(f"metrics: {name} refuses its arguments ({' '.join(str(error).split()):.200}).") from error
    if not isinstance(value, Tensor) or value.ndim:
        raise ConfigError(
            f"metrics: {name} gives more than one number: where it takes an average, give macro, micro or weighted; "
            "`vpt test` prints the accuracy of each class."
        )
    metric.reset()
    return metric
