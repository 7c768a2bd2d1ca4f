"""Scaling and shifting features (Lian et al., "SSF", NeurIPS 2022, equation 2): y = γ ⊙ x + β behind every layer.

The scales alone, behind the branches of each block, are what DiffFit adds to biases and norms (Xie et al., ICCV 2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from vpt.backbones.factory import Backbone
from vpt.backbones.strength import Place
from vpt.backbones.target_modules import absorbs_scale, affine_layers, channel_dim
from vpt.deltas.base import Handle, MergeablePart, MergedWeight
from vpt.deltas.registry import register_delta
from vpt.errors import ConfigError, check_number


@register_delta("ssf")
class ScaleShift(MergeablePart):
    """A scale and a shift per channel behind the patch embedding, every norm and every linear layer.

    Of a backbone that is no known transformer: behind every convolution, linear layer and norm.

    `scale` γ and `shift` β are (channels,), by the layer's name with ``/`` for ``.``. Where timm keeps a layer's bias
    beside it (queries and values of BEiT, EVA, Swin V2), the bias is added behind them. Its strength interpolates
    between doing nothing, γ = 1 and β = 0, and the trained values. Merged, layers that cannot take a scale and a shift
    (`vpt.backbones.target_modules.absorbs_scale`) keep these beside them.
    """

    def __init__(
        self,
        backbone: Backbone,
        std: float = 0.02,
        targets: Sequence[str] | None = None,
        shift: bool = True,
    ) -> None:
        """Draws γ from N(1, std²), β from N(0, std²), as the paper's code; 0 starts from the backbone.

        Args:
            backbone: The backbone whose features are scaled.
            std: 0 or more.
            targets: Only behind these of the layers, by timm's names or the ends of them; None for all.
            shift: Whether there is a β.
        """
        super().__init__(backbone)
        check_number("std", std, 0)
        if targets is not None and not targets:
            raise ConfigError("targets of ssf are one or more layers by name, such as attn.proj; null for all.")
        self._layers = {name.replace(".", "/"): layer for name, layer in affine_layers(backbone, targets).items()}
        self.scale, self.shift = nn.ParameterDict(), nn.ParameterDict()
        for key, layer in self._layers.items():
            channels = _weight(layer).shape[0]
            self.scale[key] = nn.Parameter(1.0 + std * torch.randn(channels).to(backbone.mean))
            if shift:
                self.shift[key] = nn.Parameter(std * torch.randn(channels).to(backbone.mean))

    def hooks(self) -> Iterator[Handle]:
        """Scale and shift behind every layer."""
        for key, layer in self._layers.items():
            yield layer.register_forward_hook(partial(self._change, key))

    def places(self) -> Mapping[Any, Place]:
        """See `DeltaPart`."""
        return dict(self._layers)

    def expected_parameters(self) -> int:
        """Twice the channels of every layer, or once without a shift."""
        each = 2 if len(self.shift) else 1
        return sum(each * _weight(layer).shape[0] for layer in self._layers.values())

    @property
    def merges_wholly(self) -> bool:
        """Whether all layers can take scale and shift."""
        return all(map(absorbs_scale, self._layers.values()))

    def _merged_weights(self) -> Iterator[MergedWeight]:
        """See `MergeablePart`."""
        for key, layer in self._layers.items():
            if absorbs_scale(layer):
                yield MergedWeight(layer, "weight", partial(self._scaled, key))
                if len(self.shift) or layer._parameters["bias"] is not None:
                    yield MergedWeight(layer, "bias", partial(self._scaled_and_shifted, key))

    def _scaled(self, key: str, weight: Tensor) -> Tensor:
        return weight * self._between(key)[0].view(-1, *[1] * (weight.ndim - 1))

    def _scaled_and_shifted(self, key: str, bias: Tensor | None) -> Tensor:
        scale, shift = self._between(key)
        if bias is None or shift is None:
            return cast("Tensor", shift if bias is None else bias * scale)
        return bias * scale + shift

    def _between(self, key: str) -> tuple[Tensor, Tensor | None]:
        scale, shift = self.scale[key], self.shift[key] if len(self.shift) else None
        if (strength := self.at(key)) == 1.0:
            return scale, shift
        return 1.0 + strength * (scale - 1.0), None if shift is None else strength * shift

    def _change(self, key: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if self.at(key) == 0.0 or (self.merged and absorbs_scale(module)):
            return out
        scale, shift = self._between(key)
        if (dim := channel_dim(module)) != -1:
            behind = [1] * (out.ndim - dim - 1)
            scale, shift = scale.view(-1, *behind), None if shift is None else shift.view(-1, *behind)
        return out * scale if shift is None else torch.addcmul(shift, out, scale)


def _weight(layer: nn.Module) -> Tensor:
    return cast("Tensor", layer.weight)
