"""Bottleneck adapters: a small MLP behind, or beside, the parts of a block.

Sequential: Houlsby et al., ICML 2019 (behind attention and MLP) and Pfeiffer et al., EACL 2021 (behind the MLP only).
Parallel: AdaptFormer (Chen et al., NeurIPS 2022, equations 2-3), beside the MLP and on its normalised input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu
from torch.utils.hooks import RemovableHandle

from vpt.backbones.factory import Backbone
from vpt.backbones.target_modules import sublayers
from vpt.deltas.base import DeltaPart, chosen_blocks
from vpt.deltas.registry import register_delta
from vpt.errors import ConfigError, UnknownNameError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": gelu, "relu": relu}
PLACEMENTS: dict[str, tuple[str, ...]] = {"houlsby": ("attn", "mlp"), "pfeiffer": ("mlp",), "parallel": ("mlp",)}


@register_delta("adapter")
class Adapter(DeltaPart):
    """Adds factor · up(activation(down(x))) to the output of a sublayer, before the residual connection.

    x is that output (sequential), or the input of the sublayer (parallel). Its strength scales what is added.

    Attributes:
        down: Weights and biases of the first layer by ``block_sublayer``, (rank, dim) and (rank,).
        up: Those of the second, (dim, rank) and (dim,); zero at first, so that training starts from the backbone,
            while a random first layer lets every tensor train from the second step on.
    """

    def __init__(
        self,
        backbone: Backbone,
        rank: int = 8,
        placement: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer",
        factor: float = 1.0,
        activation: Literal["gelu", "relu"] = "gelu",
        layers: Sequence[int] | None = None,
    ) -> None:
        """Draws the first layers as PyTorch draws linear layers and sets the second to zero.

        Args:
            backbone: The backbone that the adapters are for.
            rank: Width of the bottleneck, at least 1.
            placement: ``houlsby``, ``pfeiffer`` or ``parallel``.
            factor: Multiplies what is added; AdaptFormer uses 0.1.
            activation: ``relu`` is AdaptFormer's; units that no token switches on do not train.
            layers: Only in blocks ``[first, last + 1]``, counted from 0; None for all.

        Raises:
            ConfigError: The rank is not positive.
            UnknownNameError: The placement or the activation does not exist.
            UnsupportedBackboneError: The structure of the backbone is not known.
        """
        super().__init__(backbone)
        if rank < 1:
            raise ConfigError(f"The rank of an adapter must be at least 1, got {rank}.")
        if placement not in PLACEMENTS:
            raise UnknownNameError("placement", placement, PLACEMENTS)
        if activation not in ACTIVATIONS:
            raise UnknownNameError("activation", activation, ACTIVATIONS)
        self.rank, self.parallel, self.factor = rank, placement == "parallel", factor
        self._activation = ACTIVATIONS[activation]
        blocks = sublayers(backbone)
        chosen = chosen_blocks(len(blocks), layers)
        self.first_block = chosen[0]
        self._sublayers = {f"{index}_{name}": blocks[index][name] for index in chosen for name in PLACEMENTS[placement]}
        self._dims, like = backbone.layout.dims, backbone.mean
        self.down, self.up = nn.ModuleDict(), nn.ModuleDict()
        for key in self._sublayers:
            dim = self._dims[int(key.partition("_")[0])]
            self.down[key] = nn.Linear(dim, rank, device=like.device, dtype=like.dtype)
            up = nn.Linear(rank, dim, device=like.device, dtype=like.dtype)
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)
            self.up[key] = up

    def _hooks(self) -> Iterator[RemovableHandle]:
        """An adapter on every chosen sublayer."""
        for key, layer in self._sublayers.items():
            yield layer.register_forward_hook(partial(self._add, key))

    def expected_parameters(self) -> int:
        """2 · rank · dim + rank + dim for each adapter."""
        dims = (self._dims[int(key.partition("_")[0])] for key in self._sublayers)
        return sum(2 * self.rank * dim + self.rank + dim for dim in dims)

    def _add(self, key: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if self._strength == 0.0:
            return out
        x = args[0] if self.parallel else out
        change: Tensor = self.up[key](self._activation(self.down[key](x))) * (self.factor * self._strength)
        return torch.add(out, change)
