"""Masked LoRA experts (Wang et al., "MLAE: Masked LoRA experts for visual parameter-efficient fine-tuning", 2024).

The change of rank r is a sum of r matrices of rank 1, the experts, of which training leaves out some by chance: W +
Σ m_i · λ_i · b_i a_iᵀ (arXiv 2405.18897, with its stochastic mask and adaptive coefficients).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import dropout as drop

from vpt.backbones.factory import Backbone
from vpt.deltas.low_rank.lora import Lora
from vpt.deltas.registry import register_delta
from vpt.errors import ConfigError


@register_delta("mlae")
class Mlae(Lora):
    """Low-rank changes whose ranks have a trained coefficient each, and are dropped at random while they train.

    `coefficient` are their λ, (rank,); `down` and `up` are a and b, as those of `Lora`. In training m of each expert is
    0 with the probability of `dropout`, else 1 / (1 − dropout), drawn anew in every forward pass of a map, for all
    images alike; otherwise it is 1.
    """

    method = "MLAE"

    def __init__(
        self,
        backbone: Backbone,
        rank: int = 8,
        dropout: float = 0.5,
        coefficient: float = 1.0,
        targets: Sequence[str] = ("q", "v"),
        layers: Sequence[int] | None = None,
    ) -> None:
        """Draws a as PyTorch draws a linear layer, sets b to zero and λ to one number.

        Args:
            backbone: The backbone that the change is for.
            rank: How many experts each change has, at least 1.
            dropout: Probability in [0, 1).
            coefficient: What all λ start from, not 0.
            targets: See `LowRankChange`.
            layers: See `LowRankChange`.
        """
        if not 0 <= dropout < 1 or coefficient == 0:
            raise ConfigError(
                f"MLAE takes a dropout in [0, 1) and a coefficient that is not 0, got {dropout} and {coefficient}."
            )
        super().__init__(backbone, rank, None, targets, layers)
        self.dropout = dropout
        self.coefficient = nn.ParameterDict(
            {key: nn.Parameter(backbone.mean.new_full((rank,), coefficient)) for key in self.shapes}
        )

    def factors(self, key: str) -> tuple[Tensor, Tensor]:
        """See `LowRankChange`."""
        return self.down[key], self.up[key] * self.coefficient[key]

    def acting(self, key: str) -> tuple[Tensor, Tensor]:
        """See `LowRankChange`: without the experts that are dropped."""
        coefficient = drop(self.coefficient[key], self.dropout, self.training)
        return self.down[key], self.up[key] * coefficient

    def expected_parameters(self) -> int:
        """Σ rank · (inputs + outputs + 1) over the maps."""
        return super().expected_parameters() + sum(len(each) for each in self.coefficient.values())
