"""A strength for each image, by how sure both ends are of it; from stored logits, without a forward pass.

DaWin (Oh et al., "DaWin: Training-free dynamic weight interpolation for robust adaptation", ICLR 2025): the weight of
the tuned model is the softmax of both ends' negative entropies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vpt.errors import ConfigError
from vpt.metrics.logits import Logits

TEMPERATURE = 1.0


def weights(start: Logits, end: Logits, temperature: float = TEMPERATURE) -> NDArray[np.float64]:
    """The weight of the tuned model for each image, (N,) in [0, 1], of the logits (N, classes) of both ends.

    It is 1 / (1 + exp((H(end) − H(start)) / T)), of entropies in nats; a ConfigError for a temperature that is not
    positive. A class that is left out has the logit −∞.
    """
    if not temperature > 0:
        raise ConfigError(f"The temperature of weights by entropy is positive, got {temperature}.")
    surer = (entropy(start) - entropy(end)) / temperature
    return np.asarray(0.5 * (1 + np.tanh(0.5 * surer)))  # the logistic function, without overflow


def entropy(logits: Logits) -> NDArray[np.float64]:
    """Entropy in nats of the softmax of each row, (N,)."""
    exact = logits.astype(np.float64)
    exact = exact - exact.max(axis=1, keepdims=True)
    odds = np.exp(exact)
    total = odds.sum(axis=1)
    return np.asarray(np.log(total) - (odds * np.where(odds > 0, exact, 0.0)).sum(axis=1) / total)


def answers(start: Logits, end: Logits, temperature: float = TEMPERATURE) -> Logits:
    """The logits of both ends, (N, classes), mixed by the weight of each image: an ensemble of outputs."""
    weight = weights(start, end, temperature)[:, None]
    with np.errstate(invalid="ignore"):  # 0 · −∞, of what is left out
        mixed = (1 - weight) * start.astype(np.float64) + weight * end.astype(np.float64)
    return np.where(np.isneginf(start) & np.isneginf(end), -np.inf, mixed)


def models(by_alpha: Mapping[float, Logits], temperature: float = TEMPERATURE) -> Logits:
    """Of each image the logits, (N, classes), of the measured model whose α is nearest to its weight.

    α = 0 and 1 are among the keys. It is DaWin's interpolated model but for the distance of the measured α, one forward
    pass more where they are not at hand. Of two equally near ones the smaller α is taken.
    """
    chosen = nearest(by_alpha[0.0], by_alpha[1.0], list(by_alpha), temperature)
    return np.stack([by_alpha[alpha][row] for row, alpha in enumerate(chosen.tolist())])


def nearest(
    start: Logits, end: Logits, alphas: Sequence[float], temperature: float = TEMPERATURE
) -> NDArray[np.float64]:
    """Of each image the α, (N,), among some that is nearest to its weight; of two equally near ones the smaller."""
    known = np.array(sorted(alphas))
    return np.asarray(known[np.abs(weights(start, end, temperature)[:, None] - known).argmin(axis=1)])
