"""What deep prompts and prefixes share: keys and values that are appended in the attention of chosen blocks."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import pad

from vpt.argument_types import Options
from vpt.backbones.attention.base import OpenAttention
from vpt.backbones.factory import Backbone
from vpt.backbones.strength import Place
from vpt.deltas.base import DeltaPart, Handle
from vpt.errors import ConfigError, UnknownNameError, check_number

DropoutMode = Literal["sample", "shared", "key_value", "prompt"]
Edited = tuple[Tensor, Tensor, Tensor | None]
"""Keys, values and a bias on the logits, as an `AttentionEdit` returns them."""


@dataclass(eq=False)
class KeyEdit:
    """What a delta does to one attention module; nothing at strength 0, where the backbone's own code runs."""

    part: DeltaPart
    layer: int
    change: Callable[[int, OpenAttention, Tensor, Tensor], Edited]
    finish: Callable[[int, OpenAttention, Tensor, Tensor, Tensor | None], None] | None = None
    key: Hashable = None  # of the strength; None for the layer
    on_all: bool = False  # whether the keys of all edits are changed, so that it runs behind them

    @property
    def active(self) -> bool:
        """Whether the strength is above 0."""
        return self.part.at(self.layer if self.key is None else self.key) != 0.0

    def __call__(self, attention: OpenAttention, keys: Tensor, values: Tensor) -> Edited:
        """See `AttentionEdit`."""
        return self.change(self.layer, attention, keys, values)

    def complete(self, attention: OpenAttention, keys: Tensor, values: Tensor, bias: Tensor | None) -> None:
        """See `AttentionEdit`."""
        if self.finish is not None:
            self.finish(self.layer, attention, keys, values, bias)


@dataclass(frozen=True)
class Gate(Options):
    """A learned strength: g is added to the attention logits of a block's keys, whose odds become exp(g) fold.

    At a g well below 0 training starts near the backbone without them.

    Attributes:
        init: g before training, from -30 to 30.
        per: One g for each ``head`` of each block, or one for each ``block``.
        lr_scale: Their learning rate as a multiple of that of all else, positive.
    """

    init: float = -5.0
    per: Literal["head", "block"] = "head"
    lr_scale: float = 10.0

    def __post_init__(self) -> None:
        """Refuses what is out of range."""
        check_number("init of gate", self.init, -30, 30)
        check_number("lr_scale of gate", self.lr_scale, 0, 1e6)
        if self.per not in ("head", "block"):
            raise UnknownNameError("per of gate", self.per, ("head", "block"))
        if self.lr_scale == 0:
            raise ConfigError("lr_scale of gate must be positive: 0 would never open it.")


class ExtraKeys(DeltaPart):
    """Keys and values of its own in chosen `blocks`. Its strength α adds log α to the logits of its keys.

    `gate` is what the g of a `Gate` have learned beyond their `init`, block by block and head by head, (Σ heads,) or
    (blocks,): so small steps count in half precision, too. None without one.
    """

    modes: tuple[str, ...] = ("key_value", "prompt")

    def __init__(
        self,
        backbone: Backbone,
        blocks: list[int],
        dropout: float,
        dropout_mode: DropoutMode,
        log_bias: bool,
        gate: Gate | None,
    ) -> None:
        """Checks what is common; `log_bias` adds −log n to the logits of n keys, so that they begin as one token."""
        super().__init__(backbone)
        self.first_block = blocks[0]
        if not 0.0 <= dropout < 1.0:
            raise ConfigError(f"Prompt dropout must lie in [0, 1), got {dropout}.")
        if dropout_mode not in self.modes:
            raise UnknownNameError("dropout_mode", dropout_mode, self.modes)
        self.layout = backbone.attention_layout
        self.dropout, self.dropout_mode, self.log_bias = dropout, dropout_mode, log_bias
        self.blocks = blocks
        self._gate = None if gate is None else Gate.of(gate)
        self.gate: nn.Parameter | None = None
        if self._gate is not None:  # one dimension, so that it does not decay
            self.gate = nn.Parameter(backbone.mean.new_zeros(sum(self._gates())))

    def _gates(self) -> list[int]:
        """How many numbers the gate has in each of its blocks."""
        alone = self._gate is None or self._gate.per == "block"
        return [1 if alone else int(self.layout.attentions[block].num_heads) for block in self.blocks]

    def opening(self, layer: int) -> Tensor | None:
        """The g of a layer in single precision or better, (heads,) or (1,); None without a gate."""
        if self.gate is None or self._gate is None:
            return None
        learned = torch.split(self.gate, self._gates())[layer]
        return self._gate.init + (learned if learned.dtype == torch.float64 else learned.float())

    def of_logits(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Among tensors by name those that change the logits, a gate and temperatures: files keep them as they are."""
        return {name: tensor for name, tensor in tensors.items() if name in ("gate", "temperature.learned")}

    def rate_scales(self) -> dict[nn.Parameter, float]:
        """See `DeltaPart`: that of the gate."""
        return {} if self.gate is None or self._gate is None else {self.gate: self._gate.lr_scale}

    def curves(self) -> dict[str, Tensor]:
        """See `DeltaPart`: exp(g), the learned strength, of each block, as the mean of its heads."""
        openings = {block: self.opening(layer) for layer, block in enumerate(self.blocks)}
        return {f"gate/block_{b:02d}": g.detach().exp().mean() for b, g in openings.items() if g is not None}

    @abstractmethod
    def keys_values(self, layer: int, attention: OpenAttention, images: int) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer, by its position among those that have keys, for an attention and B images.

        Each (1, heads, n, head_dim), or (B, heads, n, head_dim) where they differ from image to image.
        """

    @property
    def constant(self) -> bool:
        """Whether all that it does is to add keys and values that are the same for all images."""
        return True

    def constants(self) -> dict[int, Edited]:
        """What it adds to each of its blocks whose strength is above 0, where it is `constant`, for one image.

        By block: keys and values, (1, heads, n, head_dim), and the bias on their logits, (1, heads or 1, 1, n) or None.
        """
        found: dict[int, Edited] = {}
        for layer, block in enumerate(self.blocks):
            if self.at(layer) == 0.0:
                continue
            with self.backbone.computing():
                keys, values = self.keys_values(layer, self.layout.attentions[block], 1)
            found[block] = keys, values, self.key_bias(layer, keys, keys.shape[2], 0)
        return found

    def places(self) -> Mapping[Any, Place]:
        """See `DeltaPart`: by layer, among those that have keys."""
        return {layer: self.layout.attentions[block] for layer, block in enumerate(self.blocks)}

    def hooks(self) -> Iterable[Handle]:
        """Keys and values in every chosen block."""
        for layer, block in enumerate(self.blocks):
            yield self.layout.attentions[block].register_edit(KeyEdit(self, layer, self._append))

    def _append(self, layer: int, attention: OpenAttention, keys: Tensor, values: Tensor) -> Edited:
        rows, _, before, _ = keys.shape
        images = rows // attention.windows
        # A prefix is no result of a product, so that autocast has not narrowed it, and would widen all keys.
        own_keys, own_values = (own.to(keys.dtype) for own in self.keys_values(layer, attention, images))
        number = own_keys.shape[2]
        if self._dropping("key_value"):
            own_keys, own_values = (
                drop(own.expand(images, -1, -1, -1), self.dropout) for own in (own_keys, own_values)
            )
        own_keys, own_values = (per_row(own, rows, attention.windows) for own in (own_keys, own_values))
        bias = self.key_bias(layer, keys, number, before)
        if self._dropping("prompt"):
            mask = per_row(pad(self._whole(keys, images, number), (before, 0)), rows, attention.windows)
            bias = mask if bias is None else mask + bias
        return torch.cat([keys, own_keys], dim=2), torch.cat([values, own_values], dim=2), bias

    def _dropping(self, mode: str) -> bool:
        return self.training and self.dropout > 0.0 and self.dropout_mode == mode

    def key_bias(self, layer: int, keys: Tensor, number: int, before: int, after: int = 0) -> Tensor | None:
        """The bias on the logits: log α + g (less log n) on the own n columns, 0 on those before and behind them.

        (1, softmaxes or 1, 1, before + n + after), or None where all is 0; `keys` gives dtype and device.
        """
        opening = self.opening(layer)
        strength = self.at(layer)
        if strength == 1.0 and not self.log_bias and opening is None:
            return None
        odds = strength / number if self.log_bias else strength
        if opening is None:
            own = keys.new_full((1, 1, 1, number), math.log(odds))
        else:
            own = (opening + math.log(odds)).to(keys).view(1, -1, 1, 1).expand(-1, -1, -1, number)
            # Differential attention: two softmaxes, one behind the other, are of one head.
            own = own.repeat_interleave(max(1, keys.shape[1] // own.shape[1]), dim=1) if own.shape[1] > 1 else own
        return pad(own, (before, after))

    def _whole(self, keys: Tensor, images: int, number: int) -> Tensor:
        """−∞ for each key of each image with probability `dropout`: (B, 1, 1, n)."""
        dropped = torch.rand(images, 1, 1, number, device=keys.device) < self.dropout
        return torch.zeros_like(dropped, dtype=keys.dtype).masked_fill(dropped, -math.inf)


class FixedKeys(nn.Module):
    """Keys and values as constants, (sets, heads, n, head_dim): an `AttentionEdit` that projects nothing.

    `bias`, (sets, heads or 1, 1, n), is added to the logits of these keys; None where it is 0 for all.
    """

    on_all = False
    keys: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, keys: Tensor, values: Tensor, bias: Tensor | None) -> None:
        """Keeps copies of them."""
        super().__init__()
        for name, tensor in (("keys", keys), ("values", values), ("bias", bias)):
            self.register_buffer(name, None if tensor is None else tensor.detach().clone())

    def install(self, attention: OpenAttention) -> None:
        """Becomes a part of an attention module, and moves with it, for good."""
        attention.add_module(f"fixed_keys_{len(attention.edits)}", self)
        self._handle = attention.register_edit(self)  # kept: its number must stay taken, after unpickling, too

    @property
    def active(self) -> bool:
        """Always: one set is for all images."""
        return True

    def seen(self, images: int) -> Edited:
        """The keys, values and bias that the images of the present call see, 1 or B sets of them."""
        return self.keys, self.values, self.bias

    def forward(self, attention: OpenAttention, keys: Tensor, values: Tensor) -> Edited:
        """See `AttentionEdit.__call__`."""
        rows, _, before, _ = keys.shape
        own_keys, own_values, bias = self.seen(rows // attention.windows)
        own_keys, own_values = (per_row(own.to(keys), rows, attention.windows) for own in (own_keys, own_values))
        if bias is not None:
            bias = pad(bias.to(keys), (before, 0))
            if bias.shape[0] > 1:  # one for all is broadcast
                bias = per_row(bias, rows, attention.windows)
        return torch.cat([keys, own_keys], dim=2), torch.cat([values, own_values], dim=2), bias

    def complete(self, attention: OpenAttention, keys: Tensor, values: Tensor, bias: Tensor | None) -> None:
        """Nothing asks beside the sequence."""


def per_row(own: Tensor, rows: int, windows: int) -> Tensor:
    """Gives (1, ...) or (B, ...) of four dimensions to every window of each image: (rows, ...), rows is B · windows."""
    if own.shape[0] == 1:
        return own.expand(rows, -1, -1, -1)
    return own if windows == 1 else own.repeat_interleave(windows, dim=0)


def unstacked(name: str, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The inverse of `vpt.deltas.base.named_stack`: (n, dim) of each layer, from tensors by name, among others."""
    keys = [name, *(f"{name}.{index}" for index in range(len(tensors)))]
    return [matrix for key in keys if key in tensors for matrix in tensors[key]]


def affine_factors(rows: Tensor, width: int, what: str) -> tuple[Tensor, Tensor, Tensor]:
    """Writes rows (N, dim) as an affine map of narrower ones, by the singular value decomposition around their mean.

    Returns L (N, width), whose columns are orthonormal or 0, R (width, dim) and b (dim,) with rows = L R + b up to
    rounding, in double precision. Where L has a column of 0, so has R the row. A ConfigError where the rows span more
    than `width` dimensions, which are the argument `what`.
    """
    exact = rows.detach().double()
    mean = exact.mean(dim=0)
    left, scale, right = torch.linalg.svd(exact - mean, full_matrices=False)
    rounding = 8 * torch.finfo(rows.dtype).eps * exact.norm()
    if scale[width:].norm() > rounding:
        raise ConfigError(f"The {len(rows)} rows in the file span more than {what}={width} dimensions.")
    kept = scale[:width] > rounding / 8
    left, right = left[:, :width] * kept, (scale[:width] * kept).unsqueeze(1) * right[:width]
    missing = max(0, width - len(scale))
    return pad(left, (0, missing)), pad(right, (0, 0, 0, missing)), mean
