"""What is trained behind the backbone: nothing but the head, or an MLP before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

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

    def __init__(self, backbone: Backbone) -> None:
        """Takes any backbone.

        Args:
            backbone: Its blocks need not be known.
        """
        super().__init__(backbone)

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
        """Draws the hidden layers as PyTorch draws linear layers.

        Args:
            backbone: The backbone that they are for.
            layers: Of the whole head, the linear one included: at least 2. Hidden layers are as wide as the features.

        Raises:
            ConfigError: There are fewer than 2 layers.
        """
        super().__init__(backbone)
        if layers < 2:
            raise ConfigError(f"An MLP head has at least 2 layers, got {layers}; for 1 use the delta 'linear'.")
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
        if self._strength == 0.0:
            return features
        changed = features
        for layer in self.hidden:
            changed = relu(cast("Tensor", layer(changed)))
        changed = changed.to(features.dtype)  # autocast
        return changed if self._strength == 1.0 else features.lerp(changed, self._strength)
