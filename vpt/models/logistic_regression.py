"""The linear head that minimises the regularised cross-entropy exactly: full-batch L-BFGS on kept features."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vpt.argument_types import checked
from vpt.errors import ConfigError, DivergedError

STEP, WIDEST = 10**0.5, (1e-6, 100.0)
"""By what a penalty is multiplied or divided beyond those that are given, and where that ends."""
TOLERANCE = 1e-7
"""Largest entry of the gradient at which the head counts as the minimum."""

Fit = Callable[[Tensor, Tensor, int, float], tuple[Tensor, Tensor]]
"""From features, labels, the number of classes and a penalty to weight and bias of a head."""


def check_rows(features: Tensor, labels: Tensor, num_classes: int) -> None:
    """Refuses, by a ConfigError, features and labels that no head of so many classes can be fitted to."""
    if len(features) != len(labels) or not len(labels) or not bool(((labels >= 0) & (labels < num_classes)).all()):
        raise ConfigError(f"A head is fitted to one label a row, at least one, in [0, {num_classes}).")


@checked
def fit_logistic(features: Tensor, labels: Tensor, num_classes: int, l2: float) -> tuple[Tensor, Tensor]:
    """Minimises mean cross-entropy + l2/2 · ‖W‖² over a linear head, which is strictly convex in W.

    This is scikit-learn's `LogisticRegression` with C = 1 / (l2 · N); the bias is not penalised. Solved in float64 on
    the CPU for features (N, dim) and labels (N,) in [0, num_classes): weight (num_classes, dim) and bias (num_classes,)
    in the features' type and place. A ConfigError where `l2` is not positive (separable classes then have no minimum),
    a DivergedError where the minimum was not reached, as with features that are not finite or far from scale 1.
    """
    if l2 <= 0.0:
        raise ConfigError(f"l2 must be positive, got {l2}: without a penalty separable classes have no minimum.")
    check_rows(features, labels, num_classes)
    x, y = features.detach().to("cpu", torch.float64), labels.cpu()
    centre = x.mean(dim=0)  # the bias is free, so a shift of the features changes nothing but the conditioning
    x = x - centre
    head = torch.zeros(num_classes, x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [head],
        max_iter=5000,
        max_eval=10000,
        history_size=20,
        tolerance_grad=TOLERANCE,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        weight, bias = head[:, :-1], head[:, -1]
        loss = nn.functional.cross_entropy(x @ weight.T + bias, y) + 0.5 * l2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        if bool(x.isfinite().all()):  # else thousands of steps would lead nowhere
            optimizer.step(closure)  # type: ignore[no-untyped-call]
        closure()
    worst = float("nan") if head.grad is None else float(head.grad.abs().max())
    if not worst <= 10 * TOLERANCE:
        raise DivergedError(f"L-BFGS stopped at a gradient of {worst:.1e}, not at the minimum: raise l2 ({l2}).")
    weight, bias = head.detach()[:, :-1], head.detach()[:, -1]
    return weight.contiguous().to(features), (bias - weight @ centre).to(features)


def choose_l2(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    num_classes: int,
    candidates: Sequence[float],
    widen: bool = False,
    fit: Fit = fit_logistic,
) -> float:
    """Picks the penalty whose head classifies validation images best; ties go to the stronger one.

    `train` and `val` are features and labels as for `fit`, whose errors may be raised. With `widen` the
    candidates go on beyond an end that is the best, by factors of √10, as long as it is, and within `WIDEST`.
    """

    def right(l2: float) -> int:
        weight, bias = fit(*train, num_classes, l2)
        return int(((val[0] @ weight.T + bias).argmax(dim=1) == val[1]).sum())

    scores = {l2: right(l2) for l2 in candidates}
    while True:
        ordered = sorted(scores, reverse=True)
        best = max(ordered, key=scores.__getitem__)
        further = best * STEP if best == ordered[0] else best / STEP
        if not widen or best not in (ordered[0], ordered[-1]) or not WIDEST[0] <= further <= WIDEST[1]:
            return best
        scores[further] = right(further)


@checked
def out_of_fold(features: Tensor, labels: Tensor, num_classes: int, l2: float, folds: int = 5, seed: int = 0) -> Tensor:
    """Logits (N, num_classes) of each image by a head that was fitted to the other folds.

    Images of each class are dealt to the folds in an order that `seed` draws. For the rest see `fit_logistic`.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    order = order[torch.argsort(labels.cpu()[order], stable=True)]
    fold = torch.empty_like(order)
    fold[order] = torch.arange(len(order)) % folds
    logits = torch.empty(len(labels), num_classes, dtype=features.dtype)
    for each in range(folds):
        held = fold == each
        if not bool(held.any()) or bool(held.all()):
            continue
        weight, bias = fit_logistic(features[~held], labels[~held], num_classes, l2)
        logits[held] = features[held] @ weight.T + bias
    return logits
