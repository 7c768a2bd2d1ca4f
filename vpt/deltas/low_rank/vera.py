"""Vector-based random matrix adaptation (Kopiczko et al., "VeRA", ICLR 2024, equation 2): W + Λ_b B Λ_d A."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from vpt.backbones.factory import Backbone
from vpt.deltas.low_rank.change import LowRankChange
from vpt.deltas.registry import register_delta
from vpt.errors import ConfigError


@register_delta("vera")
class Vera(LowRankChange):
    """Changes that share two random matrices, which do not train, and have two trained vectors each.

    `d`, (rank,), scales what A reads, `b`, (outputs,), what B gives; b is zero at first: training starts from the
    backbone. `shared_down` A, (rank, inputs), and `shared_up` B, (outputs, rank), are as wide as the widest of the
    maps, of which each takes the first columns and rows. They follow from `seed` and these widths, as NumPy's
    `RandomState` draws, whose numbers are the same on every machine and in every version, and are in no file.
    """

    method = "VeRA"
    read: ClassVar[int] = 1
    """How many values of each rank A reads."""

    def __init__(
        self,
        backbone: Backbone,
        rank: int = 256,
        seed: int = 0,
        d_initial: float = 0.1,
        targets: Sequence[str] = ("q", "v"),
        layers: Sequence[int] | None = None,
    ) -> None:
        """Draws A and B from Kaiming's uniform distributions and sets d to one number and b to zero.

        Args:
            backbone: The backbone that the change is for.
            rank: Of each change, at least 1; it may exceed the widths of a layer, as in the paper.
            seed: Of the random matrices, 0 or more.
            d_initial: What all of d start from, not 0.
            targets: See `LowRankChange`.
            layers: See `LowRankChange`.
        """
        if rank < 1 or seed < 0 or d_initial == 0:
            raise ConfigError(
                f"{self.method} takes a rank of at least 1, a seed of at least 0 and a d_initial that is not 0, got "
                f"{rank}, {seed} and {d_initial}."
            )
        super().__init__(backbone, targets, layers)
        inputs = max(math.prod(each) for _, each in self.shapes.values())
        outputs = max(outputs for outputs, _ in self.shapes.values())
        self.seed, rng = seed, np.random.RandomState(seed)
        self._drawn = [_uniform(rng, self.read * rank, inputs), _uniform(rng, outputs, rank)]
        self._take(backbone.mean)
        self.d, self.b = nn.ParameterDict(), nn.ParameterDict()
        for key, (outputs, _) in self.shapes.items():
            self.d[key] = nn.Parameter(backbone.mean.new_full((self.read * rank,), d_initial))
            self.b[key] = nn.Parameter(backbone.mean.new_zeros(outputs))

    def _take(self, like: Tensor) -> None:
        self.shared_down, self.shared_up = (torch.from_numpy(each).to(like) for each in self._drawn)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Vera:
        """Moves and casts as any module; the random matrices are the drawn ones, rounded once."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._take(next(iter(self.b.values())))
        return self

    def factors(self, key: str) -> tuple[Tensor, Tensor]:
        """See `LowRankChange`."""
        b = self.b[key]
        inputs = math.prod(self.shapes[key][1])
        return self.shared_down[:, :inputs], self.shared_up[: len(b)] * self.d[key] * b.unsqueeze(1)

    def expected_parameters(self) -> int:
        """Σ rank + outputs over the maps."""
        return sum(self.shared_down.shape[0] + outputs for outputs, _ in self.shapes.values())


def _uniform(rng: np.random.RandomState, rows: int, columns: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Kaiming's uniform distribution on ±√(6 / columns)."""
    bound = math.sqrt(6 / columns)
    return ((2 * rng.random_sample((rows, columns)) - 1) * bound).astype(np.float32)
