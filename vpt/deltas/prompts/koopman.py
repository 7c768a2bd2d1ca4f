"""Prompts of successive layers as one evolution, the penalty of prompt-agnostic evolution (PAE).

Wang et al., "Visual Prompt-Agnostic Evolution", ICLR 2026, arXiv 2601.20232: the Koopman-Lyapunov system, equations 8
and 10, in the form of the released program, to which the published rates belong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from vpt.argument_types import Options
from vpt.deltas.base import Shape
from vpt.errors import ConfigError, check_number


@dataclass(frozen=True)
class Koopman(Options):
    """How strongly the prompts of a layer are held to follow from those of the layer before.

    Attributes:
        rate: α of the paper, on what the linear map misses, at least 0.
        stability: β of the paper, on energy that the map lets grow from layer to layer, at least 0.
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
    """What the prompts P of successive layers cost in training, as the released program of PAE computes it.

    With z = P U, of each pair of layers α · mean (z 𝒦 - z₊)² + β · mean s(V(z 𝒦) - V(z)): s is the softplus, damped as
    10 tanh(s / 10), and V(z) = zᵀ Q z of each prompt, brought to length 1 where it is longer, by Q = Lᵀ L of norm 1.
    Equation 10 has a maximum with 0 in place of s, and nothing brought to a length.

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
        """The penalty, a scalar in single precision at least, of the prompts (n, dim) of each layer."""
        kind = torch.promote_types(self.operator.dtype, torch.float32)
        with torch.autocast(self.operator.device.type, enabled=False):
            lifted = torch.stack(list(prompts)).to(kind) @ self.projection.to(kind)
            before, after = lifted[:-1], lifted[1:]
            predicted = before @ self.operator.to(kind)
            missed = (predicted - after).square().mean(dim=(1, 2))
            growth = softplus(self._energies(predicted) - self._energies(before)).mean(dim=1)
            damped = 10 * torch.tanh(growth / 10)
            return (self.options.rate * missed + self.options.stability * damped).sum()

    def _energies(self, states: Tensor) -> Tensor:
        """V of each prompt, (layers, n), of states (layers, n, width)."""
        energy = self.energy.to(states.dtype)
        form = energy.T @ energy
        form = form / (torch.linalg.matrix_norm(form, ord=2) + 1e-8)
        states = states / (states.norm(dim=-1, keepdim=True) + 1e-8).clamp(min=1.0)
        return cast("Tensor", ((states @ form) * states).sum(dim=-1))

    def expected_parameters(self) -> int:
        """(dim + 2 · width) · width."""
        dim, width = self.projection.shape
        return (dim + 2 * width) * width
