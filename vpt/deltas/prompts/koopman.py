"""Prompts of successive layers as one evolution, the penalty of prompt-agnostic evolution (PAE).

Wang et al., "Visual Prompt-Agnostic Evolution", ICLR 2026, arXiv 2601.20232: the Koopman-Lyapunov system, equations 8
and 10.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from vpt.argument_types import Options
from vpt.deltas.base import Shape
from vpt.errors import ConfigError, check_number


@dataclass(frozen=True)
class Koopman(Options):
    """How strongly the prompts of a layer are held to follow from those of the layer before.

    Attributes:
        rate: α of the paper, on what the linear map misses, at least 0.
        stability: β of the paper, on energy that grows from layer to layer, at least 0.
        width: K of the paper, of the space in which the map is linear, at least 1.
    """

    rate: float = 0.5
    stability: float = 0.2
    width: int = 256

    def __post_init__(self) -> None:
        """Refuses what is out of range."""
        check_number("rate of koopman", self.rate, 0, 1e6)
        check_number("stability of koopman", self.stability, 0, 1e6)
        check_number("width of koopman", self.width, 1, whole=True)
        if self.rate == self.stability == 0:
            raise ConfigError("koopman penalises nothing where rate and stability are 0: leave it out.")


class KoopmanPenalty(nn.Module):
    """α Σ ‖z₊ - z 𝒦‖² + β Σ max(0, V(z₊) - V(z)) over successive layers, z = P U and V(z) = tr(z Q zᵀ), Q = Lᵀ L.

    U (dim, width), 𝒦 and L (width, width), the latter two the identity at first, are trained with the prompts and
    belong to training alone: what a delta computes does not depend on them.
    """

    def __init__(self, shapes: Sequence[Shape], options: Koopman, like: Tensor) -> None:
        """`shapes` are (n, dim) of each layer: a ConfigError unless there are two and all are the same."""
        super().__init__()
        if len(shapes) < 2 or len({*shapes}) > 1:
            raise ConfigError(
                "koopman maps the prompts of a layer to those of the next: give at least two layers as many prompts, "
                "on a backbone whose layers have one width."
            )
        self.options, dim = options, shapes[0][1]
        bound = dim**-0.5  # as a linear layer is drawn
        self.projection = nn.Parameter(like.new_empty(dim, options.width).uniform_(-bound, bound))
        self.operator = nn.Parameter(torch.eye(options.width, dtype=like.dtype, device=like.device))
        self.energy = nn.Parameter(torch.eye(options.width, dtype=like.dtype, device=like.device))

    def forward(self, prompts: Sequence[Tensor]) -> Tensor:
        """The penalty, a scalar, of the prompts (n, dim) of each layer."""
        with torch.autocast(self.operator.device.type, enabled=False):
            lifted = torch.stack(list(prompts)) @ self.projection
            missed = (lifted[1:] - lifted[:-1] @ self.operator).square().sum()
            energies = (lifted @ self.energy.T).square().sum(dim=(1, 2)).unbind()
            growth = sum(torch.relu(after - before) for before, after in pairwise(energies))
            return self.options.rate * missed + self.options.stability * growth

    def expected_parameters(self) -> int:
        """(dim + 2 · width) · width."""
        dim, width = self.projection.shape
        return (dim + 2 * width) * width
