"""Weights that are selected by their gradient (Zhang et al., "Gradient-based Parameter Selection", CVPR 2024).

Of each neuron, a row of a weight matrix, the K input connections with the largest gradient train, and all biases; the
gradient is that of the supervised contrastive loss, which needs no head (Khosla et al., NeurIPS 2020, equation 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vpt.backbones.factory import Backbone
from vpt.backbones.target_modules import affine_layers, parameter_names
from vpt.deltas.base import DeltaPart, TrainingImages
from vpt.deltas.partial_tuning import to_key
from vpt.deltas.registry import register_delta
from vpt.deltas.selection import Selection, in_batches
from vpt.errors import ConfigError

TEMPERATURE = 0.07
"""Of the contrastive loss."""

BATCH = 16
"""Images whose loss is taken together."""


@register_delta("gps")
class Gps(Selection):
    """Chosen entries of every weight of a linear map or convolution, and all biases but those of norms.

    `values` of a weight are what stands in for its chosen entries, (outputs, K); all others are those of the backbone,
    bit for bit. Where they stand in each row, in ascending order, is beside them: int32 (outputs, K). Training
    selects them at its start (`start_from_images`), or a file has them; until then they are the first K of each row.
    """

    def __init__(self, backbone: Backbone, connections: int = 1, bias: bool = True) -> None:
        """Copies the parameters; a ConfigError where the backbone has none of that kind.

        Args:
            backbone: The backbone whose weights are trained.
            connections: K, at least 1; all of a row that has fewer.
            bias: Whether biases train, too.
        """
        DeltaPart.__init__(self, backbone)
        if connections < 1:
            raise ConfigError(f"gps trains at least 1 of the connections of each neuron, got {connections}.")
        self.connections = connections
        layers = {key: layer for key, layer in affine_layers(backbone).items() if isinstance(layer, _LAYERS)}
        self._weights = {to_key(f"{name}.weight"): layer for name, layer in layers.items()}
        norms = set(parameter_names(backbone, "norm"))
        biases = [name for name in parameter_names(backbone, "bias") if name not in norms]
        self._copy([f"{name}.weight" for name in layers] + (biases if bias else []))

    def _taken(self, key: str, original: Tensor) -> Tensor:
        if key not in self._weights:
            return original
        rows = original.flatten(1)
        places = torch.arange(min(self.connections, rows.shape[1]), dtype=torch.int32, device=rows.device)
        self.register_buffer(f"places_{key}", places.repeat(len(rows), 1))
        return rows.gather(1, self._places(key))

    def _originals(self) -> dict[str, nn.Parameter]:
        """The weights of the backbone, by key; while it is attached, a layer's attribute is what is computed of one."""
        return {key: cast("nn.Parameter", layer._parameters["weight"]) for key, layer in self._weights.items()}

    def _places(self, key: str) -> Tensor:
        return self.get_buffer(f"places_{key}").long()

    def _value(self, key: str, original: Tensor) -> Tensor:
        if key not in self._weights or self.at(key) == 0.0:
            return super()._value(key, original)
        rows, places = original.flatten(1), self._places(key)
        return rows.scatter(1, places, super()._value(key, rows.gather(1, places))).view_as(original)

    def _select(self, training: TrainingImages, labels: Tensor, rng: np.random.Generator) -> None:
        """Takes the weights with the largest gradient of `contrastive_loss`.

        It is that of batches of images and their mirror images, in an order that is drawn from `rng`; the gradients are
        summed.
        """
        weights = self._originals()
        found = {key: torch.zeros_like(weight) for key, weight in weights.items()}
        batches = in_batches(rng.permutation(training.number).tolist(), BATCH)
        for gradients in self._gradients(weights, training, labels, batches, self._loss):
            for key, gradient in gradients.items():
                found[key] += gradient
        for key, weight in weights.items():
            order = found[key].flatten(1).abs().argsort(dim=1, descending=True, stable=True)
            places = order[:, : self.connections].sort(dim=1).values
            self.get_buffer(f"places_{key}").copy_(places)
            self.values[key].copy_(weight.flatten(1).gather(1, places))

    def _loss(self, images: Tensor, classes: Tensor) -> Tensor:
        return contrastive_loss(self.backbone(torch.cat([images, images.flip(-1)])), classes.repeat(2))

    def misfit(self, tensors: Mapping[str, Tensor]) -> str:
        """See `DeltaPart`: places lie in their rows, in ascending order."""
        for key, weight in self._originals().items():
            places, width = tensors[f"places_{key}"].long(), weight[0].numel()
            if int(places.min()) < 0 or int(places.max()) >= width or bool((places.diff(dim=1) <= 0).any()):
                return f"it trains weights of {key.replace('/', '.')} that are none"
        return ""


_LAYERS = (nn.Linear, nn.Conv2d)


def contrastive_loss(features: Tensor, labels: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """The supervised contrastive loss, a scalar (Khosla et al., equation 2).

    The mean over images i of −1/|P(i)| · Σ over p in P(i) of log(exp(zᵢ·zₚ/τ) / Σ over a ≠ i of exp(zᵢ·zₐ/τ)), z the
    features (B, dim), normalised to length 1, and P(i) the others with the label of i, at least one.
    """
    directions = normalize(features, dim=1)
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    shares = (directions @ directions.T / temperature).masked_fill(own, -torch.inf).log_softmax(dim=1)
    alike = (labels.unsqueeze(1) == labels) & ~own
    return -(shares.masked_fill(~alike, 0.0).sum(dim=1) / alike.sum(dim=1)).mean()
