"""Layers of maps (B, channels, rows, columns) for tokens (B, n, dim) that have no place in a map."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor


def as_map(layer: Any, x: Tensor) -> Tensor:
    """Passes tokens (B, n, dim) through a layer of maps as a column of n pixels: (B, n, channels)."""
    return cast("Tensor", layer(x.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2))


def constant_map(convolution: Any, x: Tensor) -> Tensor:
    """What a convolution makes of maps that are each token everywhere, far from their edges: (B, n, channels)."""
    side = 3 * max(convolution.kernel_size)
    maps = x.flatten(0, 1)[:, :, None, None].expand(-1, -1, side, side)
    out = convolution(maps)
    middle = out.shape[-1] // 2
    return cast("Tensor", out[:, :, middle, middle].reshape(*x.shape[:2], -1))
