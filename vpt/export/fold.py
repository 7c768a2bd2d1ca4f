"""A tuned model as inference needs it: what does not depend on the image is computed once and kept."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import nn

from vpt.deltas.base import DeltaPart, MergeablePart
from vpt.deltas.composition import Delta
from vpt.deltas.extra_key_values import ExtraKeys, FixedKeys
from vpt.deltas.partial_tuning import Subset
from vpt.models.classifier import TunedModel


@torch.no_grad()
def fold(model: TunedModel) -> TunedModel:
    """Copies a model into a form of the same function that computes nothing but what depends on the image.

    Deep prompts and prefixes become constant keys and values (DESIGN decision 1), trained copies of parameters take
    the place of the originals, and a LoRA or SSF that then remains alone is merged into the weights.

    Args:
        model: Left as it is.

    Returns:
        A frozen copy in eval mode, for inference only: its deltas cannot be taken off again, and it has no delta file.
    """
    own = copy.deepcopy(model).eval().requires_grad_(False)
    if own.backbone.folded:
        return own
    own.backbone.folded = True
    own._strength = own.strength  # which the model still tells when its delta is gone
    own.settle_head()  # before what gives the strength is taken out
    parts = [cast("DeltaPart", part) for part in own.backbone.attached]
    constant = [part for part in parts if isinstance(part, ExtraKeys) and part.constant]
    # With everything attached: other deltas may change the projections.
    fixed = [part.constants() for part in constant if part.strength > 0.0]
    for part in parts:
        if isinstance(part, Subset):
            part.keep()
        elif part in constant or part.strength == 0.0:
            part.detach()
    left = [cast("DeltaPart", part) for part in own.backbone.attached]
    if len(left) == 1 and isinstance(left[0], MergeablePart):
        left[0].merge_for_good()
        if left[0].merges_wholly:
            left[0].detach()
            left = []
    for block, keys in (item for blocks in fixed for item in blocks.items()):
        FixedKeys(*keys).install(own.backbone.layout.attentions[block])
    own.delta = _delta_of(left)
    return own


def _delta_of(parts: list[DeltaPart]) -> Delta | None:
    """A handle on what still acts, so that its tensors belong to the model."""
    if not parts:
        return None
    delta = Delta(parts[0].backbone, [])
    delta.parts = nn.ModuleList(parts)
    return delta
