"""Attention that is opened where timm calls `scaled_dot_product_attention`: extra keys and values enter at that call.

All before it (windows, positions, pooled queries, smaller maps of keys) and all behind it stays timm's own code, so a
class says only what tokens of no position, (B, n, dim), are as keys and values.

Where timm makes a smaller map of keys from the tokens (PVT, Twins, Next-ViT), a token of no position stands for a patch
of that map whose tokens are all equal to it, as one stands for four in the patch merging of a Swin.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers.attention2d import Attention2d as MobileAttention2d
from timm.layers.attention2d import MultiQueryAttention2d
from timm.models.cait import ClassAttn
from timm.models.davit import WindowAttention as DaVitAttention
from timm.models.fastvit import Attention as FastVitAttention
from timm.models.gemma4_vit import Gemma4Attention
from timm.models.hiera import MaskUnitAttention
from timm.models.hieradet_sam2 import MultiScaleAttention
from timm.models.maxxvit import Attention2d, AttentionCl
from timm.models.metaformer import Attention as MetaFormerAttention
from timm.models.nest import Attention as NestAttention
from timm.models.nextvit import EfficientAttention
from timm.models.pvt_v2 import Attention as PvtAttention
from timm.models.tiny_vit import Attention as TinyVitAttention
from timm.models.twins import GlobalSubSampleAttn, LocallyGroupedAttn
from timm.models.visformer import Attention as VisformerAttention
from timm.models.vision_transformer import ParallelScalingBlock
from timm.models.vision_transformer_relpos import RelPosAttention
from timm.models.vision_transformer_sam import Attention as SamAttention
from timm.models.volo import Attention as VoloAttention
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vpt.backbones.attention.base import OpenAttention, per_head, split_heads
from vpt.backbones.attention.layers_of_maps import as_map, constant_map
from vpt.errors import UnsupportedBackboneError

Projected = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values of tokens without position, (B, heads, n, head_dim)."""


class OpenCall(OpenAttention):
    """Attention whose one call of `scaled_dot_product_attention` sees the extra keys and values.

    Where timm's queries have five dimensions, `window_dim` is that of the windows.
    """

    window_dim = 1

    @property
    def fused_attn(self) -> bool:
        """Whether timm calls it: always where there is something to add."""
        return super().fused_attn or any(edit.active for edit in self.edits.values())

    @fused_attn.setter
    def fused_attn(self, fused: bool) -> None:
        self.fusible = self.fusible_with_edits = fused

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Runs timm's own code, with the extra keys and values if there are any; shapes are timm's."""
        timm = cast("Any", super(OpenAttention, self))
        if not any(edit.active for edit in self.edits.values()):
            return cast("Tensor", timm.forward(x, *args, **kwargs))
        with _Call(self):
            return cast("Tensor", timm.forward(x, *args, **kwargs))

    def attend_edited(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        """Attends from queries (rows, heads, n, head_dim) to keys and values with the extra ones behind them."""
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
        if mask is not None:
            mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
        k, v, bias = self.edited(k, v, mask)
        return self.attend(q, k, v, bias, dropout)

    def key_shape(self) -> tuple[int, int]:
        """See `OpenAttention`."""
        proj = self.proj
        channels = proj.in_channels if isinstance(proj, nn.Conv2d) else proj.in_features
        return int(self.num_heads), int(channels) // int(self.num_heads)


class _Call(TorchFunctionMode):
    """While it is open, the fused call of one attention module is `OpenCall.attend_edited`."""

    def __init__(self, attention: OpenCall) -> None:
        super().__init__()
        self.attention = attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self.attend(*args, **(kwargs or {}))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """As the function that it stands for; what is no row of heads becomes one: windows (5-D), heads (3-D)."""
        if is_causal or scale not in (None, self.attention.sdpa_scale):
            raise UnsupportedBackboneError("Deltas within blocks know no causal attention and no other scale here.")
        heads = self.attention.num_heads
        if q.ndim == 3:
            mask = None if attn_mask is None else _apart(attn_mask, heads)
            rows = _apart(q, heads), _apart(k, heads), _apart(v, heads)
            return self.attention.attend_edited(*rows, mask, dropout_p).flatten(0, 1)
        if q.ndim == 4:
            return self.attention.attend_edited(q, k, v, attn_mask, dropout_p)
        windows = self.attention.window_dim
        q, k, v = (x.movedim(windows, 1) for x in (q, k, v))
        out = self.attention.attend_edited(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn_mask, dropout_p)
        return out.reshape(*q.shape[:2], *out.shape[1:]).movedim(1, windows)


def _apart(rows: Tensor, heads: int) -> Tensor:
    """(B · heads, ...) to (B, heads, ...)."""
    return rows.reshape(-1, heads, *rows.shape[1:])


class _Fused(OpenCall):
    """One layer `qkv` for queries, keys and values, one behind the other, in each of them head by head."""

    def project(self, x: Tensor) -> Projected:
        """See `OpenAttention`."""
        return self._heads(self.qkv(x))


class _Normed(_Fused):
    """And a norm of each query and key."""

    def project(self, x: Tensor) -> Projected:
        """See `OpenAttention`."""
        q, k, v = super().project(x)
        return self.q_norm(q), self.k_norm(k), v


class OpenRelPos(_Normed, RelPosAttention):  # type: ignore[misc]  # timm is untyped
    """ViT with a bias or a small network of relative positions; extra keys have none."""


class OpenSam(_Normed, SamAttention):  # type: ignore[misc]  # timm is untyped
    """SAM's ViT: whole maps or windows, relative positions that depend on the query, or rotary embeddings."""


class OpenLocal(_Fused, LocallyGroupedAttn):  # type: ignore[misc]  # timm is untyped
    """Twins: within windows."""


class OpenDaVit(_Fused, DaVitAttention):  # type: ignore[misc]  # timm is untyped
    """DaViT: within windows; its other half attends over channels and takes no keys."""


class OpenNest(_Fused, NestAttention):  # type: ignore[misc]  # timm is untyped
    """NesT: within blocks of the image."""

    window_dim = 2


class OpenVolo(_Fused, VoloAttention):  # type: ignore[misc]  # timm is untyped
    """VOLO's transformer stages; its outlook attention has no keys."""


class OpenMetaFormer(_Fused, MetaFormerAttention):  # type: ignore[misc]  # timm is untyped
    """CAFormer's later stages."""


class OpenFastVit(_Fused, FastVitAttention):  # type: ignore[misc]  # timm is untyped
    """FastViT's last stages, on maps (B, dim, H, W)."""


class OpenHieraDet(_Fused, MultiScaleAttention):  # type: ignore[misc]  # timm is untyped
    """SAM 2's Hiera: windows, and queries that are pooled between stages."""


class OpenHiera(_Fused, MaskUnitAttention):  # type: ignore[misc]  # timm is untyped
    """Hiera: mask units, and queries that are pooled between stages."""

    window_dim = 2

    @property
    def num_heads(self) -> int:
        """Timm's `heads`."""
        return int(self.heads)


class OpenVisformer(OpenCall, VisformerAttention):  # type: ignore[misc]  # timm is untyped
    """Visformer: convolutions of one pixel on maps (B, dim, H, W)."""

    def project(self, x: Tensor) -> Projected:
        """See `OpenAttention`."""
        return self._heads(as_map(self.qkv, x))


class _HeadFirst(OpenCall):
    """MaxViT and CoAtNet, whose one layer has queries, keys and values of each head together, or as `_Fused`."""

    def _split(self, qkv: Tensor) -> Projected:
        if not self.head_first:
            return self._heads(qkv)
        q, k, v = split_heads(qkv, self.num_heads).chunk(3, dim=-1)
        return q, k, v


class OpenMaxViT(_HeadFirst, AttentionCl):  # type: ignore[misc]  # timm is untyped
    """MaxViT: windows and grids; extra keys have no relative position."""

    def project(self, x: Tensor) -> Projected:
        """See `OpenAttention`."""
        return self._split(self.qkv(x))


class OpenCoAtNet(_HeadFirst, Attention2d):  # type: ignore[misc]  # timm is untyped
    """CoAtNet, and MaxViT on maps (B, dim, H, W); extra keys have no relative position."""

    def project(self, x: Tensor) -> Projected:
        """See `OpenAttention`."""
        return self._split(as_map(self.qkv, x))


class OpenTinyViT(OpenCall, TinyVitAttention):  # type: ignore[misc]  # timm is untyped
    """TinyViT: windows with a bias of relative positions, a norm of its own, all of a head together."""

    def project(self, x: Tensor) -> Projected:
        """See `OpenAttention`."""
        qkv = split_heads(self.qkv(self.norm(x)), self.num_heads)
        q, k, v = cast("Any", qkv).split([self.key_dim, self.key_dim, self.val_dim], dim=-1)
        return q, k, v


class _Reduced(OpenCall):
    """Keys and values of a smaller map, one behind the other in `kv`."""

    def project(self, x: Tensor) -> Projected:
        """See `OpenAttention`."""
        q, reduced = self._split(self.q(x)), self._reduced(x)
        k, v = (self._split(part) for part in self.kv(reduced).chunk(2, dim=-1))
        return q, k, v

    def _reduced(self, x: Tensor) -> Tensor:
        return x if self.sr is None else cast("Tensor", self.norm(constant_map(self.sr, x)))

    def _split(self, x: Tensor) -> Tensor:
        return split_heads(x, self.num_heads)


class OpenPvt(_Reduced, PvtAttention):  # type: ignore[misc]  # timm is untyped
    """PVT v2: a strided convolution, or a pool before a convolution of one pixel and an activation."""

    def _reduced(self, x: Tensor) -> Tensor:
        reduced = super()._reduced(x)
        return reduced if self.act is None else cast("Tensor", self.act(reduced))


class OpenTwins(_Reduced, GlobalSubSampleAttn):  # type: ignore[misc]  # timm is untyped
    """Twins: a strided convolution."""


class OpenNextViT(_Reduced, EfficientAttention):  # type: ignore[misc]  # timm is untyped
    """Next-ViT: an average and a batch norm."""

    def project(self, x: Tensor) -> Projected:
        """See `OpenAttention`."""
        reduced = x if self.sr is None else self.norm(x.transpose(1, 2)).transpose(1, 2)
        return self._split(self.q(x)), self._split(self.k(reduced)), self._split(self.v(reduced))


class OpenClassAttn(OpenCall, ClassAttn):  # type: ignore[misc]  # timm is untyped
    """CaiT's and PiT's last blocks, in which the class token alone asks."""

    def project(self, x: Tensor) -> Projected:
        """See `OpenAttention`."""
        q, k, v = (split_heads(layer(x), self.num_heads) for layer in (self.q, self.k, self.v))
        return q, k, v


class OpenGemma(OpenCall, Gemma4Attention):  # type: ignore[misc]  # timm is untyped
    """Gemma 4: norms of queries, keys and values, no other scale; extra keys are not rotated."""

    sdpa_scale = 1.0

    def project(self, x: Tensor) -> Projected:
        """See `OpenAttention`."""
        pairs = ((self.q_proj, self.q_norm), (self.k_proj, self.k_norm), (self.v_proj, self.v_norm))
        q, k, v = (norm(layer(x).unflatten(-1, (-1, self.head_dim))).transpose(1, 2) for layer, norm in pairs)
        return q, per_head(q, k), per_head(q, v)

    def width(self) -> int:
        """See `OpenAttention`."""
        return int(self.q_proj.linear.in_features)

    def output_weight(self) -> Tensor:
        """See `OpenAttention`."""
        return cast("Tensor", self.o_proj.linear.weight)

    def key_shape(self) -> tuple[int, int]:
        """See `OpenAttention`; timm repeats the keys of a group of heads before its call."""
        return int(self.num_heads), int(self.head_dim)


class OpenParallel(OpenCall, ParallelScalingBlock):  # type: ignore[misc]  # timm is untyped
    """A block of ViT-22B, whose attention and MLP have one first layer; its norm is within."""

    def project(self, x: Tensor) -> Projected:
        """See `OpenAttention`."""
        _, *parts = self.in_proj(self.in_norm(x)).split(self.in_split, dim=-1)
        q, k, v = (split_heads(part, self.num_heads) for part in parts)
        return self.q_norm(q), self.k_norm(k), v

    def width(self) -> int:
        """See `OpenAttention`."""
        return int(self.in_proj.in_features)

    def output_weight(self) -> Tensor:
        """See `OpenAttention`."""
        return cast("Tensor", (self.attn_out_proj if self.out_proj is None else self.out_proj).weight)

    def key_shape(self) -> tuple[int, int]:
        """See `OpenAttention`."""
        return int(self.num_heads), int(self.head_dim)


class OpenMobile(_HeadFirst, MobileAttention2d):  # type: ignore[misc]  # timm is untyped
    """MobileNetV4's hybrids: as CoAtNet, without positions."""

    def project(self, x: Tensor) -> Projected:
        """See `OpenAttention`."""
        return self._split(as_map(self.qkv, x))


class OpenMultiQuery(OpenCall, MultiQueryAttention2d):  # type: ignore[misc]  # timm is untyped
    """MobileNetV4's hybrids: one head of keys for all queries, on maps (B, dim, H, W) that may be reduced."""

    def project(self, x: Tensor) -> Projected:
        """See `OpenAttention`."""
        q = split_heads(as_map(self.query.proj, x), self.num_heads)
        k, v = (self._one_head(layers, x) for layers in (self.key, self.value))
        return q, k, v

    def _one_head(self, layers: Any, x: Tensor) -> Tensor:
        if hasattr(layers, "down_conv"):
            x = as_map(layers.norm, constant_map(layers.down_conv, x))
        return as_map(layers.proj, x).unsqueeze(1)

    def width(self) -> int:
        """See `OpenAttention`."""
        return int(self.query.proj.in_channels)

    def output_weight(self) -> Tensor:
        """See `OpenAttention`."""
        return cast("Tensor", self.output.proj.weight)

    def key_shape(self) -> tuple[int, int]:
        """See `OpenAttention`."""
        return 1, int(self.key_dim)


CALLS: dict[type[nn.Module], type[OpenCall]] = {
    cls.__mro__[cls.__mro__.index(OpenAttention) + 1]: cls
    for cls in (
        OpenRelPos,
        OpenSam,
        OpenLocal,
        OpenDaVit,
        OpenNest,
        OpenVolo,
        OpenMetaFormer,
        OpenFastVit,
        OpenHieraDet,
        OpenHiera,
        OpenVisformer,
        OpenMaxViT,
        OpenCoAtNet,
        OpenTinyViT,
        OpenPvt,
        OpenTwins,
        OpenNextViT,
        OpenClassAttn,
        OpenGemma,
        OpenParallel,
        OpenMobile,
        OpenMultiQuery,
    )
}
