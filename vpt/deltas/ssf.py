"""Scaling and shifting features (Lian et al., "SSF", NeurIPS 2022, equation 2): y = γ ⊙ x + β behind every layer."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vpt.backbones.factory import Backbone
from vpt.backbones.target_modules import affine_layers
from vpt.deltas.base import DeltaPart


class ScaleShift(DeltaPart):
    """A scale and a shift per channel behind the patch embedding, every norm and every linear layer.

    Where timm keeps a layer's bias beside it (queries and values of BEiT, EVA, Swin V2), the bias is added behind them.
    Its strength interpolates between doing nothing, γ = 1 and β = 0, and the trained values.

    Attributes:
        scale: γ of each layer by its name with ``/`` for ``.``, (channels,).
        shift: β of each layer, (channels,).
    """

    taxonomy = "reparameterisation"

    def __init__(self, backbone: Backbone, std: float = 0.02) -> None:
        """Draws γ from N(1, std²) and β from N(0, std²), as the paper's code does.

        Args:
            backbone: The backbone that they are for.
            std: Standard deviation; 0 starts from the backbone exactly.

        Raises:
            UnsupportedBackboneError: The structure of the backbone is not known.
        """
        super().__init__(backbone)
        self._layers = {name.replace(".", "/"): layer for name, layer in affine_layers(backbone).items()}
        self.scale, self.shift = nn.ParameterDict(), nn.ParameterDict()
        for key, layer in self._layers.items():
            channels = _weight(layer).shape[0]
            self.scale[key] = nn.Parameter(1.0 + std * torch.randn(channels).to(backbone.mean))
            self.shift[key] = nn.Parameter(std * torch.randn(channels).to(backbone.mean))
        self._hooks: list[RemovableHandle] = []
        self._merged: dict[str, tuple[Tensor, Tensor]] = {}

    def _attach(self) -> None:
        """Puts scale and shift behind every layer."""
        self._hooks = [layer.register_forward_hook(partial(self._change, key)) for key, layer in self._layers.items()]

    def _detach(self) -> None:
        """Takes them off; merged weights are restored first."""
        self.unmerge()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def expected_parameters(self) -> int:
        """Twice the channels of every layer."""
        return sum(2 * _weight(layer).shape[0] for layer in self._layers.values())

    @torch.no_grad()
    def merge(self) -> None:
        """Folds γ and β, at the present strength, into weights and biases: same function, no cost at inference.

        Layers without a bias keep their scale and shift beside them. What is trained or loaded afterwards counts when
        it is merged again.

        Raises:
            ConfigError: Something else is attached to the backbone.
        """
        self._check_alone()
        self.unmerge()
        for key, layer in self._layers.items():
            weight, bias = _weight(layer), cast("Tensor | None", layer.bias)
            if bias is None:
                continue
            self._merged[key] = (weight.clone(), bias.clone())
            scale, shift = self._between(key)
            weight *= scale.view(-1, *[1] * (weight.ndim - 1))
            bias.mul_(scale).add_(shift)

    @property
    def merged(self) -> bool:
        """Whether γ and β lie in the backbone's own weights for now."""
        return bool(self._merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the frozen weights back, bit for bit."""
        for key, (weight, bias) in self._merged.items():
            _weight(self._layers[key]).copy_(weight)
            cast("Tensor", self._layers[key].bias).copy_(bias)
        self._merged = {}

    def _strengthened(self) -> None:
        if self._merged:
            self.merge()

    def _between(self, key: str) -> tuple[Tensor, Tensor]:
        scale, shift = self.scale[key], self.shift[key]
        if self._strength == 1.0:
            return scale, shift
        return 1.0 + self._strength * (scale - 1.0), self._strength * shift

    def _change(self, key: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if self._strength == 0.0 or key in self._merged:
            return out
        scale, shift = self._between(key)
        if isinstance(module, nn.Conv2d):
            scale, shift = scale.view(-1, 1, 1), shift.view(-1, 1, 1)
        return torch.addcmul(shift, out, scale)


def _weight(layer: nn.Module) -> Tensor:
    return cast("Tensor", layer.weight)
