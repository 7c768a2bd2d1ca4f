"""Deep prompts that are a small function of the image's own tokens.

VAPT (Le et al., "Revisit Visual Prompt Tuning: The Expressiveness of Prompt Experts", ICLR 2026, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, dropout2d

from vpt.argument_types import Options
from vpt.deltas.base import Shape
from vpt.errors import ConfigError, check_number


@dataclass(frozen=True)
class Adaptive(Options):
    """How prompts are made of an image's tokens.

    Attributes:
        kernel: Side of the convolution, in patches, at least 1.
        hidden: Width of the projector, at least 1.
        dropout: Probability in [0, 1), of whole channels behind the convolution and of the projector's units.
    """

    kernel: int = 2
    hidden: int = 8
    dropout: float = 0.1

    def __post_init__(self) -> None:
        """Refuses what is out of range."""
        check_number("kernel of adaptive", self.kernel, 1, whole=True)
        check_number("hidden of adaptive", self.hidden, 1, whole=True)
        check_number("dropout of adaptive", self.dropout, 0, 1)
        if self.dropout == 1:
            raise ConfigError("dropout of adaptive must lie in [0, 1): 1 drops everything.")


class ImagePrompts(nn.Module):
    """The prompts of some layers as functions of the patches that enter them.

    Of patches X (patches, dim) as a map: C is their norm, convolved channel by channel with one kernel for all; a layer
    pools it over positions by a matrix of its own, g = A C + b, and adds a projector that all layers share, P = g +
    W₂ relu(W₁ g). A and b start at 0.
    """

    def __init__(self, shapes: Sequence[Shape], grid: tuple[int, int], options: Adaptive, like: Tensor) -> None:
        """`shapes` are (n, dim) of each layer, of one dim; a ConfigError where the kernel is larger than the grid."""
        super().__init__()
        if not shapes:
            raise ConfigError("adaptive prompts follow constant ones in the first block: give them a second block.")
        rows, columns = (side - options.kernel + 1 for side in grid)
        if rows < 1 or columns < 1:
            raise ConfigError(f"kernel of adaptive is {options.kernel}, for a map of {grid[0]} by {grid[1]} patches.")
        self.options, self.grid, dim = options, grid, shapes[0][1]
        place: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.norms = nn.ModuleList(nn.LayerNorm(dim, **place) for _ in shapes)
        size = (len(shapes), options.kernel, options.kernel)
        self.kernels = nn.Parameter(like.new_empty(size).normal_())
        self.pools = nn.ModuleList(nn.Linear(rows * columns, number, **place) for number, _ in shapes)
        for pool in self.pools:
            nn.init.zeros_(cast("nn.Linear", pool).weight)
            nn.init.zeros_(cast("nn.Linear", pool).bias)
        self.down = nn.Linear(dim, options.hidden, bias=False, **place)
        self.up = nn.Linear(options.hidden, dim, bias=False, **place)

    def forward(self, layer: int, tokens: Tensor) -> Tensor:
        """Prompts (B, n, dim) of a layer, of the tokens (B, N, dim) that enter it, whose last ones are the patches."""
        rows, columns = self.grid
        patches: Tensor = self.norms[layer](tokens[:, tokens.shape[1] - rows * columns :])
        channels = patches.transpose(1, 2).reshape(patches.shape[0], -1, rows, columns)
        side, kernel = self.options.kernel, self.kernels[layer].to(channels.dtype)
        # A convolution of each channel by one small kernel: a sum of shifted maps, without a copy of it per channel.
        rows, columns = rows - side + 1, columns - side + 1
        shifts = [(row, column) for row in range(side) for column in range(side)]
        parts = [kernel[r, c] * channels[:, :, r : r + rows, c : c + columns] for r, c in shifts]
        map_ = dropout2d(sum(parts[1:], start=parts[0]), self.options.dropout, self.training)
        # Of a view PyTorch would multiply in another order where weights train, and round otherwise.
        pooled: Tensor = self.pools[layer](map_.flatten(2).contiguous()).transpose(1, 2).contiguous()
        hidden = dropout(torch.relu(self.down(pooled)), self.options.dropout, self.training)
        return cast("Tensor", pooled + self.up(hidden))

    def expected_parameters(self) -> int:
        """Σ over layers of 2 · dim + k² + n · (positions + 1), and 2 · dim · hidden."""
        dim, hidden = self.down.in_features, self.down.out_features
        pools = [cast("nn.Linear", pool) for pool in self.pools]
        own = sum(2 * dim + self.options.kernel**2 + pool.out_features * (pool.in_features + 1) for pool in pools)
        return own + 2 * dim * hidden
