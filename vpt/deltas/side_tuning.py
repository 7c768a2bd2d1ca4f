"""A small network beside the backbone (Zhang et al., "Side-Tuning", ECCV 2020)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from vpt.backbones.factory import Backbone
from vpt.deltas.base import DeltaPart, Handle
from vpt.deltas.registry import register_delta
from vpt.errors import ConfigError


@register_delta("sidetune")
class SideTune(DeltaPart):
    """Features of the backbone blended with those of a convolutional network: σ(a) · base + (1 − σ(a)) · side.

    The blend σ(a) is learned from a = 0 (section 3.2 of the paper). Strength α scales the change to the features.
    """

    changes_pool = True

    def __init__(self, backbone: Backbone, width: int = 16) -> None:
        """Draws four convolutions of stride 2 and a linear layer as PyTorch draws them.

        Args:
            backbone: The backbone beside which the network runs.
            width: Channels of the first convolution, at least 1; each further one has twice as many.

        Raises:
            ConfigError: The width is not positive.
        """
        super().__init__(backbone)
        if width < 1:
            raise ConfigError(f"The width of a side network must be at least 1, got {width}.")
        self._channels = [3, *(width * factor for factor in (1, 2, 4, 8))]
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
        if self._strength == 0.0:
            return features
        side = cast("Tensor", self.network(backbone.normalize(args[0]))).to(features.dtype)  # autocast
        mixed = torch.lerp(side, features, self.blend.sigmoid())
        return mixed if self._strength == 1.0 else features.lerp(mixed, self._strength)
