"""How many errors remain when the model may decline the images that it is least sure of."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from vpt.errors import ConfigError
from vpt.metrics.logits import ranked


def risks(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The share of errors among the k surest images, for every k.

    Equally sure images enter in random order; the expectation over all orders is returned.

    Args:
        confidence: (N,).
        correct: (N,).

    Returns:
        float64 (N,) in [0, 1]; entry k − 1 belongs to coverage k / N.
    """
    _, share = ranked(confidence, correct)
    return np.asarray(np.cumsum(1 - share) / np.arange(1, len(share) + 1))


def aurc(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> float:
    """The area under the risk-coverage curve: the mean of `risks` (Geifman & El-Yaniv, NeurIPS 2017).

    Args:
        confidence: (N,).
        correct: (N,).

    Returns:
        In [0, 1], lower is better.
    """
    return float(risks(confidence, correct).mean())


def risk_at(coverage: float, confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> float:
    """The share of errors among the surest images.

    Args:
        coverage: The share of images answered, in (0, 1]; rounded up to whole images.
        confidence: (N,).
        correct: (N,).

    Returns:
        In [0, 1].

    Raises:
        ConfigError: The coverage is out of range.
    """
    if not 0 < coverage <= 1:
        raise ConfigError(f"Coverage is a share of the images above 0 and at most 1, got {coverage}.")
    answered = math.ceil(round(coverage * len(confidence), 9))  # 0.55 · 100 is a little more than 55
    return float(risks(confidence, correct)[answered - 1])
