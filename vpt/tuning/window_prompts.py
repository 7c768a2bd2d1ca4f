"""Shallow prompts of Swin (Jia et al., ECCV 2022, section 3.2 and appendix): tokens that travel beside the map.

In each block the prompts of an image join every window of that image and only of that image; what they gather is
averaged over its windows. Between stages each counts as the four patches that are merged. The reference implementation
hands prompts to windows of other images (facts of the defect: an image's features then depend on its batch).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vpt.backbones.attention import OpenAttention
from vpt.backbones.factory import Backbone
from vpt.backbones.windows import merge_tokens, patch_mergings, pool_with, rest_of_block, window_answers
from vpt.tuning.extra_keys import Edited, per_row

if TYPE_CHECKING:
    from vpt.tuning.prompts import Prompt


class WindowPrompts:
    """The way of shallow prompts through the blocks of a Swin."""

    def __init__(self, backbone: Backbone, prompt: Prompt, reference_pooling: bool) -> None:
        """Finds the way.

        Args:
            backbone: A Swin.
            prompt: The shallow prompt.
            reference_pooling: The final average includes the prompts.
        """
        self.backbone = [backbone]  # in a list, so that no module owns it twice
        self.prompt, self.reference_pooling = prompt, reference_pooling
        self.merging = patch_mergings(backbone)
        # By block, so that a block that is run again for activation checkpointing finds what it found before.
        self.tokens: dict[int, Tensor] = {}
        self._asking: tuple[Tensor, Tensor, Tensor]

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes along: nothing of the last forward pass, whose graph cannot be copied."""
        return {key: value for key, value in vars(self).items() if key != "_asking"} | {"tokens": {}}

    def hooks(self) -> list[RemovableHandle]:
        """Starts the prompts before the first block, and lets the pool read them where that is asked for."""
        backbone = self.backbone[0]
        handles = [backbone.layout.blocks[0].register_forward_pre_hook(self._start)]
        if self.reference_pooling:
            handles.append(backbone.readout.register_forward_hook(self._pool, prepend=True))
        return handles

    def travel(self, layer: int, attention: OpenAttention, keys: Tensor, values: Tensor) -> Edited:
        """The edit: the prompts join every window."""
        tokens, entering = self.entering(layer)
        queries, own_keys, own_values = attention.project(entering)
        rows = keys.shape[0]
        keys, values = (
            torch.cat([theirs, per_row(own, rows, attention.windows)], dim=2)
            for theirs, own in ((keys, own_keys), (values, own_values))
        )
        self._asking = tokens, entering, queries
        number = tokens.shape[1]
        return keys, values, self.prompt.key_bias(keys, number, keys.shape[2] - number)

    def entering(self, layer: int) -> tuple[Tensor, Tensor]:
        """The prompts as they come to a block, (B, n, dim), and as its attention sees them."""
        tokens = self.tokens[layer]
        if layer in self.merging:
            tokens = merge_tokens(self.merging[layer], tokens)
        return tokens, self.backbone[0].layout.norms[layer](tokens)

    def gather(self, layer: int, attention: OpenAttention, keys: Tensor, values: Tensor, bias: Tensor | None) -> None:
        """What they gather from all keys, those of other deltas too, and their way on to the next block."""
        tokens, entering, queries = self._asking
        answers = window_answers(attention, entering, queries, keys, values, bias)
        self.tokens[layer + 1] = rest_of_block(self.backbone[0].layout.blocks[layer], tokens, answers)

    def _start(self, block: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.prompt.strength != 0.0:
            images = args[0].shape[0]
            self.tokens = {0: self.prompt.dropped(self.prompt.prompts(0), images).expand(images, -1, -1)}

    def _pool(self, module: nn.Module, args: tuple[Tensor, ...], pooled: Tensor) -> Tensor:
        if self.prompt.strength == 0.0:
            return pooled
        return pool_with(self.backbone[0], pooled, self.tokens[len(self.backbone[0].layout.blocks)])
