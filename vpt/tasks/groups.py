"""Answers among some of a head's classes: what it says about the others is left out before anything is counted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

Groups = Sequence[Sequence[int]]


def restrict(logits: Tensor, groups: Groups) -> Tensor:
    """Leaves only the classes of a test set, so that argmax and softmax are taken over these.

    Args:
        logits: (B, C).
        groups: One tuple of positions in 0..C-1 a class; the first is its label, the largest logit counts.

    Returns:
        (B, C): at each class's label the largest logit of its positions, elsewhere minus infinity.
    """
    merged = torch.full_like(logits, -torch.inf)
    for width, (labels, positions) in _by_width(tuple(tuple(group) for group in groups)).items():
        values = logits[:, positions.to(logits.device)].reshape(len(logits), -1, width).amax(dim=2)
        merged[:, labels.to(logits.device)] = values
    return merged


def mean_probability(logits: Tensor, groups: Groups) -> Tensor:
    """Turns the answer of a fine-grained classifier into one of coarse classes (Geirhos et al., ICLR 2019).

    Args:
        logits: (B, C).
        groups: G tuples of positions in 0..C-1.

    Returns:
        (B, G): the mean probability of each group's positions, after a softmax over all C.
    """
    probabilities = logits.softmax(dim=1)
    return torch.stack([probabilities[:, list(group)].mean(dim=1) for group in groups], dim=1)


@lru_cache(maxsize=16)
def _by_width(groups: tuple[tuple[int, ...], ...]) -> dict[int, tuple[Tensor, Tensor]]:
    """Labels and positions of the groups of each width."""
    widths = sorted({len(group) for group in groups})
    chosen = {width: [group for group in groups if len(group) == width] for width in widths}
    return {
        width: (torch.tensor([group[0] for group in same]), torch.tensor(same).flatten())
        for width, same in chosen.items()
    }
