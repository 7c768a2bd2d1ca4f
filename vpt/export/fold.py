"""A tuned model as inference needs it: what does not depend on the image is computed once and kept."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vpt.backbones.attention.base import OpenAttention
from vpt.deltas.backbone_parameters import Subset
from vpt.deltas.base import DeltaPart
from vpt.deltas.composition import Delta
from vpt.deltas.key_value import ExtraKeys
from vpt.deltas.lora import Lora
from vpt.deltas.prefix import Prefix
from vpt.deltas.prompt import Prompt
from vpt.deltas.ssf import ScaleShift
from vpt.models.classifier import TunedModel


class FixedKeys(nn.Module):
    """Keys and values of deep prompts as constants: an `AttentionEdit` that projects nothing.

    Attributes:
        keys: (1, heads, n, head_dim).
        values: Likewise.
        bias: On the logits of these keys, (1, 1, 1, n), or None.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor | None
    active = True

    def __init__(self, keys: Tensor, values: Tensor, bias: Tensor | None) -> None:
        """Keeps them.

        Args:
            keys: (1, heads, n, head_dim).
            values: Likewise.
            bias: (1, 1, 1, n) or None.
        """
        super().__init__()
        for name, tensor in (("keys", keys), ("values", values), ("bias", bias)):
            self.register_buffer(name, None if tensor is None else tensor.detach().clone())

    def forward(self, attention: OpenAttention, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `AttentionEdit.__call__`."""
        rows, _, before, _ = keys.shape
        own_keys, own_values = (own.expand(rows, -1, -1, -1) for own in (self.keys, self.values))
        bias = None if self.bias is None else pad(self.bias, (before, 0))
        return torch.cat([keys, own_keys], dim=2), torch.cat([values, own_values], dim=2), bias

    def complete(self, attention: OpenAttention, keys: Tensor, values: Tensor, bias: Tensor | None) -> None:
        """Nothing asks beside the sequence."""


@torch.no_grad()
def fold(model: TunedModel) -> TunedModel:
    """Copies a model into a form of the same function that computes nothing but what depends on the image.

    Deep prompts and prefixes become constant keys and values (DESIGN decision 1), trained copies of parameters take
    the place of the originals, and a LoRA or SSF that then remains alone is merged into the weights.

    Args:
        model: Left as it is.

    Returns:
        A frozen copy in eval mode, for inference only: its deltas cannot be taken off again.
    """
    for attached in model.backbone.attached:
        attached.refresh()  # a copy does not know what was trained or loaded since
    own = copy.deepcopy(model).eval().requires_grad_(False)
    parts = [cast("DeltaPart", part) for part in own.backbone.attached]
    # With everything attached: other deltas may change the projections.
    fixed = [pair for part in parts if _is_constant(part) for pair in _fixed_keys(cast("ExtraKeys", part))]
    for part in parts:
        if isinstance(part, Subset):
            _keep_trained(part)
        elif _is_constant(part) or part.strength == 0.0:
            part.detach()
    left = [cast("DeltaPart", part) for part in own.backbone.attached]
    if len(left) == 1 and isinstance(left[0], Lora | ScaleShift):
        left[0].merge()
    for attention, keys in fixed:
        attention.add_module(f"fixed_keys_{len(attention.edits)}", keys)
        attention.edits.append(keys)
    own.delta = _delta_of([part for part in left if not part.merged])
    return own


def _is_constant(part: DeltaPart) -> bool:
    """Whether all that it does is to add keys that are the same for all images."""
    return isinstance(part, Prefix) or (isinstance(part, Prompt) and part.deep)


def _fixed_keys(part: ExtraKeys) -> Iterator[tuple[OpenAttention, FixedKeys]]:
    if part.strength == 0.0:
        return
    for layer, block in enumerate(part.blocks):
        attention = part.layout.attentions[block]
        keys, values = part.keys_values(layer, attention, 1)
        yield attention, FixedKeys(keys, values, part.key_bias(keys, keys.shape[2], 0))


def _keep_trained(part: Subset) -> None:
    model = part.backbone.model
    names = [key.replace("/", ".") for key in part.values]
    places = [name.rpartition(".") for name in names]
    used = [getattr(model.get_submodule(path), last).clone() for path, _, last in places]
    part.detach()
    for name, tensor in zip(names, used, strict=True):
        model.get_parameter(name).copy_(tensor)


def _delta_of(parts: list[DeltaPart]) -> Delta | None:
    """A handle on what still acts, so that its tensors belong to the model."""
    if not parts:
        return None
    delta = Delta(parts[0].backbone, [])
    delta.parts = nn.ModuleList(parts)
    return delta
