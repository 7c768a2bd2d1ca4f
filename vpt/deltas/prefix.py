"""Free keys and values in every block: P-Tuning v2 (Liu et al., ACL 2022, section 3.2) in vision transformers.

Twice the parameters of deep prompts and a wider reach: nothing ties a key to its value. With `hidden` they come from a
small network (Li and Liang, "Prefix-Tuning", ACL 2021, section 4.3), of which a delta file keeps only the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from vpt.backbones.attention.base import OpenAttention
from vpt.backbones.factory import Backbone
from vpt.deltas.base import chosen_blocks, named_stack, numbers_by_layer, pick, stack
from vpt.deltas.extra_key_values import DropoutMode, ExtraKeys, Gate, affine_factors, unstacked
from vpt.deltas.registry import register_delta
from vpt.errors import ConfigError, check_number

_STEEP = 0.75  # |tanh| up to which the rows of an unfolded network lie


@register_delta("prefix")
class Prefix(ExtraKeys):
    """Learned `keys` and `values`, (layers, n, heads · head_dim) as `stack` lays them out; none with `hidden`.

    Where they are shared there are only `keys`.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_tokens: int | Sequence[int],
        layers: Sequence[int] | None = None,
        hidden: int | None = None,
        dropout: float = 0.0,
        dropout_mode: DropoutMode = "key_value",
        log_bias: bool = False,
        std: float = 1.0,
        gate: Gate | None = None,
        shared: bool = False,
    ) -> None:
        """Draws keys and values from N(0, std²), as an embedding of P-Tuning v2's code starts.

        Args:
            backbone: The backbone that they are for.
            num_tokens: Keys per layer, at least 1, or a list with a number for each layer.
            layers: Only in blocks ``[first, last + 1]``, counted from 0; None for all.
            hidden: Width of the network that computes them in training, from an embedding of width `hidden` for each;
                None for free ones. Needs one number for all layers.
            dropout: Probability in [0, 1).
            dropout_mode: ``"key_value"``: channels of keys and values, a mask per image (P-Tuning v2); ``"prompt"``:
                whole keys per image.
            log_bias: Adds −log n to the attention logits of n keys.
            std: Standard deviation. The keys of a pretrained ViT have about 1; with 0.02, as until version 0.1.0, all
                of them are alike to every query at first, and what is learned of one is learned of all.
            gate: Learns the strength of each block's keys (`Gate`); None for no gate.
            shared: Keys and values are the same numbers (E²VPT; Han et al., ICCV 2023, section 3.2); not with `hidden`.
        """
        blocks = chosen_blocks(len(backbone.attention_layout.blocks), layers)
        super().__init__(backbone, blocks, dropout, dropout_mode, log_bias, gate)
        check_number("std", std, 0)
        numbers = numbers_by_layer(num_tokens, len(blocks))
        widths = [heads * size for heads, size in (self.layout.attentions[block].key_shape() for block in blocks)]
        self._shapes = list(zip(numbers, widths, strict=True))
        self.hidden, self.shared = hidden, shared
        like = backbone.mean
        if hidden is None:
            self.keys = stack(self._shapes, like, lambda t: t.normal_(std=std))
            if not shared:
                self.values = stack(self._shapes, like, lambda t: t.normal_(std=std))
            return
        if shared:
            raise ConfigError("A prefix is shared or comes from a hidden network: leave out one of them.")
        if hidden < 1 or len(set(numbers)) > 1:
            raise ConfigError(f"hidden needs to be at least 1 and one num_tokens for all layers, got {hidden}.")
        place: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.embedding = nn.Parameter(like.new_empty(numbers[0], hidden).normal_())
        self.inner = nn.Linear(hidden, hidden, **place)
        self.outer = nn.ModuleList(nn.Linear(hidden, 2 * width, **place) for width in widths)

    def pair(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer, heads side by side: each (n, heads · head_dim)."""
        if self.hidden is None:
            return pick(self.keys, layer), pick(self.keys if self.shared else self.values, layer)
        keys, values = self.outer[layer](self.inner(self.embedding).tanh()).chunk(2, dim=-1)
        return keys, values

    def keys_values(self, layer: int, attention: OpenAttention, images: int) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer, head by head, the same for all images."""
        heads, size = attention.key_shape()
        keys, values = (part.reshape(-1, heads, size).transpose(0, 1).unsqueeze(0) for part in self.pair(layer))
        return keys, values

    def expected_parameters(self) -> int:
        """Σ 2 · n · width over the layers, half if shared; those of the network where there is one; a gate's."""
        gates = 0 if self._gate is None else sum(self._gates())
        if self.hidden is None:
            return gates + (1 if self.shared else 2) * sum(number * width for number, width in self._shapes)
        hidden, number = self.hidden, self._shapes[0][0]
        inner = number * hidden + hidden * hidden + hidden
        return gates + inner + sum(2 * width * (hidden + 1) for _, width in self._shapes)

    def folded(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Keys and values as plain tensors, without the network that computed them."""
        if self.hidden is None:
            return super().folded()
        pairs = [self.pair(layer) for layer in range(len(self._shapes))]
        keys, values = ([part.detach() for part in parts] for parts in zip(*pairs, strict=True))
        found = named_stack("keys", keys) | named_stack("values", values)
        return {"hidden": None}, found | self.of_logits(self.state_dict(keep_vars=True))

    @torch.no_grad()
    def unfolded(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A network that gives the keys and values: side by side over all layers they are an affine map of n rows.

        The inner layer becomes the identity. Where the rows span less than `hidden`, free columns of the outer layers
        stay as drawn, so that all of them train; a ConfigError where they span more.
        """
        if self.hidden is None:
            return super().unfolded(tensors)
        pairs = zip(unstacked("keys", tensors), unstacked("values", tensors), strict=True)
        wide = torch.cat([torch.cat(pair, dim=1) for pair in pairs], dim=1)
        rows, weight, bias = affine_factors(wide, self.hidden, "hidden")
        reach = rows.abs().amax(dim=0) / _STEEP  # so that tanh gives each row from a place where it is steep
        drawn = torch.cat([cast("nn.Linear", layer).weight for layer in self.outer]).T
        weight = torch.where(reach.unsqueeze(1) > 0, weight * reach.unsqueeze(1), drawn)
        like = self.embedding
        found = {
            "embedding": (rows / reach.where(reach > 0, 1.0)).atanh().to(like),
            "inner.weight": torch.eye(self.hidden, dtype=like.dtype, device=like.device),
            "inner.bias": like.new_zeros(self.hidden),
        }
        widths = [2 * width for _, width in self._shapes]
        for name, wide in (("weight", weight.T), ("bias", bias)):
            parts = cast("Any", wide.to(like)).split(widths)
            found |= {f"outer.{index}.{name}": part for index, part in enumerate(parts)}
        return found | self.of_logits(tensors)
