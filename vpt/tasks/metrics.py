"""Metrics that torchmetrics does not have."""

from __future__ import annotations

from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix


class MeanPerClass(MulticlassConfusionMatrix):
    """Mean accuracy over the classes that occur in the labels.

    torchmetrics' macro average also counts, as 0, a class that was predicted but never occurs.
    """

    def compute(self) -> Tensor:
        """The mean of the diagonal over the row sums, in [0, 1]."""
        matrix = super().compute()
        total = matrix.sum(dim=1)
        return (matrix.diagonal() / total)[total > 0].mean()
