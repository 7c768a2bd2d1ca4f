"""Probabilistic VeRA (Fillioux et al., "PVeRA: Probabilistic vector-based random matrix adaptation", WACV 2026).

What A reads of a token are the mean and the logarithm of the variance of a normal distribution, from which training
draws what B is given: W x + Λ_b B z, z ~ N(Λ_μ A_μ x, exp(Λ_σ A_σ x)). Otherwise z is the mean, a VeRA.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vpt.backbones.factory import Backbone
from vpt.deltas.low_rank.vera import Vera
from vpt.deltas.registry import register_delta
from vpt.errors import ConfigError


@register_delta("pvera")
class Pvera(Vera):
    """Changes as those of `Vera`, whose ranks are random while they train.

    `d` and `shared_down` have twice the rank: first what gives the mean, then what gives the variance. Merged it is
    that of the mean.
    """

    method = "PVeRA"
    read = 2

    def __init__(
        self,
        backbone: Backbone,
        rank: int = 256,
        seed: int = 0,
        d_initial: float = 0.1,
        targets: Sequence[str] = ("q", "v"),
        layers: Sequence[int] | None = None,
    ) -> None:
        """Draws A and B and sets d and b as `Vera` does, whose arguments these are; linear maps alone."""
        super().__init__(backbone, rank, seed, d_initial, targets, layers)
        if self.convolutions:
            first = next(iter(self.convolutions)).replace("/", ".")
            raise ConfigError(
                f"PVeRA draws for each token, of linear maps, and {first} is a convolution: vera takes it."
            )

    def factors(self, key: str) -> tuple[Tensor, Tensor]:
        """See `LowRankChange`: those of the mean."""
        down, up = self._read(key)
        return down[: len(down) // 2], up

    def _read(self, key: str) -> tuple[Tensor, Tensor]:
        """Λ_d A of mean and variance, (2 · rank, inputs), and Λ_b B, (outputs, rank)."""
        b, (inputs,) = self.b[key], self.shapes[key][1]
        return self.shared_down[:, :inputs] * self.d[key].unsqueeze(1), self.shared_up[: len(b)] * b.unsqueeze(1)

    def _beside(self, keys: Sequence[str], module: nn.Linear, x: Tensor, out: Tensor) -> Tensor:
        if not self.training:
            return super()._beside(keys, module, x, out)
        for key in keys:
            (down, up), target = self._read(key), self.targets[key]
            mean, variance = (x @ down.T).chunk(2, dim=-1)
            drawn = mean + torch.randn_like(mean) * (variance / 2).exp()
            own = (drawn @ up.T) * (self.factor * self.at(key))
            out = out + nn.functional.pad(own, (target.start, module.out_features - target.stop))
        return out
