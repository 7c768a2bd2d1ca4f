"""Attention whose softmax timm writes out: queries, keys and values as timm makes them, in front of our own softmax."""

from __future__ import annotations

import math
from typing import Any, cast

import torch.nn.functional as F
from timm.layers.diff_attention import DiffAttention
from timm.models.cait import TalkingHeadAttn
from timm.models.crossvit import CrossAttention
from timm.models.gcvit import WindowAttentionGlobal
from timm.models.mvitv2 import MultiScaleAttention, cal_rel_pos_type, reshape_post_pool, reshape_pre_pool
from timm.models.swin_transformer_v2_cr import WindowMultiHeadAttention
from timm.models.tnt import Attention as TntAttention
from timm.models.volo import ClassAttention
from torch import Tensor, nn

from vpt.backbones.attention.base import OpenAttention, Parts, refuse_mask, split_heads, with_shift
from vpt.errors import UnsupportedBackboneError

Projected = tuple[Tensor, Tensor, Tensor]


class _Alone(OpenAttention):
    """The class token alone asks."""

    def prepare(self, x: Tensor) -> Parts:
        """See `OpenAttention`."""
        q, k, v = self.project(x)
        return q[:, :, :1], k, v, None


class OpenCross(_Alone, CrossAttention):  # type: ignore[misc]  # timm is untyped
    """CrossViT: the class token of one branch asks the patches of the other."""

    def project(self, x: Tensor) -> Projected:
        """See `OpenAttention`."""
        q, k, v = (split_heads(layer(x), self.num_heads) for layer in (self.wq, self.wk, self.wv))
        return q, k, v

    def width(self) -> int:
        """See `OpenAttention`."""
        return int(self.wk.in_features)


class OpenVoloClass(_Alone, ClassAttention):  # type: ignore[misc]  # timm is untyped
    """VOLO's last blocks."""

    def project(self, x: Tensor) -> Projected:
        """See `OpenAttention`."""
        k, v = (split_heads(part, self.num_heads) for part in self.kv(x).chunk(2, dim=-1))
        return split_heads(self.q(x), self.num_heads), k, v


class OpenTalkingHeads(OpenAttention, TalkingHeadAttn):  # type: ignore[misc]  # timm is untyped
    """CaiT: linear maps between heads before and behind the softmax.

    What is added to the logits of extra keys, a strength and a gate, is added where the softmax takes them. The map
    behind it has a bias, which gives every key a little weight: as the strength goes to 0 that of the extra ones stays.
    """

    def project(self, x: Tensor) -> Projected:
        """See `OpenAttention`."""
        return self._heads(self.qkv(x))

    def prepare(self, x: Tensor) -> Parts:
        """See `OpenAttention`."""
        return (*self.project(x), None)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float | None = None) -> Tensor:
        """See `OpenAttention`."""
        dropout = (self.attn_drop.p if self.training else 0.0) if dropout is None else dropout
        return F.dropout(self.shares(q, k, bias), dropout) @ v

    def shares(self, q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
        """See `OpenAttention`; rows sum to no more than the map behind the softmax lets them."""
        logits = _across(self.proj_l, (q * self.scale) @ k.transpose(-2, -1))
        return _across(self.proj_w, (logits if bias is None else logits + bias).softmax(dim=-1))


class OpenDifferential(OpenAttention, DiffAttention):  # type: ignore[misc]  # timm is untyped
    """Differential attention: two softmaxes of a head over the same values, one less λ times the other."""

    def project(self, x: Tensor) -> Projected:
        """See `OpenAttention`; values are there twice, (B, 2 · heads, n, 2 · head_dim)."""
        q, k, v = self.qkv(x).chunk(3, dim=2)
        q, k = (split_heads(part, 2 * self.num_heads) for part in (q, k))
        return self.q_norm(q), self.k_norm(k), split_heads(v, self.num_heads).repeat_interleave(2, dim=1)

    def prepare(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Parts:
        """See `OpenAttention`."""
        refuse_mask(attn_mask, is_causal)
        return (*self.project(x), None)

    def finish(self, x: Tensor, out: Tensor) -> Tensor:
        """See `OpenAttention`."""
        first, second = out.reshape(*out.shape[:2], self.num_heads, 2, -1).unbind(3)
        mixed = self.sub_norm(first - self._compute_lambda().type_as(out) * second) * (1 - self.lambda_init)
        return super().finish(x, self.norm(mixed.flatten(2)))

    def key_shape(self) -> tuple[int, int]:
        """See `OpenAttention`; an UnsupportedBackboneError, since keys and values differ in width."""
        raise UnsupportedBackboneError(
            "Differential attention has values of another width than keys: no prefix, and no temperature for each head."
        )


class OpenTnt(OpenAttention, TntAttention):  # type: ignore[misc]  # timm is untyped
    """TNT: pixels within a patch, and patches."""

    def project(self, x: Tensor) -> Projected:
        """See `OpenAttention`."""
        q, k = (split_heads(part, self.num_heads) for part in self.qk(x).chunk(2, dim=-1))
        return q, k, split_heads(self.v(x), self.num_heads)

    def prepare(self, x: Tensor) -> Parts:
        """See `OpenAttention`."""
        return (*self.project(x), None)

    def width(self) -> int:
        """See `OpenAttention`."""
        return int(self.qk.in_features)


class OpenGlobal(OpenAttention, WindowAttentionGlobal):  # type: ignore[misc]  # timm is untyped
    """GC ViT: windows that ask themselves, or are asked by the queries of the whole image."""

    def project(self, x: Tensor) -> Projected:
        """See `OpenAttention`; where the image asks, tokens without position have no queries: keys stand for them."""
        parts = [split_heads(part, self.num_heads) for part in self.qkv(x).chunk(2 if self.use_global else 3, dim=-1)]
        return parts[0], parts[-2], parts[-1]

    def prepare(self, x: Tensor, q_global: Tensor | None = None) -> Parts:
        """See `OpenAttention`."""
        q, k, v = self.project(x)
        if self.use_global and q_global is not None:
            asked = q_global.repeat_interleave(len(x) // len(q_global), dim=0)
            q = asked.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2)
        return q, k, v, self.rel_pos.get_bias()


class OpenSwinCr(OpenAttention, WindowMultiHeadAttention):  # type: ignore[misc]  # timm is untyped
    """Swin V2 of C. Reich: cosine attention and a bias from a small network; extra keys have none."""

    sdpa_scale = 1.0

    def project(self, x: Tensor) -> Projected:
        """See `OpenAttention`."""
        q, k, v = self._heads(self.qkv(x))
        scale = self.logit_scale.reshape(1, -1, 1, 1).clamp(max=math.log(100.0)).exp()
        return F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1), v

    def prepare(self, x: Tensor, mask: Tensor | None = None) -> Parts:
        """See `OpenAttention`."""
        return (*self.project(x), with_shift(self._relative_positional_encodings(), mask, x.shape[0]))


class OpenMultiScaleVit(OpenAttention, MultiScaleAttention):  # type: ignore[misc]  # timm is untyped
    """MViT v2: queries, keys and values of smaller maps, on maps whose positions add to the logits.

    A token of no position is treated as the class token is: no pool takes it, the norms behind the pools do.
    """

    def project(self, x: Tensor) -> Projected:
        """See `OpenAttention`."""
        parts = zip(self._heads(self.qkv(x)), (self.norm_q, self.norm_k, self.norm_v), strict=True)
        q, k, v = (part if norm is None else norm(part) for part, norm in parts)
        return q, k, v

    def prepare(self, x: Tensor, feat_size: list[int]) -> Parts:
        """See `OpenAttention`."""
        pools = (self.pool_q, self.pool_k, self.pool_v), (self.norm_q, self.norm_k, self.norm_v)
        found, sizes = [], []
        for part, pool, norm in zip(self._heads(self.qkv(x)), *pools, strict=True):
            size = feat_size
            if pool is not None:
                rows, token = reshape_pre_pool(part, feat_size, self.has_cls_token)
                part, size = reshape_post_pool(pool(rows), self.num_heads, token)
            found.append(part if norm is None else norm(part))
            sizes.append(size)
        q, k, v = found
        bias = None
        if self.rel_pos_type == "spatial":
            empty = q.new_zeros(*q.shape[:3], k.shape[2])
            bias = cal_rel_pos_type(empty, q, self.has_cls_token, *sizes[:2], self.rel_pos_h, self.rel_pos_w)
        return q, k, v, bias

    def forward(self, x: Tensor, feat_size: list[int], **_: Any) -> Any:  # type: ignore[override]
        """Also gives the size of the map that the queries are, as timm's does."""
        if not any(edit.active for edit in self.edits.values()):
            return cast("Any", super(OpenAttention, self)).forward(x, feat_size)
        q, k, v, bias = self.prepare(x, feat_size)
        k, v, bias = self.edited(k, v, bias)
        out = self.attend(q, k, v, bias, 0.0)
        out = out + q if self.residual_pooling else out
        size = feat_size if self.pool_q is None else self._pooled_size(feat_size)
        return self.proj(out.transpose(1, 2).flatten(2)), size

    def _pooled_size(self, feat_size: list[int]) -> list[int]:
        sides = zip(feat_size, self.pool_q.kernel_size, self.pool_q.stride, self.pool_q.padding, strict=True)
        return [(side + 2 * padding - kernel) // stride + 1 for side, kernel, stride, padding in sides]


def _across(layer: Any, weights: Tensor) -> Tensor:
    """Maps between heads, of (B, heads, queries, keys)."""
    return cast("Tensor", layer(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


WRITTEN_OUT: dict[type[nn.Module], type[OpenAttention]] = {
    ClassAttention: OpenVoloClass,
    CrossAttention: OpenCross,
    DiffAttention: OpenDifferential,
    MultiScaleAttention: OpenMultiScaleVit,
    TalkingHeadAttn: OpenTalkingHeads,
    TntAttention: OpenTnt,
    WindowAttentionGlobal: OpenGlobal,
    WindowMultiHeadAttention: OpenSwinCr,
}
