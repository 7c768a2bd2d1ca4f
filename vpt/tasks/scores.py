"""Scores of outputs and labels: any that torchmetrics has, by the name of its class, and a few of our own."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, classification, regression
from torchmetrics.classification import MulticlassConfusionMatrix
from torchmetrics.regression import R2Score
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.wrappers.abstract import WrapperMetric

from vpt.data.targets import Targets
from vpt.errors import ConfigError, UnknownNameError

_OF_CLASSES = {name: each for name, each in vars(classification).items() if isinstance(each, type)}
KNOWN: Mapping[Targets, Mapping[str, type[Metric]]] = {
    "multiclass": {name: each for name, each in _OF_CLASSES.items() if name.startswith("Multiclass")},
    "multilabel": {name: each for name, each in _OF_CLASSES.items() if name.startswith("Multilabel")},
    "regression": {name: getattr(regression, name) for name in regression.__all__},
}
"""Classes of torchmetrics by the targets that they are of."""
_ACTIVATIONS: Mapping[Targets, Callable[[Tensor], Tensor]] = {
    "multiclass": partial(torch.softmax, dim=1),
    "multilabel": torch.sigmoid,
    "regression": Tensor.contiguous,
}
_COUNTS: Mapping[Targets, str] = {"multiclass": "num_classes", "multilabel": "num_labels", "regression": "num_outputs"}


class MeanPerClass(MulticlassConfusionMatrix):
    """Mean accuracy over the classes in the labels; torchmetrics' also counts, as 0, one that is only predicted."""

    def compute(self) -> Tensor:
        """The mean of the diagonal over the row sums, in [0, 1]."""
        matrix = super().compute()
        total = matrix.sum(dim=1)
        return (matrix.diagonal() / total)[total > 0].mean()


class OfProbabilities(WrapperMetric):
    """A metric of probabilities: torchmetrics takes logits that happen to lie in [0, 1] for such."""

    def __init__(self, metric: Metric, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.metric, self.activation = metric, activation

    def update(self, outputs: Tensor, target: Tensor) -> None:
        """Adds a batch."""
        self.metric.update(self.activation(outputs), target)

    def compute(self) -> Any:
        """The score."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about classes without images, which do not count
            return self.metric.compute()

    def reset(self) -> None:
        """Forgets all batches."""
        self.metric.reset()
        super().reset()


class Determination(R2Score):
    """R², which is not a number of fewer than two images; torchmetrics' then fails."""

    def compute(self) -> Tensor:
        """The mean over the numbers of an image."""
        return super().compute() if self.total > 1 else self.residual.new_tensor(torch.nan)


class AnswerTable(Metric):
    """Keeps the outputs (N, C) and labels (N, C) of all images."""

    outputs: list[Tensor]
    labels: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("outputs", "labels"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        """Adds a batch."""
        self.outputs.append(outputs.detach().float())
        self.labels.append(labels)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Both, in the order of the batches."""
        return dim_zero_cat(self.outputs), dim_zero_cat(self.labels)


def named_metrics(
    given: Sequence[str | Mapping[str, Any]], count: int, targets: Targets = "multiclass"
) -> dict[str, Metric]:
    """Builds metrics of outputs (B, count) and labels, by what they are called behind the split.

    That is ``f1_score`` for ``MulticlassF1Score``.

    Args:
        given: Names of classes of `torchmetrics.classification`, ``MulticlassF1Score`` and so on, or of
            `torchmetrics.regression`; or dicts of a ``name`` and arguments, as ``{name: MulticlassCohenKappa, weights:
            quadratic}``.
        count: Classes or numbers.
        targets: Which classes of torchmetrics are meant.

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
        if name not in KNOWN[targets]:
            raise UnknownNameError("metric", name, KNOWN[targets])
        bare = name.removeprefix("Multiclass").removeprefix("Multilabel")
        key = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", bare).lower()
        if key in found:
            raise ConfigError(f"metrics has {name} twice, and both would be called {key}: drop one.")
        found[key] = _built(name, options, count, targets)
    return found


def _built(name: str, options: dict[str, Any], count: int, targets: Targets) -> Metric:
    """Builds one, and tries it on two images."""
    kind = KNOWN[targets][name]
    if targets != "regression":
        options = {_COUNTS[targets]: count} | options
        answers = torch.nn.functional.one_hot(torch.tensor([0, count - 1]), count).float()
        truth = answers.argmax(dim=1) if targets == "multiclass" else answers.long()
    else:
        if count > 1 and "num_outputs" in inspect.signature(kind).parameters:
            options = {"num_outputs": count} | options
        answers = truth = torch.tensor([1.0, 2.0])[:, None].expand(2, count)
    try:
        metric = OfProbabilities(kind(**options), _ACTIVATIONS[targets])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about classes without images
            metric.update(answers, truth)
            value = metric.compute()
    except Exception as error:  # whatever torchmetrics raises for arguments that it does not take
        raise ConfigError(f"metrics: {name} refuses its arguments ({' '.join(str(error).split()):.200}).") from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ConfigError(
            f"metrics: {name} gives more than one number: where it takes an average, give macro, micro or weighted; "
            "`vpt test` prints the scores of each class, and of each number."
        )
    metric.reset()
    return metric
