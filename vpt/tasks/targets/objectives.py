"""What a task of each kind of targets makes smaller, measures, and keeps of a test for tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from vpt.data.targets import Targets
from vpt.metrics.multilabel import mean_ap, mean_f1
from vpt.metrics.regression import mean_r2
from vpt.models.classifier import TunedModel, ValueHead
from vpt.tasks.targets.scores import AnswerScore, AnswerTable, MeanPerClass, named_metrics

Metrics = dict[str, Metric | MetricCollection]
Named = Sequence[str | Mapping[str, Any]]


class Objective(Protocol):
    """Of outputs (B, C) and labels, as `vpt.data.targets.Targets` says."""

    least: int
    """How few classes or numbers there may be."""

    def loss(self, model: TunedModel, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean loss, a scalar."""

    def metrics(self, count: int, named: Named) -> Metrics:
        """Scores of C classes or numbers, by name, and those that a user names."""

    def tally(self, count: int) -> Metric:
        """What a test keeps for tables and figures."""


class Multiclass:
    """Cross-entropy; top-1 and the mean over classes; a confusion matrix, (C, C), rows are true classes."""

    least = 2

    def loss(self, model: TunedModel, outputs: Tensor, labels: Tensor) -> Tensor:
        """See `Objective`."""
        return nn.functional.cross_entropy(outputs, labels)

    def metrics(self, count: int, named: Named) -> Metrics:
        """See `Objective`."""
        scores = {"acc": MulticlassAccuracy(count, average="micro"), "mean_per_class": MeanPerClass(count)}
        return {**scores, **named_metrics(named, count, "multiclass")}

    def tally(self, count: int) -> Metric:
        """See `Objective`."""
        return MulticlassConfusionMatrix(count)


class Multilabel:
    """Binary cross-entropy, the mean over images and classes; mean average precision, and F1 from probability ½ on.

    Classes without images do not count in either.
    """

    least = 1

    def loss(self, model: TunedModel, outputs: Tensor, labels: Tensor) -> Tensor:
        """See `Objective`."""
        return nn.functional.binary_cross_entropy_with_logits(outputs.float(), labels.float())

    def metrics(self, count: int, named: Named) -> Metrics:
        """See `Objective`."""
        scores: Metrics = {
            "mean_ap": AnswerScore(count, mean_ap),
            "f1": AnswerScore(count, lambda logits, labels: mean_f1(logits >= 0, labels)),
        }
        return {**scores, **named_metrics(named, count, "multilabel")}

    def tally(self, count: int) -> Metric:
        """See `Objective`."""
        return AnswerTable(count)


class Regression:
    """Squared error in units of the training labels' standard deviation; mean absolute error, and R²."""

    least = 1

    def loss(self, model: TunedModel, outputs: Tensor, labels: Tensor) -> Tensor:
        """See `Objective`."""
        return ((outputs.float() - labels) / cast("ValueHead", model.head).scale).square().mean()

    def metrics(self, count: int, named: Named) -> Metrics:
        """See `Objective`."""
        scores: Metrics = {"mae": MeanAbsoluteError(), "r2": AnswerScore(count, mean_r2)}
        return {**scores, **named_metrics(named, count, "regression")}

    def tally(self, count: int) -> Metric:
        """See `Objective`."""
        return AnswerTable(count)


OBJECTIVES: Mapping[Targets, Objective] = {
    "multiclass": Multiclass(),
    "multilabel": Multilabel(),
    "regression": Regression(),
}
