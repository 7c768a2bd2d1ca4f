"""Last blocks in which only the tokens that the pool reads go on (DESIGN decision 3).

Exact for the tokens that remain: a block mixes tokens only through keys and values, so the queries, the output
projection and the MLP of all others are dead work. Each class is timm's own block, which runs as it is unless it is
told how many tokens to keep.
"""

from __future__ import annotations

from typing import Any, cast

from timm.models.beit import Block as BeitBlock
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn


class _PreNorm(nn.Module):
    def forward(self, x: Tensor, *args: Any, keep: int | None = None, **kwargs: Any) -> Tensor:
        """Runs the block.

        Args:
            x: Tokens (B, N, dim).
            *args: What timm passes on to the attention.
            keep: Only the first so many tokens go on; None for all.
            **kwargs: What timm passes on to the attention.

        Returns:
            (B, keep or N, dim).
        """
        if keep is None:
            return cast("Tensor", super().forward(x, *args, **kwargs))  # timm's, next in line
        block = cast("Any", self)
        attended, mlp = block.attn(block.norm1(x), *args, keep=keep, **kwargs), block.mlp
        x = x[:, :keep] + block.drop_path1(self._scaled(1, attended))
        return cast("Tensor", x + block.drop_path2(self._scaled(2, mlp(block.norm2(x)))))

    def _scaled(self, part: int, x: Tensor) -> Tensor:
        """EVA and BEiT keep the factor of a branch as a parameter, which may be None."""
        gamma = getattr(self, f"gamma_{part}")
        return x if gamma is None else gamma * x


class _PostNorm(nn.Module):
    def forward(self, x: Tensor, *args: Any, keep: int | None = None, **kwargs: Any) -> Tensor:
        """See `_PreNorm`."""
        if keep is None:
            return cast("Tensor", super().forward(x, *args, **kwargs))
        block = cast("Any", self)
        x = x[:, :keep] + block.drop_path1(block.norm1(block.attn(x, *args, keep=keep, **kwargs)))
        return cast("Tensor", x + block.drop_path2(block.norm2(block.mlp(x))))


class PooledBlock(_PreNorm, Block):  # type: ignore[misc]  # timm is untyped
    """ViT, DeiT, DINOv2, CLIP, SigLIP."""

    def _scaled(self, part: int, x: Tensor) -> Tensor:
        return cast("Tensor", getattr(self, f"ls{part}")(x))


class PooledEva(_PreNorm, EvaBlock):  # type: ignore[misc]  # timm is untyped
    """EVA, EVA-02, DINOv3, ViT-RoPE."""


class PooledBeit(_PreNorm, BeitBlock):  # type: ignore[misc]  # timm is untyped
    """BEiT."""


class PooledResPost(_PostNorm, ResPostBlock):  # type: ignore[misc]  # timm is untyped
    """ViT with norms behind the branches."""


class PooledEvaPost(_PostNorm, EvaBlockPostNorm):  # type: ignore[misc]  # timm is untyped
    """EVA with norms behind the branches."""


POOLED: dict[type[nn.Module], type[nn.Module]] = {
    Block: PooledBlock,
    EvaBlock: PooledEva,
    BeitBlock: PooledBeit,
    ResPostBlock: PooledResPost,
    EvaBlockPostNorm: PooledEvaPost,
}
