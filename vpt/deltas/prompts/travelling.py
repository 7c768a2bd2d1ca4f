"""Prompts that travel through the blocks as tokens: shallow ones in a ViT's sequence, or beside a Swin's map.

On a Swin, deep prompts of the last block do so as well where the pool reads them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from vpt.backbones.attention.base import OpenAttention
from vpt.backbones.attention.windows import BESIDE, Beside, window_answers
from vpt.deltas.base import Handle, Shape
from vpt.deltas.extra_key_values import Edited, ExtraKeys, KeyEdit, per_row
from vpt.errors import ConfigError


class TravellingPrompts(ExtraKeys):
    """What prompts do that are tokens of the blocks, instead of keys and values alone.

    Attributes:
        deep: Whether each block has prompts of its own.
    """

    deep: bool
    _blocks_beside: Sequence[int]

    @property
    @abstractmethod
    def shapes(self) -> Sequence[Shape]:
        """(n, dim) of the prompts of each layer."""

    @abstractmethod
    def entering(self, layer: int, images: int) -> Tensor:
        """The prompts of a layer as they come to its norm: (B, n, dim) with a mask per image, else (1, n, dim)."""

    @property
    def in_sequence(self) -> bool:
        """Whether the prompts are tokens of the backbone's own sequence: shallow ones, except on Swin."""
        return not self.deep and not self.layout.windowed

    def _layer(self, block: int) -> int:
        """The position of a block among those that have prompts; shallow ones have one."""
        return self.blocks.index(block) if self.deep else 0

    def joining(self, block: int, images: int) -> Tensor | None:
        """The prompts beside the map of a Swin: shallow ones from the first block on, pooled deep ones in the last."""
        if block not in self._blocks_beside[:1] or self.beside_strength == 0.0:
            return None
        return self.entering(self._layer(block), images).expand(images, -1, -1)

    @property
    def beside_strength(self) -> float:
        """See `vpt.backbones.block_forward.Attached`: shallow ones have that of the first block."""
        return self.at(self._layer(self._blocks_beside[0]))

    def _token_hooks(self) -> Iterator[Handle]:
        for attention in self.layout.attentions:
            yield attention.register_edit(KeyEdit(self, 0, self._weaken_tokens))
        yield self.layout.blocks[0].register_forward_pre_hook(self._insert_tokens)
        yield self.layout.blocks[-1].register_forward_hook(self._remove_tokens, with_kwargs=True)

    def _weaken_tokens(self, layer: int, attention: OpenAttention, keys: Tensor, values: Tensor) -> Edited:
        """The edit of a shallow prompt: its bias on the prompts' columns, which follow the prefix tokens."""
        before, number = self.backbone.layout.num_prefix + self._inserted_before(), self.shapes[0][0]
        return keys, values, self.key_bias(layer, keys, number, before, keys.shape[2] - before - number)

    def _inserted_before(self) -> int:
        """Tokens between the prefix and these prompts: those of shallow prompts that were attached later."""
        parts = self.backbone.attached
        later = parts[parts.index(self) + 1 :] if self.attached else []
        return sum(
            part.shapes[0][0]
            for part in later
            if isinstance(part, TravellingPrompts) and part.in_sequence and part.at(0) != 0.0
        )

    def _insert_tokens(self, block: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """[class, patches] becomes [class, prompts, patches]; at α = 0 nothing is inserted."""
        if self.at(0) == 0.0:
            return None
        x, prefix = args[0], self.backbone.layout.num_prefix
        prompts = self.entering(0, x.shape[0]).expand(x.shape[0], -1, -1)
        return (torch.cat([x[:, :prefix], prompts, x[:, prefix:]], dim=1), *args[1:])

    def _remove_tokens(self, block: nn.Module, args: Any, kwargs: dict[str, Any], x: Tensor) -> Tensor:
        """Drops the prompts' outputs, unless the last block has kept only pooled tokens anyway."""
        if self.at(0) == 0.0 or kwargs.get("keep") is not None:
            return x
        prefix = self.backbone.layout.num_prefix
        return torch.cat([x[:, :prefix], x[:, prefix + self.shapes[0][0] :]], dim=1)

    def _tokens_beside(self) -> Tensor:
        """The prompts as they come to the block that runs now, (B, n, dim)."""
        beside = BESIDE.get()
        if beside is None or self not in beside.tokens:
            raise ConfigError(
                "Prompts that run beside a Swin's map do so where the Backbone is called: call it, not its timm model."
            )
        return beside.tokens[self]

    def _join_windows(self, block: int, attention: OpenAttention, keys: Tensor, values: Tensor) -> Edited:
        """The edit of prompts beside a map: they join every window."""
        entering = self.layout.norms[block](self._tokens_beside())
        queries, own_keys, own_values = attention.project(entering)
        rows, number = keys.shape[0], entering.shape[1]
        keys, values = (
            torch.cat([theirs, per_row(own, rows, attention.windows)], dim=2)
            for theirs, own in ((keys, own_keys), (values, own_values))
        )
        cast("Beside", BESIDE.get()).asking[self] = entering, queries
        return (
            keys,
            values,
            self.key_bias(self._layer(block), keys, number, keys.shape[2] - number),
        )

    def _gather(self, block: int, attention: OpenAttention, keys: Tensor, values: Tensor, bias: Tensor | None) -> None:
        """What they gather from all keys, those of other deltas too."""
        beside = cast("Beside", BESIDE.get())
        if self in beside.onward:
            beside.answers[self] = window_answers(attention, *beside.asking[self], keys, values, bias)
