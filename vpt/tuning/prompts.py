"""Visual prompts, shallow and deep (Jia et al., "Visual Prompt Tuning", ECCV 2022, sections 3.1-3.2).

Deep prompts are inserted before every block and their outputs are discarded, so they act only through the keys and
values of their block: K = W_k N(P) + b_k and V = W_v N(P) + b_v, with N the block's own norm. They are computed once
per step for the whole batch. Shallow prompts are tokens that travel through all blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle

from vpt.backbones.attention import OpenAttention, log_bias
from vpt.backbones.factory import Backbone
from vpt.errors import ConfigError, UnknownNameError, UnsupportedBackboneError
from vpt.tuning.part import DeltaPart

DROPOUT_MODES = ("sample", "shared", "key_value", "prompt")
DropoutMode = Literal["sample", "shared", "key_value", "prompt"]
Edited = tuple[Tensor, Tensor, Tensor | None]


@dataclass(eq=False)
class PromptEdit:
    """What prompts do to one attention module; nothing at strength 0, where the backbone's own code runs."""

    prompt: Prompt
    layer: int
    change: Callable[[int, OpenAttention, Tensor, Tensor], Edited]

    @property
    def active(self) -> bool:
        """Whether the strength is above 0."""
        return self.prompt.strength != 0.0

    def __call__(self, attention: OpenAttention, keys: Tensor, values: Tensor) -> Edited:
        """See `AttentionEdit`."""
        return self.change(self.layer, attention, keys, values)


class Prompt(DeltaPart):
    """Learned prompts for a vision transformer.

    Attributes:
        tokens: The prompts, (layers, n, dim); layers is 1 if shallow or shared. Where number or width changes from
            layer to layer, a list of such tensors, one for each run of equal layers.
    """

    taxonomy = "addition"

    def __init__(
        self,
        backbone: Backbone,
        num_tokens: int | Sequence[int],
        deep: bool = True,
        dropout: float = 0.0,
        dropout_mode: DropoutMode = "sample",
        layers: Sequence[int] | None = None,
        shared: bool = False,
        log_bias: bool = False,
    ) -> None:
        """Draws prompts from U(-v, v) with v = √(6 / (3·p² + dim)), the paper's Xavier bound for patches of p pixels.

        Args:
            backbone: The backbone that the prompts are for.
            num_tokens: Prompts per layer, at least 1; with deep prompts also a list, a number for each layer.
            deep: Prompts before every block (VPT-deep) or only before the first (VPT-shallow).
            dropout: Probability in [0, 1).
            dropout_mode: What is dropped in training. ``"sample"``: channels of the prompts, a mask per image (the
                reference's ViT); ``"shared"``: one mask per batch (the reference's Swin); ``"key_value"``: channels
                of keys and values, a mask per image (P-Tuning v2); ``"prompt"``: whole prompts per image. The last
                two need deep prompts.
            layers: With deep prompts, only in blocks ``[first, last + 1]``, counted from 0; None for all.
            shared: With deep prompts, the same prompts in every layer.
            log_bias: Adds −log n to the attention logits of n prompts, so that at first they take the attention of one
                token instead of n/(n + N) of it.

        Raises:
            ConfigError: A value is out of range.
            UnsupportedBackboneError: The backbone cannot take prompts exactly.
        """
        super().__init__()
        self.layout = backbone.layout
        self.deep, self.dropout, self.dropout_mode, self.log_bias = deep, dropout, dropout_mode, log_bias
        _check(deep, dropout, dropout_mode, layers is not None or shared or not isinstance(num_tokens, int))
        self._blocks = _chosen(len(self.layout.blocks), layers) if deep else [0]
        numbers = [num_tokens] * len(self._blocks) if isinstance(num_tokens, int) else list(num_tokens)
        _check_numbers(numbers, len(self._blocks))
        if self.layout.windowed and not deep:
            raise UnsupportedBackboneError(f"Shallow prompts are not known to be exact on {backbone.name}: use deep.")
        shapes = [(n, self.layout.dims[block]) for n, block in zip(numbers, self._blocks, strict=True)]
        if shared and len(set(shapes)) > 1:
            raise ConfigError("Shared prompts need the same number and width in every layer.")
        self._draw(backbone, shapes[:1] if shared else shapes)
        self._hooks: list[RemovableHandle] = []
        self._edits: list[tuple[OpenAttention, PromptEdit]] = []

    def _draw(self, backbone: Backbone, shapes: list[tuple[int, int]]) -> None:
        """Stacks the prompts of successive layers that have one shape."""
        height, width = self.layout.patch_size
        bound = math.sqrt(6 / (3 * height * width + self.layout.dims[0]))
        stacks: list[nn.Parameter] = []
        self._rows: list[tuple[int, int]] = []
        for shape, run in groupby(shapes):
            self._rows += [(len(stacks), row) for row, _ in enumerate(run)]
            depth = self._rows[-1][1] + 1
            stacks.append(nn.Parameter(backbone.mean.new_empty(depth, *shape).uniform_(-bound, bound)))
        self.tokens = stacks[0] if len(stacks) == 1 else nn.ParameterList(stacks)

    def prompts(self, layer: int) -> Tensor:
        """The prompts of a layer.

        Args:
            layer: Position among the layers that have prompts.

        Returns:
            (n, dim).
        """
        stack, row = self._rows[layer if len(self._rows) > 1 else 0]
        return self.tokens[row] if isinstance(self.tokens, nn.Parameter) else self.tokens[stack][row]

    def attach(self) -> None:
        """Adds keys and values to every chosen block (deep), or tokens before the first block (shallow)."""
        attentions, blocks = self.layout.attentions, self.layout.blocks
        if self.deep:
            self._edits = [
                (attentions[block], PromptEdit(self, layer, self._add_keys)) for layer, block in enumerate(self._blocks)
            ]
        else:
            self._edits = [(attention, PromptEdit(self, 0, self._weaken_tokens)) for attention in attentions]
            self._hooks = [
                blocks[0].register_forward_pre_hook(self._insert_tokens),
                blocks[-1].register_forward_hook(self._remove_tokens),
            ]
        for attention, edit in self._edits:
            attention.edits.append(edit)

    def detach(self) -> None:
        """Removes what `attach` added."""
        for attention, edit in self._edits:
            attention.edits.remove(edit)
        for hook in self._hooks:
            hook.remove()
        self._edits, self._hooks = [], []

    def expected_parameters(self) -> int:
        """Σ n · dim over the layers; one layer if shallow or shared."""
        return sum(self.prompts(layer).numel() for layer in range(len(self._rows)))

    def _dropped(self, prompts: Tensor, images: int) -> Tensor:
        """Prompts (n, dim) after dropout on their channels: (B, n, dim) with a mask per image, else (1, n, dim)."""
        prompts = prompts.unsqueeze(0)
        if not self.training or self.dropout == 0.0 or self.dropout_mode not in ("sample", "shared"):
            return prompts
        if self.dropout_mode == "sample":
            prompts = prompts.expand(images, -1, -1)
        return drop(prompts, self.dropout)

    def _add_keys(self, layer: int, attention: OpenAttention, keys: Tensor, values: Tensor) -> Edited:
        """The edit of a deep prompt: appends its keys and values, and log α as their bias."""
        rows, heads, before, _ = keys.shape
        images = rows // attention.windows
        prompts = self._dropped(self.prompts(layer), images)
        _, own_keys, own_values = attention.project(self.layout.norms[self._blocks[layer]](prompts))
        if self.training and self.dropout > 0.0 and self.dropout_mode == "key_value":
            shape = (images, heads, -1, -1)
            own_keys = drop(own_keys.expand(shape), self.dropout)
            own_values = drop(own_values.expand(shape), self.dropout)
        own_keys, own_values = (_per_row(own, rows, attention.windows) for own in (own_keys, own_values))
        bias = self._key_bias(keys, prompts.shape[1], before)
        if self.training and self.dropout > 0.0 and self.dropout_mode == "prompt":
            mask = pad(self._whole(keys, images, prompts.shape[1]), (before, 0))
            bias = _per_row(mask, rows, attention.windows) + (0.0 if bias is None else bias)
        return torch.cat([keys, own_keys], dim=2), torch.cat([values, own_values], dim=2), bias

    def _key_bias(self, keys: Tensor, number: int, before: int, after: int = 0) -> Tensor | None:
        """The bias: log α (less log n) on the prompts' columns, 0 on others: (1, 1, 1, keys); None where all is 0."""
        if self._strength == 1.0 and not self.log_bias:
            return None
        odds = self._strength / number if self.log_bias else self._strength
        return pad(log_bias(odds, keys).expand(1, 1, 1, number), (before, after))

    def _whole(self, keys: Tensor, images: int, number: int) -> Tensor:
        """−∞ for each prompt of each image with probability `dropout`: (B, 1, 1, n)."""
        dropped = torch.rand(images, 1, 1, number, device=keys.device) < self.dropout
        return torch.zeros_like(dropped, dtype=keys.dtype).masked_fill(dropped, -math.inf)

    def _weaken_tokens(self, layer: int, attention: OpenAttention, keys: Tensor, values: Tensor) -> Edited:
        """The edit of a shallow prompt: its bias on the prompts' columns, which follow the prefix tokens."""
        before, number = self.layout.num_prefix, self.prompts(0).shape[0]
        return keys, values, self._key_bias(keys, number, before, keys.shape[2] - before - number)

    def _insert_tokens(self, block: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """[class, patches] becomes [class, prompts, patches]; at α = 0 nothing is inserted."""
        if self._strength == 0.0:
            return None
        x, prefix = args[0], self.layout.num_prefix
        prompts = self._dropped(self.prompts(0), x.shape[0]).expand(x.shape[0], -1, -1)
        return (torch.cat([x[:, :prefix], prompts, x[:, prefix:]], dim=1), *args[1:])

    def _remove_tokens(self, block: nn.Module, args: tuple[Tensor, ...], x: Tensor) -> Tensor:
        """Drops the prompts' outputs, unless the last block has kept only pooled tokens anyway."""
        if self._strength == 0.0 or self.layout.attentions[-1].num_queries is not None:
            return x
        prefix = self.layout.num_prefix
        return torch.cat([x[:, :prefix], x[:, prefix + self.prompts(0).shape[0] :]], dim=1)


def _per_row(own: Tensor, rows: int, windows: int) -> Tensor:
    """Gives what belongs to all images, (1, ...), or to each, (B, ...), to every window of each: (rows, ...)."""
    if own.shape[0] == 1:
        return own.expand(rows, -1, -1, -1)
    return own if windows == 1 else own.repeat_interleave(windows, dim=0)


def _chosen(depth: int, layers: Sequence[int] | None) -> list[int]:
    if layers is None:
        return list(range(depth))
    if len(layers) != 2 or not 0 <= layers[0] < layers[1] <= depth:
        raise ConfigError(f"layers is [first, last + 1] of {depth} blocks, counted from 0, got {list(layers)}.")
    return list(range(layers[0], layers[1]))


def _check_numbers(numbers: list[int], layers: int) -> None:
    if len(numbers) != layers:
        raise ConfigError(f"num_tokens lists {len(numbers)} numbers for {layers} layers with prompts.")
    if min(numbers) < 1:
        raise ConfigError(f"num_tokens must be at least 1, got {min(numbers)}; for no prompts use a linear probe.")


def _check(deep: bool, dropout: float, dropout_mode: str, by_layer: bool) -> None:
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(f"Prompt dropout must lie in [0, 1), got {dropout}.")
    if dropout_mode not in DROPOUT_MODES:
        raise UnknownNameError("dropout_mode", dropout_mode, DROPOUT_MODES)
    if not deep and dropout_mode not in ("sample", "shared"):
        raise ConfigError(f"dropout_mode {dropout_mode!r} needs deep prompts; shallow ones take 'sample' or 'shared'.")
    if not deep and by_layer:
        raise ConfigError("layers, shared and a list of num_tokens need deep prompts.")
