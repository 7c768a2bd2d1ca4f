"""A learned temperature of the attention that prompts take part in.

Adaptive attention shaping of gated prompt tuning (Yoo et al., "Improving Visual Prompt Tuning for Self-supervised
Vision Transformers", ICML 2023): softmax(Q Kᵀ / (τ √d_h)) V, with one τ for each block, which is 1 at first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn

from vpt.argument_types import Options
from vpt.backbones.attention.base import OpenAttention
from vpt.deltas.base import DeltaPart, Handle
from vpt.deltas.extra_key_values import Edited, KeyEdit
from vpt.errors import ConfigError, UnknownNameError, check_number

LOWEST, HIGHEST = 0.01, 10.0
"""Between these a temperature is kept, as in the released code."""

Key = tuple[Literal["temperature"], int]
"""Of a block's temperature, as `DeltaPart.at` is asked for its strength."""


@dataclass(frozen=True)
class Temperature(Options):
    """A learned divisor τ of the products of queries and keys in a block's attention, between 0.01 and 10.

    Attributes:
        per: One τ for each ``block``, as in the paper, or one for each ``head`` that has keys.
        lr_scale: Their learning rate as a multiple of that of all else, positive.
    """

    per: Literal["block", "head"] = "block"
    lr_scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuses what is out of range."""
        if self.per not in ("block", "head"):
            raise UnknownNameError("per of temperature", self.per, ("block", "head"))
        check_number("lr_scale of temperature", self.lr_scale, 0, 1e6)
        if self.lr_scale == 0:
            raise ConfigError("lr_scale of temperature must be positive: 0 would never change it.")


class Temperatures(nn.Module):
    """The τ of some blocks.

    `learned` is what they have learned beyond 1, block by block and head by head, (blocks,) or (Σ heads,): so small
    steps count in half precision, too; of one dimension, it does not decay.
    """

    def __init__(self, attentions: Mapping[int, OpenAttention], options: Temperature, like: Tensor) -> None:
        """Starts at τ = 1, by the `attentions` of the blocks; `like` gives dtype and device."""
        super().__init__()
        self.options, self.blocks = options, list(attentions)
        self._heads = [1 if options.per == "block" else each.key_shape()[0] for each in attentions.values()]
        self.learned = nn.Parameter(like.new_zeros(sum(self._heads)))

    def of(self, block: int) -> Tensor:
        """The τ of a block, in single precision or better: (1,) or (heads,)."""
        learned = cast("Sequence[Tensor]", torch.split(self.learned, self._heads))[self.blocks.index(block)]
        free = 1 + (learned if learned.dtype == torch.float64 else learned.float())
        # The bound has the gradient of what it bounds: a τ that has reached it can come back.
        return free + (free.clamp(LOWEST, HIGHEST) - free).detach()

    def scales(self, block: int, strength: float) -> Tensor:
        """What the keys are multiplied by, 1 + α (1 / τ − 1), (1,) or (heads,); at α = 1 that is 1 / τ."""
        inverse = 1 / self.of(block)
        return inverse if strength == 1.0 else 1 + strength * (inverse - 1)

    def edits(self, part: DeltaPart, attentions: Sequence[OpenAttention]) -> Iterator[Handle]:
        """Puts them on the attention of their blocks, with the strengths of a delta."""
        for block in self.blocks:
            change = partial(self._scale, part)
            edit = KeyEdit(part, block, change, key=("temperature", block), on_all=True)
            yield attentions[block].register_edit(edit)

    def _scale(self, part: DeltaPart, block: int, attention: OpenAttention, keys: Tensor, values: Tensor) -> Edited:
        """Keys divided by τ: their products with all queries are."""
        scales = self.scales(block, part.at(("temperature", block))).to(keys)
        return keys * scales.view(1, -1, 1, 1), values, None

    def expected_parameters(self) -> int:
        """One for each block, or head."""
        return sum(self._heads)

    def curves(self) -> dict[str, Tensor]:
        """τ of each block, as the mean of its heads."""
        return {f"temperature/block_{block:02d}": self.of(block).detach().mean() for block in self.blocks}

    def places(self, attentions: Sequence[OpenAttention]) -> dict[Key, OpenAttention]:
        """Where each lies: in its block, also those of shallow prompts."""
        return {("temperature", block): attentions[block] for block in self.blocks}
