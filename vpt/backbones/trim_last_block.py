"""Last blocks in which only the tokens that the pool reads go on (DESIGN decision 3).

Exact for the tokens that remain: a block mixes tokens only through keys and values, so the queries, the output
projection and the MLP of all others are dead work. Each class is timm's own block with another `forward`.
"""

from __future__ import annotations

from typing import Any, cast

from timm.models.beit import Beit
from timm.models.beit import Block as BeitBlock
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn


class _PreNorm(nn.Module):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the block.

        Args:
            x: Tokens (B, N, dim).
            *args: What timm passes on to the attention.
            **kwargs: Likewise.

        Returns:
            The first `attn.num_queries` tokens, or all of them if that is None: (B, n, dim).
        """
        block = cast("Any", self)
        attended, mlp = block.attn(block.norm1(x), *args, **kwargs), block.mlp
        x = x[:, : block.attn.num_queries] + block.drop_path1(self._scaled(1, attended))
        return cast("Tensor", x + block.drop_path2(self._scaled(2, mlp(block.norm2(x)))))

    def _scaled(self, part: int, x: Tensor) -> Tensor:
        """EVA and BEiT keep the factor of a branch as a parameter, which may be None."""
        gamma = getattr(self, f"gamma_{part}")
        return x if gamma is None else gamma * x


class _PostNorm(nn.Module):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See `_PreNorm`."""
        block = cast("Any", self)
        x = x[:, : block.attn.num_queries] + block.drop_path1(block.norm1(block.attn(x, *args, **kwargs)))
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


class Trimmable(nn.Module):
    """A model of such a last block. It is trimmed where only the pool's features are asked for, and nowhere else.

    The last block keeps what it was told until the next forward pass, so that activation checkpointing, which runs it
    again in the backward pass, finds it as it was.
    """

    pooled_tokens: int

    def trim_last(self, trimmed: bool) -> None:
        """Tells the last block what is wanted of it.

        Args:
            trimmed: Only the tokens that the pool reads.
        """
        cast("Any", self).blocks[-1].attn.num_queries = self.pooled_tokens if trimmed else None

    def features_for_pool(self, x: Tensor) -> Tensor:
        """What timm's `forward_features` gives, as far as the pool reads it.

        Args:
            x: Normalised images, (B, 3, H, W).

        Returns:
            (B, pooled tokens, dim).
        """
        self.trim_last(True)
        return cast("Tensor", super().forward_features(x))  # type: ignore[misc]

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """timm's, with all tokens."""
        self.trim_last(False)
        return cast("Tensor", super().forward_features(x, *args, **kwargs))  # type: ignore[misc]

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """timm's, with all tokens."""
        self.trim_last(False)
        return super().forward_intermediates(x, *args, **kwargs)  # type: ignore[misc]


class TrimmableViT(Trimmable, VisionTransformer):  # type: ignore[misc]  # timm is untyped
    """ViT, DeiT-3, DINOv2, CLIP."""


class TrimmableDistilled(Trimmable, VisionTransformerDistilled):  # type: ignore[misc]  # timm is untyped
    """DeiT with a distillation token."""


class TrimmableEva(Trimmable, Eva):  # type: ignore[misc]  # timm is untyped
    """EVA, DINOv3, ViT-RoPE."""


class TrimmableBeit(Trimmable, Beit):  # type: ignore[misc]  # timm is untyped
    """BEiT."""


TRIMMABLE: dict[type[nn.Module], type[Trimmable]] = {
    VisionTransformer: TrimmableViT,
    VisionTransformerDistilled: TrimmableDistilled,
    Eva: TrimmableEva,
    Beit: TrimmableBeit,
}

POOLED: dict[type[nn.Module], type[nn.Module]] = {
    Block: PooledBlock,
    EvaBlock: PooledEva,
    BeitBlock: PooledBeit,
    ResPostBlock: PooledResPost,
    EvaBlockPostNorm: PooledEvaPost,
}
