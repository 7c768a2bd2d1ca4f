"""Bottleneck adapters: a small MLP behind, or beside, the parts of a block.

Sequential: Houlsby et al., ICML 2019 (behind attention and MLP) and Pfeiffer et al., EACL 2021 (behind the MLP only).
Parallel: AdaptFormer (Chen et al., NeurIPS 2022, equations 2-3), beside the MLP and on its normalised input; in the
released codes (its own for images and for video, and PETL-ViT) on the residual stream instead.
Behind the block: Adapter+ (Steitz & Roth, CVPR 2024), with a trained scale for each channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu

from vpt.backbones.factory import Backbone
from vpt.backbones.strength import Place
from vpt.backbones.target_modules import named_layers, norms_before_mlp, sublayers
from vpt.deltas.base import DeltaPart, Handle, chosen_blocks
from vpt.deltas.registry import register_delta
from vpt.errors import ConfigError, UnknownNameError, UnsupportedBackboneError, check_number

READS = ("normalised", "residual")


def quick_gelu(x: Tensor) -> Tensor:
    """The GELU with a logistic function, x · sigmoid(1.702 x), of any shape: at most 0.021 from it."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": gelu, "quick_gelu": quick_gelu, "relu": relu}
PLACEMENTS: dict[str, tuple[str, ...]] = {
    "houlsby": ("attn", "mlp"),
    "pfeiffer": ("mlp",),
    "parallel": ("mlp",),
    "post": ("block",),
}


@register_delta("adapter")
class Adapter(DeltaPart):
    """Adds factor · up(activation(down(x))) to the output of a sublayer, before the residual connection.

    x is that output (sequential), or the input of the sublayer (parallel). With ``post`` both are the residual stream
    behind the block. Its strength scales what is added.

    Attributes:
        down: Weights and biases of the first layer by ``block_sublayer``, (rank, dim) and (rank,).
        up: Those of the second, (dim, rank) and (dim,); zero at first, so that training starts from the backbone,
            while a random first layer lets every tensor train from the second step on.
        scale: What each channel of that is multiplied with, (dim,), where there is a `channel_scale`; ones at first.
    """

    def __init__(
        self,
        backbone: Backbone,
        rank: int = 8,
        placement: Literal["houlsby", "pfeiffer", "parallel", "post"] = "pfeiffer",
        factor: float = 1.0,
        activation: Literal["gelu", "quick_gelu", "relu"] = "gelu",
        layers: Sequence[int] | None = None,
        reads: Literal["normalised", "residual"] = "normalised",
        targets: Sequence[str] | None = None,
        channel_scale: bool = False,
        std: float | None = None,
    ) -> None:
        """Draws the first layers as PyTorch draws linear layers and sets the second to zero.

        Args:
            backbone: The backbone that the adapters are for.
            rank: Width of the bottleneck, at least 1.
            placement: ``houlsby``, ``pfeiffer``, ``parallel`` or ``post``.
            factor: Multiplies what is added; AdaptFormer uses 0.1.
            activation: ``relu`` is AdaptFormer's; units that no token switches on do not train. ``quick_gelu`` is that
                of NOAH's released code (Zhang et al., 2022).
            layers: Only in blocks ``[first, last + 1]``, counted from 0; None for all.
            reads: With ``parallel``, what the adapter is fed: the input of the MLP behind its norm, or the ``residual``
                stream before it.
            targets: Instead of a placement, behind linear layers and convolutions of any backbone by name
                (`vpt.backbones.target_modules.named_layers`), over their channels.
            channel_scale: Whether each channel of what is added has a trained scale (Adapter+).
            std: Instead, both layers are drawn from N(0, std²) within two deviations, with biases of zero (Houlsby's
                initialisation, with 0.01, and Adapter+'s).
        """
        super().__init__(backbone)
        if rank < 1:
            raise ConfigError(f"The rank of an adapter must be at least 1, got {rank}.")
        if factor == 0:
            raise ConfigError("The factor of an adapter is 0, with which it adds nothing: give another.")
        if placement not in PLACEMENTS:
            raise UnknownNameError("placement", placement, PLACEMENTS)
        if activation not in ACTIVATIONS:
            raise UnknownNameError("activation", activation, ACTIVATIONS)
        if reads not in READS:
            raise UnknownNameError("reads", reads, READS)
        if std is not None:
            check_number("std", std, 0)
        if reads == "residual" and placement != "parallel":
            raise ConfigError(f"reads: residual is for placement parallel, got {placement}, which reads an output.")
        self.rank, self.parallel, self.factor = rank, placement == "parallel", factor
        self._norms = norms_before_mlp(backbone) if reads == "residual" else {}
        self._activation = ACTIVATIONS[activation]
        if targets is None:
            self._choose_blocks(placement, layers)
        else:
            if not targets or layers is not None or placement != "pfeiffer":
                raise ConfigError(
                    "targets of an adapter are one or more layers by name: leave out placement and layers."
                )
            named = named_layers(backbone, targets)
            self._sublayers: dict[str, nn.Module] = {name.replace(".", "/"): layer for name, layer in named.items()}
            self._dims = {name.replace(".", "/"): layer.weight.shape[0] for name, layer in named.items()}
        like = backbone.mean
        self.down, self.up, self.scale = nn.ModuleDict(), nn.ModuleDict(), nn.ParameterDict()
        for key, dim in self._dims.items():
            down = nn.Linear(dim, rank, device=like.device, dtype=like.dtype)
            up = nn.Linear(rank, dim, device=like.device, dtype=like.dtype)
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)
            if std is not None:
                nn.init.zeros_(down.bias)
                for layer in (down, up):
                    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            self.down[key], self.up[key] = down, up
            if channel_scale:
                self.scale[key] = nn.Parameter(like.new_ones(dim))

    def _choose_blocks(self, placement: str, layers: Sequence[int] | None) -> None:
        layout = self.backbone.layout
        if placement == "post" and layout.windowed:
            raise UnsupportedBackboneError(
                f"placement post is behind a block's residual stream, which prompts beside the map of "
                f"{self.backbone.name} do not pass as one: give pfeiffer, houlsby or parallel."
            )
        blocks = [{**own, "block": block} for own, block in zip(sublayers(self.backbone), layout.blocks, strict=True)]
        chosen = chosen_blocks(len(blocks), layers)
        self.first_block = chosen[0]
        keys = [(index, f"{index}_{name}", blocks[index][name]) for index in chosen for name in PLACEMENTS[placement]]
        self._sublayers = {key: layer for _, key, layer in keys}
        self._dims = {key: layout.dims[index] for index, key, _ in keys}

    def hooks(self) -> Iterator[Handle]:
        """An adapter on every chosen sublayer."""
        for key, layer in self._sublayers.items():
            if self._norms and (norm := self._norms.get(int(key.partition("_")[0]))) is not None:
                yield norm.register_forward_pre_hook(self._hold)
            yield layer.register_forward_hook(partial(self._add, key))

    def places(self) -> Mapping[Any, Place]:
        """See `DeltaPart`."""
        return dict(self._sublayers)

    def adds_to(self) -> list[nn.Module]:
        """See `DeltaPart`."""
        return list(self._sublayers.values())

    def expected_parameters(self) -> int:
        """2 · rank · dim + rank + dim for each adapter, and dim for the scales of its channels."""
        scales = 2 if len(self.scale) else 1
        return sum(2 * self.rank * dim + self.rank + scales * dim for dim in self._dims.values())

    def _add(self, key: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if (strength := self.at(key)) == 0.0:
            return out
        x = self._held() if self._norms else args[0] if self.parallel else out
        maps = isinstance(module, nn.Conv2d)  # whose channels are not last
        x = x.movedim(1, -1) if maps else x
        change: Tensor = self.up[key](self._activation(self.down[key](x))) * (self.factor * strength)
        if key in self.scale:
            change = change * self.scale[key]
        return torch.add(out, change.movedim(-1, 1) if maps else change)

    def _hold(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._strength != 0.0:
            _HELD.set({**_HELD.get(), self: args[0]})

    def _held(self) -> Tensor:
        held = dict(_HELD.get())
        residual = held.pop(self)
        _HELD.set(held)  # nothing is held longer than from the norm to the MLP behind it
        return residual


_HELD: ContextVar[Mapping[Adapter, Tensor]] = ContextVar("residual streams before an MLP", default=MappingProxyType({}))
"""Between the norm and the MLP of a block, by the adapter that reads them there."""
