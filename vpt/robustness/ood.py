"""Can the model tell that an image belongs to none of its classes? Detection of out-of-distribution images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from vpt.robustness.tables import Logits, blocks, check_table


def detection(inside: Logits, outside: Logits) -> dict[str, float]:
    """Separates images with a known class from images without, by maximum softmax probability and by energy.

    In-distribution images are the positives. Scores are the largest log probability (Hendrycks & Gimpel, ICLR 2017)
    and the negative energy, the log of the summed exponentials (Liu et al., NeurIPS 2020, equation 4, T = 1).

    Args:
        inside: (N, classes), logits of in-distribution test images.
        outside: (M, classes), logits of images of other classes.

    Returns:
        ``auroc_msp``, ``auroc_energy``: in [0, 1], 0.5 is chance, ties count half. ``fpr95_msp``, ``fpr95_energy``: in
        [0, 1], the share of `outside` that passes the strictest threshold that lets 95 % of `inside` pass.

    Raises:
        DataError: A table is empty or not finite.
    """
    from sklearn.metrics import roc_auc_score, roc_curve  # takes a second to import

    scores = [_scores(logits) for logits in (inside, outside)]
    positive = np.repeat([True, False], [len(inside), len(outside)])
    found: dict[str, float] = {}
    for column, name in enumerate(("msp", "energy")):
        score = np.concatenate([pair[:, column] for pair in scores])
        false, true, _ = roc_curve(positive, score, drop_intermediate=False)
        found[f"auroc_{name}"] = float(roc_auc_score(positive, score))
        found[f"fpr95_{name}"] = float(false[np.argmax(true >= 0.95)])
    return found


def _scores(logits: Logits) -> NDArray[np.float64]:
    """(N, 2): log of the maximum softmax probability, negative energy."""
    check_table(logits, np.zeros(len(logits), dtype=np.int64))
    scores = np.empty((len(logits), 2))
    for rows in blocks(*logits.shape):
        block = logits[rows].astype(np.float64)
        scores[rows, 1] = logsumexp(block, axis=1)
        scores[rows, 0] = block.max(axis=1) - scores[rows, 1]
    return scores
