"""Factor tuning (Jie & Deng, "FacT", AAAI 2023): the changes of all linear maps as one tensor of few factors.

The weights of a transformer are one tensor of d × d matrices, of which a layer of the MLP is several. Their changes are
s · V Σ Uᵀ, with U and V that all share and a small core Σ of each: free (tensor train, TT), or a mixture of a few that
all share (Tucker, TK).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vpt.backbones.factory import Backbone
from vpt.deltas.low_rank.change import LowRankChange
from vpt.deltas.registry import register_delta
from vpt.errors import ConfigError, UnknownNameError

FORMATS = ("tt", "tk")


@register_delta("fact")
class FacT(LowRankChange):
    """Changes of low rank whose factors all maps share, but for their cores.

    A map of other shape than (d, d), d the width of the widest block, is as many d × d matrices beside and below each
    other as cover it, of which it takes the first rows and columns.

    Attributes:
        u: U, (d, rank).
        v: V, (d, rank), zero at first: training starts from the backbone.
        cores: With ``tt`` Σ of every matrix, (matrices, rank, rank), by block, target, row and column.
        mixture: With ``tk`` what every matrix takes of the shared cores, (matrices, rank).
        shared: With ``tk`` these cores, (rank, rank, rank).
    """

    method = "FacT"

    def __init__(
        self,
        backbone: Backbone,
        rank: int = 16,
        format: Literal["tt", "tk"] = "tk",
        scale: float = 1.0,
        targets: Sequence[str] = ("q", "k", "v", "proj", "fc1", "fc2"),
        layers: Sequence[int] | None = None,
    ) -> None:
        """Draws U and the cores of ``tt`` as PyTorch draws linear layers and those of ``tk`` by Xavier's rule.

        Args:
            backbone: The backbone that the change is for, whose blocks are known.
            rank: Of each d × d change, 1 to d.
            format: Tensor train or Tucker.
            scale: s, which the paper chooses for each task; not 0.
            targets: Any of ``q``, ``k``, ``v``, ``proj``, ``fc1``, ``fc2``; the first layer of a gated MLP may be
                ``fc1_g`` and ``fc1_x``.
            layers: Only in blocks ``[first, last + 1]``, counted from 0; None for all.
        """
        dims = backbone.layout.dims
        if format not in FORMATS:
            raise UnknownNameError("format", format, FORMATS)
        if scale == 0:
            raise ConfigError("FacT needs a scale that is not 0.")
        if not 1 <= rank <= max(dims):
            raise ConfigError(f"The rank of FacT on {backbone.name} is 1 to {max(dims)}, got {rank}.")
        super().__init__(backbone, targets, layers)
        if named := [key.replace("/", ".") for key in (*self.targets, *self.convolutions) if not key[0].isdigit()]:
            raise ConfigError(f"FacT takes the maps of blocks, and {named[0]} is a layer by name: lora takes those.")
        self.format, self.factor, width = format, scale, max(dims)
        self._rooms: dict[str, tuple[int, int, int]] = {}
        count = 0
        for key, (outputs, inputs) in self.shapes.items():
            below, beside = math.ceil(outputs / width), math.ceil(inputs[0] / width)
            self._rooms[key] = count, below, beside
            count += below * beside
        like = backbone.mean
        self.u, self.v = nn.Parameter(like.new_empty(width, rank)), nn.Parameter(like.new_zeros(width, rank))
        nn.init.uniform_(self.u, -(width**-0.5), width**-0.5)
        if format == "tt":
            self.cores = nn.Parameter(like.new_empty(count, rank, rank))
            nn.init.uniform_(self.cores, -(rank**-0.5), rank**-0.5)
        else:
            self.mixture = nn.Parameter(like.new_empty(count, rank))
            self.shared = nn.Parameter(like.new_empty(rank, rank, rank))
            nn.init.xavier_uniform_(self.mixture)
            nn.init.xavier_uniform_(self.shared)

    def factors(self, key: str) -> tuple[Tensor, Tensor]:
        """See `LowRankChange`."""
        first, below, beside = self._rooms[key]
        outputs, (inputs,) = self.shapes[key]
        rooms = slice(first, first + below * beside)
        cores = (
            self.cores[rooms] if self.format == "tt" else torch.einsum("mk,kij->mij", self.mixture[rooms], self.shared)
        )
        rank = self.u.shape[1]
        rows = cores.view(below, beside, rank, rank).transpose(1, 2).flatten(2)  # (below, rank, beside · rank)
        down: Tensor = torch.block_diag(*[self.u.T] * beside)[:, :inputs]  # type: ignore[no-untyped-call]
        return down, (self.v @ rows).flatten(0, 1)[:outputs]

    def expected_parameters(self) -> int:
        """2 · d · rank, and rank² for every matrix, or rank for every matrix and rank³."""
        width, rank = self.u.shape
        count = sum(below * beside for _, below, beside in self._rooms.values())
        return 2 * width * rank + (count * rank**2 if self.format == "tt" else count * rank + rank**3)
