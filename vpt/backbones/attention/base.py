"""Attention that accepts extra keys and values.

A deep visual prompt acts on the image only through the keys and values it contributes, so opening timm's attention to
extra ones is all that deep prompts need. The families are in `vpt.backbones.attention.families`.

Shapes: x are tokens as the block hands them over, (B, N, dim), where B counts images times windows; q, k, v are (B,
heads, n, head_dim), with K keys, of which there may be fewer heads; a bias is added to the logits, broadcastable to (B,
heads, queries, K), and None stands for 0. ``*args`` and ``**kwargs`` are what timm's `forward` takes besides x.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vpt.errors import UnsupportedBackboneError


class AttentionEdit(Protocol):
    """What a delta does to the keys and values of one attention module."""

    @property
    def active(self) -> bool:
        """Whether it changes anything now; where no edit does, timm's own code runs."""

    @property
    def on_all(self) -> bool:
        """Whether it acts on the keys of all others, too: such edits run behind the others."""

    def __call__(self, attention: OpenAttention, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Appends keys and values behind the given ones (B, heads, K, head_dim), or changes these, and adds a bias.

        `attention` is the module that calls, so that a delta can use its projections.
        """

    def complete(self, attention: OpenAttention, keys: Tensor, values: Tensor, bias: Tensor | None) -> None:
        """Called after all edits, with all keys, values and summed biases, for what asks beside the sequence."""


Parts = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Queries, keys, values of (B, heads, N, head_dim), and a bias on the logits, (1 or B, heads, N, N) or None."""


class OpenAttention(nn.Module):
    """An attention module with edits to its keys and values, and with optional trimming of its queries.

    `edits`, by the id of their handles, apply in order, those that act on all keys last; where none is active (and
    nothing is trimmed) timm's own code runs. `windows` consecutive rows of a batch belong to one image. `fusible` says
    whether timm would call PyTorch's fused attention, `fusible_with_edits` whether we may: timm leaves it to us in a
    Swin, whose own code does not.
    """

    edits: OrderedDict[int, AttentionEdit]
    windows: int
    fusible: bool
    fusible_with_edits: bool
    sdpa_scale: float | None = None  # of the logits; None for 1/√head_dim

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Timm's own attributes, which are untyped."""

    @property
    def fused_attn(self) -> bool:
        """Whether timm's own code calls PyTorch's fused attention: where timm wants it and it is not slow."""
        return self.fusible and not self._fused_is_slow()

    @fused_attn.setter
    def fused_attn(self, fused: bool) -> None:
        self.fusible = self.fusible_with_edits = fused

    def register_edit(self, edit: AttentionEdit) -> RemovableHandle:
        """Adds an edit behind those that are there; the handle takes it off, as that of `register_forward_hook`."""
        handle = RemovableHandle(self.edits)
        self.edits[handle.id] = edit
        return handle

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projects tokens to q, k and v without regard to their positions, query and key norms applied."""
        raise NotImplementedError

    def prepare(self, x: Tensor, *args: Any, **kwargs: Any) -> Parts:
        """Projects the sequence, gives it its positions, and says the bias on the logits."""
        raise NotImplementedError

    def finish(self, x: Tensor, out: Tensor) -> Tensor:
        """Projects what the heads have gathered, (B, n, heads · head_dim), for the tokens x that ask: (B, n, dim)."""
        return cast("Tensor", self.proj_drop(self.proj(out)))

    def width(self) -> int:
        """The channels of the tokens that it is given."""
        named = (getattr(self, name, None) for name in ("qkv", "q_proj", "q"))
        layer: Any = next(layer for layer in named if layer is not None)
        return int(layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features)

    def output_weight(self) -> Tensor:
        """The weight of the projection behind the heads, for its device and dtype."""
        return cast("Tensor", self.proj.weight)

    def key_shape(self) -> tuple[int, int]:
        """The heads that have keys of their own, and the channels of a head."""
        heads = int(self.num_heads)
        return int(getattr(self, "num_kv_heads", heads)), int(self.proj.in_features) // heads

    def edited(self, keys: Tensor, values: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Runs all active edits: keys and values (B, heads, N + extra, head_dim), and the summed bias."""
        keys, values, changes = self._changed(keys, values)
        return keys, values, _sum(bias, changes, keys.shape[2])

    def _changed(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values, and the summed bias of the edits alone."""
        changes: Tensor | None = None
        for on_all in (False, True):
            for edit in self.edits.values():
                if edit.active and edit.on_all is on_all:
                    keys, values, change = edit(self, keys, values)
                    changes = _sum(changes, change, keys.shape[2])
        return keys, values, changes

    def forward(self, x: Tensor, *args: Any, keep: int | None = None, **kwargs: Any) -> Tensor:
        """Attends from the tokens to the tokens and the extra keys: (B, keep or N, dim).

        Only the first `keep` ask, None for all. An UnsupportedBackboneError for a user's mask together with edits.
        """
        if keep is None and not any(edit.active for edit in self.edits.values()):
            return cast("Tensor", super().forward(x, *args, **kwargs))  # timm's, next in line
        q, k, v, bias = self.prepare(x, *args, **kwargs)
        k, v, changes = self._changed(k, v)
        for edit in self.edits.values():
            if edit.active:
                edit.complete(self, k, v, changes)
        bias = _sum(bias, changes, k.shape[2])
        q = q[:, :, :keep]
        if bias is not None and bias.shape[2] > 1:
            bias = bias[:, :, :keep]
        if torch.is_grad_enabled():
            q = q.contiguous()  # a view would keep the projection of all tokens, keys and values too, for the backward
        out = self.attend(q, k, v, bias)
        return self.finish(x[:, :keep], out.transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float | None = None) -> Tensor:
        """Softmax attention, (B, heads, n, head_dim), with dropout of the weights, None for the module's own."""
        if dropout is None:
            dropout = self.attn_drop.p if self.training else 0.0
        if not self.fusible_with_edits or self._fused_is_slow():
            return F.dropout(self.shares(q, k, bias), dropout) @ per_head(q, v)
        k, v = per_head(q, k), per_head(q, v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=self.sdpa_scale)

    def weights(self, num_queries: int | None, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The attention weights of the first tokens, None for all, computed in the open beside the fused path.

        (B, heads, queries, N + extra), rows sum to 1. Keys of the sequence come first, extra keys last.
        """
        q, k, v, bias = self.prepare(x, *args, **kwargs)
        k, _, bias = self.edited(k, v, bias)
        if bias is not None and bias.shape[2] > 1:
            bias = bias[:, :, :num_queries]
        return self.shares(q[:, :, :num_queries], k, bias)

    def shares(self, q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
        """The weights that `attend` multiplies the values with, (B, heads, n, K); rows sum to 1."""
        scale = q.shape[-1] ** -0.5 if self.sdpa_scale is None else self.sdpa_scale
        logits = (q * scale) @ per_head(q, k).transpose(-2, -1)
        return (logits if bias is None else logits + bias).softmax(dim=-1)

    def _fused_is_slow(self) -> bool:
        """In bfloat16 on a CPU, where a step with products errs no more (`python -m benchmarks.attention`)."""
        weight = self.output_weight()
        mixed = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
        return bool(weight.device.type == "cpu" and mixed == torch.bfloat16)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, 3 · heads · head_dim) as queries, keys and values of (B, heads, N, head_dim)."""
        batch, tokens, channels = qkv.shape
        split = qkv.reshape(batch, tokens, 3, self.num_heads, channels // (3 * self.num_heads))
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v


def _sum(one: Tensor | None, other: Tensor | None, columns: int) -> Tensor | None:
    """Adds two biases on the logits; either may be missing or end before the last columns."""
    given = [F.pad(bias, (0, columns - bias.shape[3])) for bias in (one, other) if bias is not None]
    return None if not given else sum(given[1:], start=given[0])


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, n, heads · head_dim) to (B, heads, n, head_dim)."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def refuse_mask(mask: Tensor | None, is_causal: bool) -> None:
    """An UnsupportedBackboneError where a user's mask comes together with edits."""
    if mask is not None or is_causal:
        raise UnsupportedBackboneError("Deltas within blocks cannot be combined with an attention mask.")


def with_shift(bias: Tensor, mask: Tensor | None, rows: int) -> Tensor:
    """Adds the mask of shifted windows, (windows, N, N), to a bias (1, heads, N, N) for all rows of a batch."""
    if mask is None:
        return bias
    return (bias + mask.unsqueeze(1)).repeat(rows // mask.shape[0], 1, 1, 1)


def per_head(q: Tensor, k: Tensor) -> Tensor:
    """Repeats the keys or values of a group of heads for each of its heads."""
    groups = q.shape[1] // k.shape[1]
    return k if groups == 1 else k.repeat_interleave(groups, dim=1)
