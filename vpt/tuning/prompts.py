"""Visual prompts, shallow and deep (Jia et al., "Visual Prompt Tuning", ECCV 2022, sections 3.1-3.2).

Deep prompts are inserted before every block and their outputs are discarded, so they act only through the keys and
values of their block: K = W_k N(P) + b_k and V = W_v N(P) + b_v, with N the block's own norm. They are computed once
per step for the whole batch. Shallow prompts are tokens that travel through all blocks.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle

from vpt.backbones.attention import OpenAttention, log_bias
from vpt.backbones.factory import Backbone
from vpt.errors import ConfigError, UnknownNameError
from vpt.tuning.part import DeltaPart

DROPOUT_MODES = ("sample", "shared", "key_value", "prompt")
DropoutMode = Literal["sample", "shared", "key_value", "prompt"]


class Prompt(DeltaPart):
    """Learned prompts for a plain vision transformer.

    Attributes:
        tokens: The prompts, (layers, num_tokens, dim) if deep, else (1, num_tokens, dim).
    """

    taxonomy = "addition"

    def __init__(
        self,
        backbone: Backbone,
        num_tokens: int,
        deep: bool = True,
        dropout: float = 0.0,
        dropout_mode: DropoutMode = "sample",
    ) -> None:
        """Draws prompts from U(-v, v) with v = √(6 / (3·p² + dim)), the paper's Xavier bound for patches of p pixels.

        Args:
            backbone: The backbone that the prompts are for.
            num_tokens: Prompts per layer, at least 1.
            deep: Prompts before every block (VPT-deep) or only before the first (VPT-shallow).
            dropout: Probability in [0, 1).
            dropout_mode: What is dropped in training. ``"sample"``: channels of the prompts, a mask per image (the
                reference's ViT); ``"shared"``: one mask per batch (the reference's Swin); ``"key_value"``: channels
                of keys and values, a mask per image (P-Tuning v2); ``"prompt"``: whole prompts per image. The last
                two need deep prompts.

        Raises:
            ConfigError: A value is out of range.
            UnsupportedBackboneError: The backbone cannot take prompts exactly.
        """
        super().__init__()
        _check(num_tokens, deep, dropout, dropout_mode)
        self.layout = backbone.layout
        self.deep, self.dropout, self.dropout_mode = deep, dropout, dropout_mode
        height, width = self.layout.patch_size
        dim = backbone.num_features
        bound = math.sqrt(6 / (3 * height * width + dim))
        layers = len(self.layout.blocks) if deep else 1
        tokens = torch.empty(layers, num_tokens, dim, dtype=backbone.mean.dtype, device=backbone.mean.device)
        self.tokens = nn.Parameter(tokens.uniform_(-bound, bound))
        self._hooks: list[RemovableHandle] = []
        self._edits: list[partial[tuple[Tensor, Tensor, Tensor | None]]] = []

    def attach(self) -> None:
        """Adds keys and values to every block (deep), or tokens before the first block (shallow)."""
        if self.deep:
            self._edits = [partial(self._add_keys, layer) for layer in range(len(self.layout.blocks))]
        else:
            self._edits = [partial(self._weaken_tokens) for _ in self.layout.blocks]
            self._hooks = [
                self.layout.blocks[0].register_forward_pre_hook(self._insert_tokens),
                self.layout.blocks[-1].register_forward_hook(self._remove_tokens),
            ]
        for attention, edit in zip(self.layout.attentions, self._edits, strict=True):
            attention.edits.append(edit)

    def detach(self) -> None:
        """Removes what `attach` added."""
        for attention, edit in zip(self.layout.attentions, self._edits, strict=False):
            attention.edits.remove(edit)
        for hook in self._hooks:
            hook.remove()
        self._edits, self._hooks = [], []

    def expected_parameters(self) -> int:
        """Layers · num_tokens · dim; one layer if shallow."""
        layers = len(self.layout.blocks) if self.deep else 1
        return layers * self.tokens.shape[1] * self.tokens.shape[2]

    def _dropped(self, prompts: Tensor, batch: int) -> Tensor:
        """Prompts (n, dim) after dropout on their channels: (B, n, dim) with a mask per image, else (1, n, dim)."""
        prompts = prompts.unsqueeze(0)
        if not self.training or self.dropout == 0.0 or self.dropout_mode not in ("sample", "shared"):
            return prompts
        if self.dropout_mode == "sample":
            prompts = prompts.expand(batch, -1, -1)
        return drop(prompts, self.dropout)

    def _add_keys(
        self, layer: int, attention: OpenAttention, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The edit of a deep prompt: appends its keys and values, and log α as their bias."""
        if self._strength == 0.0:
            return keys, values, None
        batch, heads, tokens, _ = keys.shape
        prompts = self._dropped(self.tokens[layer], batch)
        norm = cast("nn.Module", self.layout.blocks[layer].norm1)
        _, extra_keys, extra_values = attention.project(norm(prompts))
        extra_keys = extra_keys.expand(batch, heads, -1, -1)
        extra_values = extra_values.expand(batch, heads, -1, -1)
        bias = self._key_bias(keys, tokens)
        if self.training and self.dropout > 0.0:
            if self.dropout_mode == "key_value":
                extra_keys, extra_values = drop(extra_keys, self.dropout), drop(extra_values, self.dropout)
            elif self.dropout_mode == "prompt":
                bias = self._drop_whole(keys, bias)
        return torch.cat([keys, extra_keys], dim=2), torch.cat([values, extra_values], dim=2), bias

    def _key_bias(self, keys: Tensor, before: int, after: int = 0) -> Tensor | None:
        """The bias: log α on the prompts' columns, 0 on `before` and `after` others: (1, 1, 1, keys); None at α = 1."""
        if self._strength == 1.0:
            return None
        bias = log_bias(self._strength, keys).expand(1, 1, 1, self.tokens.shape[1])
        return pad(bias, (before, after))

    def _drop_whole(self, keys: Tensor, bias: Tensor | None) -> Tensor:
        """Masks each prompt of each image with probability `dropout`: a bias of shape (B, 1, 1, keys + prompts)."""
        batch, _, tokens, _ = keys.shape
        number = self.tokens.shape[1]
        dropped = torch.rand(batch, 1, 1, number, device=keys.device) < self.dropout
        mask = torch.zeros(batch, 1, 1, number, dtype=keys.dtype, device=keys.device).masked_fill(dropped, -math.inf)
        mask = pad(mask, (tokens, 0))
        return mask if bias is None else mask + bias

    def _weaken_tokens(
        self, attention: OpenAttention, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The edit of a shallow prompt: log α on the prompts' columns, which follow the prefix tokens."""
        if self._strength == 0.0:
            return keys, values, None
        before = self.layout.num_prefix
        return keys, values, self._key_bias(keys, before, keys.shape[2] - before - self.tokens.shape[1])

    def _insert_tokens(self, block: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """[class, patches] becomes [class, prompts, patches]; at α = 0 nothing is inserted."""
        if self._strength == 0.0:
            return None
        x, prefix = args[0], self.layout.num_prefix
        prompts = self._dropped(self.tokens[0], x.shape[0]).expand(x.shape[0], -1, -1)
        return (torch.cat([x[:, :prefix], prompts, x[:, prefix:]], dim=1), *args[1:])

    def _remove_tokens(self, block: nn.Module, args: tuple[Tensor, ...], x: Tensor) -> Tensor:
        """Drops the prompts' outputs, unless the last block has kept only pooled tokens anyway."""
        if self._strength == 0.0 or self.layout.attentions[-1].num_queries is not None:
            return x
        prefix = self.layout.num_prefix
        return torch.cat([x[:, :prefix], x[:, prefix + self.tokens.shape[1] :]], dim=1)


def _check(num_tokens: int, deep: bool, dropout: float, dropout_mode: str) -> None:
    if num_tokens < 1:
        raise ConfigError(f"num_tokens must be at least 1, got {num_tokens}; for no prompts use a linear probe.")
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(f"Prompt dropout must lie in [0, 1), got {dropout}.")
    if dropout_mode not in DROPOUT_MODES:
        raise UnknownNameError("dropout_mode", dropout_mode, DROPOUT_MODES)
    if not deep and dropout_mode not in ("sample", "shared"):
        raise ConfigError(f"dropout_mode {dropout_mode!r} needs deep prompts; shallow ones take 'sample' or 'shared'.")
