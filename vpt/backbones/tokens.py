"""Facts per timm family: where tokens enter the blocks and which tokens the pool reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vpt.backbones.attention import OpenAttention, open_attention
from vpt.errors import UnsupportedBackboneError


@dataclass(frozen=True)
class TokenLayout:
    """How a plain vision transformer lays out its token sequence.

    Attributes:
        blocks: The transformer blocks, in order.
        attentions: Their attention modules, opened.
        dim: Width of the tokens.
        num_prefix: Class, distillation and register tokens at the head of the sequence.
        grid: Patches (rows, columns).
        patch_size: (height, width) in pixels.
        pooled: How many tokens at the head of the sequence the pool reads; None if it reads patches too.
        has_class_token: Whether token 0 summarises the image.
    """

    blocks: list[nn.Module]
    attentions: list[OpenAttention]
    dim: int
    num_prefix: int
    grid: tuple[int, int]
    patch_size: tuple[int, int]
    pooled: int | None
    has_class_token: bool


class PooledBlock(Block):  # type: ignore[misc]  # timm is untyped
    """timm's pre-norm `Block` that lets only the tokens its attention answers for go on.

    Exact for the tokens that remain: a block mixes tokens only through keys and values (DESIGN decision 3).
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Runs the block.

        Args:
            x: Tokens (B, N, dim).
            attn_mask: Passed on to the attention.
            is_causal: Passed on to the attention.

        Returns:
            The first `attn.num_queries` tokens, or all of them if that is None: (B, n, dim).
        """
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = x[:, : self.attn.num_queries] + self.drop_path1(self.ls1(attended))
        return cast("Tensor", x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))))


def read_layout(model: nn.Module) -> TokenLayout:
    """Reads the layout of a timm model, opens its attention and trims its last block.

    Args:
        model: A timm model.

    Returns:
        The layout.

    Raises:
        UnsupportedBackboneError: The model, a block or an attention module is of a type whose equivalence with the
            concatenated form has not been shown.
    """
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        raise UnsupportedBackboneError(
            f"Prompts are not known to be exact on {type(model).__name__}; "
            "supported are timm's VisionTransformer and VisionTransformerDistilled."
        )
    blocks = list(cast("nn.Sequential", model.blocks))
    for index, block in enumerate(blocks):
        if type(block) not in (Block, PooledBlock):
            raise UnsupportedBackboneError(
                f"Prompts are not known to be exact on block {index}, a {type(block).__name__}; supported is Block."
            )
    vit = cast("VisionTransformer", model)
    attentions = [open_attention(cast("nn.Module", block.attn)) for block in blocks]
    distilled = isinstance(model, VisionTransformerDistilled)
    by_token = vit.attn_pool is None and vit.global_pool == "token"
    layout = TokenLayout(
        blocks=blocks,
        attentions=attentions,
        dim=int(vit.embed_dim),
        num_prefix=vit.num_prefix_tokens,
        grid=tuple(vit.patch_embed.grid_size),
        patch_size=tuple(vit.patch_embed.patch_size),
        pooled=(2 if distilled else 1) if by_token else None,
        has_class_token=vit.cls_token is not None,
    )
    if layout.pooled is not None:
        blocks[-1].__class__ = PooledBlock
        attentions[-1].num_queries = layout.pooled
    return layout
