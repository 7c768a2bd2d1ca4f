"""What is trained behind or beside the backbone: nothing but the head, an MLP before it, or a small network."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from vpt.backbones.factory import Backbone
from vpt.deltas.base import READOUT, DeltaPart, Handle
from vpt.deltas.registry import register_delta
from vpt.errors import ConfigError


@register_delta("linear")
class Linear(DeltaPart):
    """Nothing: only the model's linear head trains (linear probing)."""

    first_block = READOUT

    def expected_parameters(self) -> int:
        """None."""
        return 0


@register_delta("mlp_head")
class MlpHead(DeltaPart):
    """Hidden layers between pooled features and linear head (Jia et al., ECCV 2022, section 4.1, "Mlp-k").

    Strength α scales their change to the features.
    """

    first_block = READOUT
    changes_pool = True

    def __init__(self, backbone: Backbone, layers: int = 3) -> None:
        """Draws hidden layers as wide as the features; `layers`, 2 to 64, count the linear head too."""
        super().__init__(backbone)
        if not 2 <= layers <= 64:
            raise ConfigError(f"An MLP head has 2 to 64 layers, got {layers}; for 1 use the delta 'linear'.")
        self._width, like = backbone.num_features, backbone.mean
        self.hidden = nn.ModuleList(
            nn.Linear(self._width, self._width, dtype=like.dtype, device=like.device) for _ in range(layers - 1)
        )

    def hooks(self) -> Iterator[Handle]:
        """The hidden layers behind the pool."""
        yield self.backbone.readout.register_forward_hook(self._change)

    def expected_parameters(self) -> int:
        """(layers − 1) · (dim² + dim)."""
        return len(self.hidden) * self._width * (self._width + 1)

    def _change(self, module: nn.Module, args: tuple[Tensor, ...], features: Tensor) -> Tensor:
        if self.at() == 0.0:
            return features
        changed = features
        for layer in self.hidden:
            changed = relu(cast("Tensor", layer(changed)))
        changed = changed.to(features.dtype)  # autocast
        return changed if self.at() == 1.0 else features.lerp(changed, self.at())


@register_delta("sidetune")
class SideTune(DeltaPart):
    """Features of the backbone blended with those of a convolutional network: σ(a) · base + (1 − σ(a)) · side.

    a starts at 0 (Zhang et al., "Side-Tuning", ECCV 2020, section 3.2). Strength α scales the change to features.
    """

    changes_pool = True

    def __init__(self, backbone: Backbone, width: int = 16) -> None:
        """Draws four convolutions of stride 2, to `width` ≥ 1 channels, then twice as many each, and a linear layer."""
        super().__init__(backbone)
        if width < 1:
            raise ConfigError(f"The width of a side network must be at least 1, got {width}.")
        self._channels = [len(backbone.mean), *(width * factor for factor in (1, 2, 4, 8))]
        stages = [
            layer
            for incoming, outgoing in pairwise(self._channels)
            for layer in (nn.Conv2d(incoming, outgoing, 3, stride=2, padding=1), nn.ReLU())
        ]
        self.network = nn.Sequential(
            *stages,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(self._channels[-1], backbone.num_features),
        ).to(backbone.mean)
        self.blend = nn.Parameter(backbone.mean.new_zeros(()))
        self._dim = backbone.num_features

    def hooks(self) -> Iterator[Handle]:
        """The network beside the backbone."""
        yield self.backbone.register_forward_hook(self._mix)

    def expected_parameters(self) -> int:
        """Σ (9 · c_in + 1) · c_out over the convolutions, (c + 1) · dim of the linear layer, and the blend."""
        convolutions = sum((9 * incoming + 1) * outgoing for incoming, outgoing in pairwise(self._channels))
        return convolutions + (self._channels[-1] + 1) * self._dim + 1

    def _mix(self, backbone: Backbone, args: tuple[Tensor, ...], features: Tensor) -> Tensor:
        if self.at() == 0.0:
            return features
        side = cast("Tensor", self.network(backbone.normalize(args[0]))).to(features.dtype)  # autocast
        mixed = torch.lerp(side, features, self.blend.sigmoid())
        return mixed if self.at() == 1.0 else features.lerp(mixed, self.at())
