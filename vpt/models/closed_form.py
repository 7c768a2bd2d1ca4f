"""Linear heads that are computed rather than searched for: least squares on classes, and the nearest class mean."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vpt.argument_types import checked
from vpt.errors import ConfigError, DivergedError
from vpt.models.logistic_regression import check_rows


@checked
def fit_ridge(features: Tensor, labels: Tensor, num_classes: int, l2: float) -> tuple[Tensor, Tensor]:
    """Minimises half the mean of ‖W x + b − e_y‖² + l2/2 · ‖W‖² over a linear head, e_y being 1 at the label, else 0.

    This is scikit-learn's `Ridge` of such targets with alpha = l2 · N, and with the classes of `RidgeClassifier`; the
    bias is not penalised. Outputs of an image sum to 1, and are no logits. Solved in float64 on the CPU for features
    (N, dim) and labels (N,) in [0, num_classes): weight (num_classes, dim) and bias (num_classes,) in the features'
    type and place. A ConfigError where `l2` is not positive, as features that depend on each other then have no single
    minimum, a DivergedError where features are not finite.
    """
    if l2 <= 0.0:
        raise ConfigError(f"l2 must be positive, got {l2}: without a penalty there may be no single minimum.")
    x, y = finite_rows(features, labels, num_classes)
    targets = nn.functional.one_hot(y, num_classes).double()
    centre, share = x.mean(dim=0), targets.mean(dim=0)
    x, targets = x - centre, targets - share
    gram = x.T @ x / len(x)
    gram.diagonal().add_(l2)
    weight = torch.cholesky_solve(x.T @ targets / len(x), torch.linalg.cholesky(gram)).T
    return weight.contiguous().to(features), (share - weight @ centre).to(features)


@checked
def fit_class_means(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """The head whose largest logit is that of the class with the nearest mean (Mensink et al., TPAMI 2013).

    Logit c is ‖x − m‖² − ‖x − μ_c‖², with m the mean of the class means: W_c = 2 (μ_c − m) and b_c = ‖m‖² − ‖μ_c‖².
    Its softmax is that of the negative squared distances, since m is the same for all classes. A class without images
    has W_c = 0 and the mean of the others' biases: the mean of their logits, so it is never above all of them.
    Features, labels, result and errors are as of `fit_ridge`.
    """
    x, y = finite_rows(features, labels, num_classes)
    counts = torch.bincount(y, minlength=num_classes)
    known = counts > 0
    means = (x.new_zeros(num_classes, x.shape[1]).index_add_(0, y, x) / counts[:, None])[known]
    centre = means.mean(dim=0)
    weight = x.new_zeros(num_classes, x.shape[1])
    weight[known] = 2 * (means - centre)
    biases = centre.square().sum() - means.square().sum(dim=1)
    bias = biases.mean().repeat(num_classes)
    bias[known] = biases
    return weight.to(features), bias.to(features)


def finite_rows(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Features (N, dim) in float64 and labels (N,), both on the CPU; the errors are those of `fit_ridge`."""
    check_rows(features, labels, num_classes)
    if not bool(features.isfinite().all()):
        raise DivergedError("Features of training images are not finite: take other weights, or another precision.")
    return features.detach().to("cpu", torch.float64), labels.cpu()
