"""Attention that accepts extra keys and values, one small class per timm attention family.

The classes are timm's own modules with another `forward`: opening a module swaps its class in place, so parameter
names, hooks and references stay as they are.

Prompts have no position: rotary embeddings leave them unrotated, relative position biases and shift masks are 0 for
them, and in windowed attention every window of an image sees the prompts of that image.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat, use_fused_attn
from timm.layers.attention import Attention, AttentionRope
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.swin_transformer import WindowAttention
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from torch import Tensor, nn

from vpt.backbones.attention.base import OpenAttention, Parts, refuse_mask, with_shift
from vpt.backbones.attention.sdpa import CALLS
from vpt.backbones.attention.softmax import WRITTEN_OUT
from vpt.errors import UnsupportedBackboneError


class _Gated(OpenAttention):
    """What `Attention`, `AttentionRope` and `EvaAttention` do behind the heads: an inner norm, a gate, a projection."""

    def finish(self, x: Tensor, out: Tensor) -> Tensor:
        """See `OpenAttention`."""
        out = self.norm(out)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return super().finish(x, out)


class OpenViT(_Gated, Attention):  # type: ignore[misc]  # timm is untyped
    """timm's standard attention: ViT, DeiT, DINOv2, CLIP, SigLIP."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `OpenAttention`."""
        q, k, v = self._heads(self.qkv(x))
        return self.q_norm(q), self.k_norm(k), v

    def prepare(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Parts:
        """See `OpenAttention`."""
        refuse_mask(attn_mask, is_causal)
        return (*self.project(x), None)


class _Rotary(_Gated):
    """Rotary position embeddings: all tokens that stand for patches turn, class tokens and prompts do not."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `OpenAttention`."""
        if self.qkv is not None:
            q, k, v = self._heads(self._fused(x))
        else:
            q, k, v = (
                part(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
                for part in (self.q_proj, self.k_proj, self.v_proj)
            )
        return self.q_norm(q), self.k_norm(k), v

    def _fused(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.qkv(x))

    def prepare(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Parts:
        """See `OpenAttention`."""
        refuse_mask(attn_mask, is_causal)
        q, k, v = self.project(x)
        if rope is not None:
            q, k = (self._turn(part, rope).type_as(v) for part in (q, k))
        return q, k, v, None

    def _turn(self, part: Tensor, rope: Tensor) -> Tensor:
        still = part.shape[2] - rope.shape[-2]  # also shallow prompts, which follow the class token
        turned = apply_rot_embed_cat(part[:, :, still:], rope, half=self.rotate_half)
        return torch.cat([part[:, :, :still], turned], dim=2)


class OpenRope(_Rotary, AttentionRope):  # type: ignore[misc]  # timm is untyped
    """Rotary attention with ordinary biases: DINOv3, ViT-RoPE; also with fewer key heads than query heads."""


class OpenEva(_Rotary, EvaAttention):  # type: ignore[misc]  # timm is untyped
    """EVA and EVA-02: no bias on keys, queries, keys and values fused or apart."""

    def _fused(self, x: Tensor) -> Tensor:
        return _with_bias(self, self.qkv(x))


class OpenBeit(OpenAttention, BeitAttention):  # type: ignore[misc]  # timm is untyped
    """BEiT: no bias on keys, a relative position bias of the block or shared by all."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `OpenAttention`."""
        return self._heads(_with_bias(self, self.qkv(x)))

    def prepare(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Parts:
        """See `OpenAttention`."""
        bias = None if shared_rel_pos_bias is None else shared_rel_pos_bias.unsqueeze(0)
        if self.relative_position_bias_table is not None:
            own = self._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        if bias is not None and (inserted := x.shape[1] - bias.shape[-1]):
            bias = _without_position(bias, inserted)
        return (*self.project(x), bias)


class OpenWindow(OpenAttention, WindowAttention):  # type: ignore[misc]  # timm is untyped
    """Swin: a relative position bias within windows, and a mask where windows were shifted."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `OpenAttention`."""
        return self._heads(self.qkv(x))

    def prepare(self, x: Tensor, mask: Tensor | None = None) -> Parts:
        """See `OpenAttention`."""
        return (*self.project(x), with_shift(self._get_rel_pos_bias(), mask, x.shape[0]))


class OpenWindowV2(OpenAttention, WindowAttentionV2):  # type: ignore[misc]  # timm is untyped
    """Swin V2: cosine attention with a learned scale and a relative position bias from a small network."""

    sdpa_scale = 1.0

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `OpenAttention`."""
        q, k, v = self._heads(_with_bias(self, self.qkv(x)))
        scale = self.logit_scale.clamp(max=math.log(100.0)).exp()
        return F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1), v

    def prepare(self, x: Tensor, mask: Tensor | None = None) -> Parts:
        """See `OpenAttention`."""
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        bias = 16 * table[self.relative_position_index].permute(2, 0, 1).sigmoid().unsqueeze(0)
        return (*self.project(x), with_shift(bias, mask, x.shape[0]))


OPEN: dict[type[nn.Module], type[OpenAttention]] = {
    Attention: OpenViT,
    AttentionRope: OpenRope,
    EvaAttention: OpenEva,
    BeitAttention: OpenBeit,
    WindowAttention: OpenWindow,
    WindowAttentionV2: OpenWindowV2,
    **CALLS,
    **WRITTEN_OUT,
}


def open_attention(attention: nn.Module, windows: int = 1) -> OpenAttention:
    """Opens a timm attention module of a type in `OPEN` in place; one that is open already stays as it is.

    An image has `windows` consecutive rows of a batch. An UnsupportedBackboneError where the type is not known.
    """
    if not isinstance(attention, OpenAttention):
        family = OPEN.get(type(attention))
        if family is None:
            raise UnsupportedBackboneError(
                f"Deltas within blocks do not know attention of type {type(attention).__name__}: `vpt backbones "
                "--prompts` lists the models whose attention is known."
            )
        fusible = attention.__dict__.pop("fused_attn", True)
        attention.__class__ = family
        attention.fusible = fusible
        attention.fusible_with_edits = bool(fusible or (family is OpenWindow and use_fused_attn()))  # type: ignore[assignment]
        attention.edits = OrderedDict()  # type: ignore[assignment]
        attention.windows = windows  # type: ignore[assignment]
        if hasattr(attention, "qkv_bias_separate"):
            # With False timm reads the layer's weight past the layer, and hooks on it, such as LoRA's, never run.
            attention.qkv_bias_separate = True  # type: ignore[assignment]
    return cast("OpenAttention", attention)


def _with_bias(attention: Any, qkv: Tensor) -> Tensor:
    """Adds the biases that BEiT, EVA and Swin V2 keep beside their fused layer: none on keys."""
    if attention.q_bias is None:
        return qkv
    return qkv + torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))


def _without_position(bias: Tensor, inserted: int) -> Tensor:
    """Opens a bias (1, heads, N, N) behind the class token for tokens that have no position: rows and columns of 0."""
    blank = bias.new_zeros(*bias.shape[:2], inserted, bias.shape[3])
    rows = torch.cat([bias[:, :, :1], blank, bias[:, :, 1:]], dim=2)
    columns = rows.new_zeros(*rows.shape[:3], inserted)
    return torch.cat([rows[..., :1], columns, rows[..., 1:]], dim=3)
