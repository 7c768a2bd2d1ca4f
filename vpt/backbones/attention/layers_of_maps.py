"""Layers of maps (B, channels, rows, columns) for tokens (B, n, dim) that have no place in a map."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn


def as_map(layer: Any, x: Tensor) -> Tensor:
    """Passes tokens (B, n, dim) through a layer of maps as B · n maps of one pixel: (B, n, channels).

    A batch norm in training applies what it has kept: batch statistics are of the images' maps.
    """
    if isinstance(layer, nn.BatchNorm2d) and layer.training:
        norm = cast("Any", layer)
        scaled = (x - norm.running_mean) * (norm.running_var + norm.eps).rsqrt() * norm.weight + norm.bias
        return cast("Tensor", norm.act(scaled) if hasattr(norm, "act") else scaled)
    # Not as one map of n pixels: in another memory order PyTorch 2.14 gives wrong gradients of batch norms.
    return cast("Tensor", layer(x.flatten(0, 1)[:, :, None, None]).reshape(*x.shape[:2], -1))


def constant_map(convolution: Any, x: Tensor) -> Tensor:
    """What a convolution makes of maps that are each token everywhere, far from their edges: (B, n, channels)."""
    side = 3 * max(convolution.kernel_size)
    maps = x.flatten(0, 1)[:, :, None, None].expand(-1, -1, side, side)
    out = convolution(maps)
    middle = out.shape[-1] // 2
    return cast("Tensor", out[:, :, middle, middle].reshape(*x.shape[:2], -1))
