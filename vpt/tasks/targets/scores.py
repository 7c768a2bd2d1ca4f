"""Scores of outputs and labels: any that torchmetrics has, by the name of its class, and a few of our own."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import Metric, classification, regression
from torchmetrics.classification import MulticlassConfusionMatrix
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
    "regression": nn.Identity(),
}
_COUNTS: Mapping[Targets, str] = {"multiclass": "num_classes", "multilabel": "num_labels"}


class MeanPerClass(MulticlassConfusionMatrix):
    """Mean accuracy over the classes in the labels; torchmetrics' also counts, as 0, one that is only predicted."""

    def compute(self) -> Tensor:
        """The mean of the diagonal over the row sums, in [0, 1]."""
        matrix = super().compute()
        total = matrix.sum(dim=1)
        return (matrix.diagonal() / total)[total > 0].mean()


class Activated(WrapperMetric):
    """A metric of what an activation makes of outputs: torchmetrics takes logits in [0, 1] for probabilities."""

    def __init__(self, metric: Metric, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.metric, self.activation = metric, activation

    def update(self, outputs: Tensor, target: Tensor) -> None:
        """Adds a batch; in single precision, in which fewer logits are as good as certain than in half."""
        self.metric.update(self.activation(outputs.float()), target)

    def compute(self) -> Any:
        """The score."""
        return self.metric.compute()

    def reset(self) -> None:
        """Forgets all batches."""
        self.metric.reset()
        super().reset()


class AnswerTable(Metric):
    """Keeps the outputs and the labels of all images, float32 (N, C) each."""

    outputs: list[Tensor]
    labels: list[Tensor]

    def __init__(self, count: int) -> None:
        """Of C = `count` classes or numbers."""
        super().__init__()
        self.count = count
        for name in ("outputs", "labels"):
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forgets all batches; what is left is of no image, so that processes without images can be joined."""
        super().reset()
        self.outputs, self.labels = ([torch.empty(0, self.count, device=self.device)] for _ in range(2))

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        """Adds a batch."""
        self.outputs.append(outputs.detach().float())
        self.labels.append(labels.float())

    def compute(self) -> Any:
        """Both, in the order of the batches."""
        return dim_zero_cat(self.outputs), dim_zero_cat(self.labels)


class AnswerScore(AnswerTable):
    """A score of all answers, computed in double precision from arrays (N, C) of outputs and labels."""

    def __init__(self, count: int, score: Callable[[NDArray[np.float64], NDArray[np.float64]], float]) -> None:
        super().__init__(count)
        self.score = score

    def compute(self) -> Tensor:
        """The score, a scalar; NaN where there is none."""
        outputs, labels = (each.cpu().double().numpy() for each in super().compute())
        return torch.tensor(self.score(outputs, labels) if len(outputs) else np.nan, device=self.device)


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
        answers = truth = torch.tensor([1.0, 2.0])[:, None].repeat(1, count)
    try:
        metric = Activated(kind(**options), _ACTIVATIONS[targets])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about classes without images
            metric.update(answers, truth)
            value = metric.compute()
    except Exception as error:  # whatever torchmetrics raises for arguments that it does not take
        raise ConfigError(f"metrics: {name} refuses its arguments ({' '.join(str(error).split()):.200}).") from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        average = "name one of a single number" if targets == "regression" else "give macro, micro or weighted"
        raise ConfigError(
            f"metrics: {name} gives more than one number: where it takes an average, {average}; `vpt test` prints the "
            "scores of each class, and of each number."
        )
    metric.reset()
    return metric
