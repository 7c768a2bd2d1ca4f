"""What a delta does inside an attention module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from vpt.backbones.attention import OpenAttention


class AttentionEdit(Protocol):
    """What a delta does to the keys and values of one attention module."""

    @property
    def active(self) -> bool:
        """Whether it changes anything now; where no edit does, timm's own code runs."""

    def __call__(self, attention: OpenAttention, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Changes keys and values.

        Args:
            attention: The module that calls, so that a delta can use its projections.
            keys: (B, heads, K, head_dim); B counts images times windows.
            values: (B, heads, K, head_dim).

        Returns:
            Keys and values with any extra ones appended behind the given ones, and a bias to add to the attention
            logits, broadcastable to (B, heads, queries, keys after the edit), or None for no bias.
        """

    def complete(self, attention: OpenAttention, keys: Tensor, values: Tensor, bias: Tensor | None) -> None:
        """Called when all edits have been made, for what asks the same keys beside the sequence.

        Args:
            attention: The module that calls.
            keys: All of them, (B, heads, K, head_dim).
            values: Likewise.
            bias: The sum of all edits' biases, broadcastable to (B, heads, queries, K), or None.
        """
