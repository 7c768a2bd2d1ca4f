"""Low-rank adaptation of linear maps (Hu et al., "LoRA", ICLR 2022, section 4.1): W + (scale/rank) · B A."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from vpt.backbones.factory import Backbone
from vpt.deltas.low_rank.change import LowRankChange
from vpt.deltas.registry import register_delta
from vpt.errors import ConfigError


@register_delta("lora")
class Lora(LowRankChange):
    """Low-rank changes whose two factors are trained.

    `down` are their A, (rank, inputs) or (rank, inputs, rows, columns), and `up` their B, (outputs, rank), zero at
    first: training starts from the backbone.
    """

    method = "LoRA"

    def __init__(
        self,
        backbone: Backbone,
        rank: int = 8,
        scale: float | None = None,
        targets: Sequence[str] = ("q", "v"),
        layers: Sequence[int] | None = None,
    ) -> None:
        """Draws A as PyTorch draws a linear layer and sets B to zero.

        Args:
            backbone: The backbone that the change is for.
            rank: Of each change, at least 1.
            scale: Numerator of the factor scale/rank; None for the rank itself, a factor of 1.
            targets: See `LowRankChange`.
            layers: See `LowRankChange`.
        """
        if rank < 1:
            raise ConfigError(f"The rank of {self.method} must be at least 1, got {rank}.")
        if scale == 0:
            raise ConfigError(f"{self.method} needs a scale that is not 0.")
        super().__init__(backbone, targets, layers)
        self.factor = 1.0 if scale is None else scale / rank
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for key, (outputs, inputs) in self.shapes.items():
            down = backbone.mean.new_empty(rank, *inputs)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            self.down[key] = nn.Parameter(down)
            self.up[key] = nn.Parameter(backbone.mean.new_zeros(outputs, rank))

    def factors(self, key: str) -> tuple[Tensor, Tensor]:
        """See `LowRankChange`."""
        return self.down[key], self.up[key]

    def expected_parameters(self) -> int:
        """Σ rank · (inputs + outputs) over the maps; the inputs of a convolution are those of one group, times k²."""
        rank = len(next(iter(self.down.values())))
        return rank * sum(outputs + math.prod(inputs) for outputs, inputs in self.shapes.values())
