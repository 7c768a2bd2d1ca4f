"""Attention that accepts extra keys and values, one small class per timm attention family.

A deep visual prompt acts on the image only through the keys and values it contributes (DESIGN decision 1), so opening
timm's attention to extra keys and values is all that deep prompts need. The classes below are timm's own modules with
another `forward`: opening a module swaps its class in place, so parameter names, hooks and references stay as they are.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from torch import Tensor, nn

from vpt.errors import UnsupportedBackboneError


class AttentionEdit(Protocol):
    """What a delta does to the keys and values of one attention module."""

    def __call__(self, attention: OpenAttention, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Changes keys and values.

        Args:
            attention: The module that calls, so that a delta can use its projections.
            keys: (B, heads, K, head_dim).
            values: (B, heads, K, head_dim).

        Returns:
            Keys and values with any extra ones appended behind the given ones, and a bias to add to the attention
            logits, broadcastable to (B, heads, queries, keys after the edit), or None for no bias.
        """


class OpenAttention(Attention):  # type: ignore[misc]  # timm is untyped
    """timm's `Attention` with a list of edits to its keys and values, and with optional trimming of its queries.

    Attributes:
        edits: Applied in order; with none (and no trimming) timm's own code runs.
        num_queries: Only the first so many tokens ask; None lets all of them.
    """

    edits: list[AttentionEdit]
    num_queries: int | None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projects tokens to queries, keys and values.

        Args:
            x: Tokens after the block's norm, (B, N, dim).

        Returns:
            Queries, keys and values of shape (B, heads, N, head_dim), query and key norms applied.
        """
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def edited(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Runs all edits.

        Args:
            keys: (B, heads, N, head_dim).
            values: (B, heads, N, head_dim).

        Returns:
            Keys, values (B, heads, N + extra, head_dim) and the summed bias of all edits, or None.
        """
        total: Tensor | None = None
        for edit in self.edits:
            keys, values, bias = edit(self, keys, values)
            if total is not None:
                total = F.pad(total, (0, keys.shape[2] - total.shape[3]))
            if bias is not None:
                total = bias if total is None else total + bias
        return keys, values, total

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attends from the tokens to the tokens and the extra keys.

        Args:
            x: Tokens after the block's norm, (B, N, dim).
            attn_mask: Only without edits: timm's mask.
            is_causal: Only without edits.

        Returns:
            (B, num_queries or N, dim).

        Raises:
            UnsupportedBackboneError: A mask is given together with edits.
        """
        if not self.edits and self.num_queries is None:
            return cast("Tensor", super().forward(x, attn_mask=attn_mask, is_causal=is_causal))
        if attn_mask is not None or is_causal:
            raise UnsupportedBackboneError("Extra keys and values cannot be combined with an attention mask.")
        q, k, v = self.project(x)
        k, v, bias = self.edited(k, v)
        dropout = self.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(q[:, :, : self.num_queries], k, v, attn_mask=bias, dropout_p=dropout)
        out = self.norm(out.transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x[:, : self.num_queries]).sigmoid()
        return cast("Tensor", self.proj_drop(self.proj(out)))

    def weights(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """The attention weights, computed in the open beside the fused path.

        Args:
            x: Tokens after the block's norm, (B, N, dim).
            num_queries: Only for the first so many tokens; None for all.

        Returns:
            (B, heads, queries, N + extra), rows sum to 1. Keys of the sequence come first, extra keys last.
        """
        q, k, v = self.project(x)
        k, _, bias = self.edited(k, v)
        logits = (q[:, :, :num_queries] * self.scale) @ k.transpose(-2, -1)
        return cast("Tensor", (logits if bias is None else logits + bias).softmax(dim=-1))


OPEN: dict[type[nn.Module], type[OpenAttention]] = {Attention: OpenAttention}


def open_attention(attention: nn.Module) -> OpenAttention:
    """Opens a timm attention module in place.

    Args:
        attention: A module whose exact type is in `OPEN`, or one that is open already.

    Returns:
        The same object.

    Raises:
        UnsupportedBackboneError: Its type is not known to give the exact function.
    """
    if not isinstance(attention, OpenAttention):
        family = OPEN.get(type(attention))
        if family is None:
            known = ", ".join(sorted(cls.__name__ for cls in OPEN))
            raise UnsupportedBackboneError(
                f"Attention of type {type(attention).__name__} cannot take prompts; supported are {known}."
            )
        attention.__class__ = family
        opened = cast("OpenAttention", attention)
        opened.edits = []
        opened.num_queries = None
    return cast("OpenAttention", attention)


def log_bias(strength: float, like: Tensor) -> Tensor:
    """The attention-logit bias that scales the odds of attending to a key by `strength`.

    Args:
        strength: α in (0, 1).
        like: Gives dtype and device.

    Returns:
        A scalar tensor log α (facts: attention odds λ/(1-λ) scale by α).
    """
    return torch.as_tensor(strength, dtype=like.dtype, device=like.device).log()
