"""Conformal prediction: sets of classes that hold the right one as often as was asked for.

Angelopoulos & Bates, "A gentle introduction to conformal prediction" (2021), sections 1 and 2. Probabilities are
(N, C).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vpt.argument_types import checked
from vpt.errors import ConfigError

Floats = NDArray[np.floating]
Rule = Literal["lac", "aps"]


@checked
def nonconformity(probabilities: Floats, rule: Rule) -> NDArray[np.float64]:
    """How badly each class fits each image, (N, C) in [0, 1]; a set holds the classes up to a threshold.

    ``lac`` is 1 − p, which gives the smallest sets (Sadinle, Lei & Wasserman, JASA 2019). ``aps`` is the sum of the
    probabilities of all classes that are more probable, whose sets grow with the doubt about an image (Romano, Sesia &
    Candès, NeurIPS 2020, equation 8, with 0 for their random number: the truth is held at least as often).
    """
    values = np.asarray(probabilities, dtype=np.float64)
    if rule == "lac":
        return np.asarray(1 - values)
    order = np.argsort(-values, axis=1, kind="stable")
    falling = np.take_along_axis(values, order, axis=1)
    before = np.cumsum(falling, axis=1) - falling
    for place in range(1, before.shape[1]):  # equally probable classes enter together
        tied = falling[:, place] == falling[:, place - 1]
        before[tied, place] = before[tied, place - 1]
    scores = np.empty_like(before)
    np.put_along_axis(scores, order, np.clip(before, 0, 1), axis=1)
    return scores


@checked
def quantile(scores: Floats, share: float, asked: str | None = None) -> float:
    """The smallest threshold that a further score stays at or below with a probability of at least `share`.

    It is the ⌈(N + 1) · share⌉-th smallest of N scores (N,), exact where these and the further one are exchangeable. A
    ConfigError where the share is not in (0, 1), or N is too small for it, which it calls as it was `asked` for.
    """
    if not 0 < share < 1:
        raise ConfigError(f"A share of images lies between 0 and 1, got {share}.")
    rank = math.ceil(round((len(scores) + 1) * share, 9))  # 0.9 · 10 is a little more than 9
    if rank > len(scores):
        least = math.ceil(round(share / (1 - share), 9))
        raise ConfigError(
            f"{len(scores)} validation images do not suffice for {asked or f'a share of {share:g}'}: it takes "
            f"{least:,} at least."
        )
    return float(np.sort(scores)[rank - 1])


def sets(probabilities: Floats, rule: Rule, threshold: float) -> NDArray[np.bool_]:
    """Which classes each set holds, bool (N, C): those up to the threshold, and always the most probable one."""
    held = nonconformity(probabilities, rule) <= threshold
    held[np.arange(len(held)), np.argmax(probabilities, axis=1)] = True
    return held
