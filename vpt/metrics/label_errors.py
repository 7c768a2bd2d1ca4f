"""Images whose label is probably wrong: confident learning (Northcutt, Jiang & Chuang, JAIR 70, 2021)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vpt.argument_types import checked
from vpt.metrics.logits import check_labels


@checked
def suspicious(probabilities: NDArray[np.floating], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of images whose label is probably wrong, the least likely label first; int64 (M,).

    `probabilities` (N, C) are of models that have not seen the image. An image counts where another class has at least
    the mean probability that it has among the images labelled as it (section 3.1, equation 2), and more than the label;
    they are ordered by the probability of their label. A DataError where labels do not belong to the table.
    """
    check_labels(labels, *probabilities.shape)
    own = probabilities[np.arange(len(labels)), labels]
    counts = np.bincount(labels, minlength=probabilities.shape[1])
    sums = np.bincount(labels, weights=own, minlength=probabilities.shape[1])
    usual = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
    over = np.where(probabilities >= usual, probabilities, -1.0)
    likely = over.argmax(axis=1)
    found = np.flatnonzero((over.max(axis=1) > own) & (likely != labels))
    return np.asarray(found[np.argsort(own[found], kind="stable")], dtype=np.int64)
