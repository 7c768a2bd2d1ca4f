"""Facts per timm family: where tokens enter the blocks, which the pool reads, and a last block that keeps only these.

That is exact for the tokens that remain: a block mixes tokens only through keys and values, so the queries, the output
projection and the MLP of all others are dead work. Each such class is timm's own block, which runs as it is unless it
is told how many tokens to keep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, cast

from timm.models.beit import Beit
from timm.models.beit import Block as BeitBlock
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from vpt.backbones.attention.families import open_attention
from vpt.backbones.attention.softmax import WRITTEN_OUT
from vpt.backbones.attention.windows import patch_mergings
from vpt.backbones.attention_layout import AttentionLayout
from vpt.errors import UnsupportedBackboneError


@dataclass(frozen=True, kw_only=True)
class TokenLayout(AttentionLayout):
    """How a vision transformer lays out its tokens; `patches` counts them without class and register tokens.

    Attributes:
        num_prefix: Class, distillation and register tokens at the head of the sequence.
        grid: Patches (rows, columns).
        pooled: How many tokens at the head of the sequence the pool reads; None if it reads patches too.
        has_class_token: Whether token 0 summarises the image.
        mergings: What halves the map before a block, by the block's position.
    """

    num_prefix: int
    grid: tuple[int, int]
    pooled: int | None
    has_class_token: bool
    mergings: dict[int, nn.Module] = field(default_factory=dict)


class _PreNorm(nn.Module):
    def forward(self, x: Tensor, *args: Any, keep: int | None = None, **kwargs: Any) -> Tensor:
        """Runs the block on tokens (B, N, dim); only the first `keep` of them go on, None for all."""
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


# Exact types: a subclass may do anything.
SEQUENCES = (VisionTransformer, VisionTransformerDistilled, Eva, Beit)
WINDOWED = (SwinTransformer, SwinTransformerV2)
PRE_NORM = (Block, EvaBlock, BeitBlock, SwinTransformerBlock)
POST_NORM = (ResPostBlock, EvaBlockPostNorm, SwinTransformerV2Block)


def read_layout(model: nn.Module) -> TokenLayout:
    """Reads the layout of a timm model, opens its attention and prepares its last block for token dropping.

    An UnsupportedBackboneError where the model, a block or an attention module is of a type whose equivalence with the
    concatenated form has not been shown.
    """
    if type(model) in SEQUENCES:
        return _sequence(model)
    if type(model) in WINDOWED:
        return _windows(model)
    known = ", ".join(cls.__name__ for cls in (*SEQUENCES, *WINDOWED))
    raise UnsupportedBackboneError(
        f"The blocks of {type(model).__name__} are not known: linear, mlp_head, sidetune, bias, norm, ssf, partial, "
        "prompt_pad, full, and lora, dora, vera and adapters on layers by name take it; all other deltas take timm's "
        f"{known}."
    )


def _sequence(model: Any) -> TokenLayout:
    """Models whose blocks all see one sequence: [class and register tokens, patches]."""
    blocks = list(model.blocks)
    norms = [_entry(index, block) for index, block in enumerate(blocks)]
    other = {type(block.attn).__name__ for block in blocks if type(block.attn) in WRITTEN_OUT}
    if other:
        raise UnsupportedBackboneError(f"What {' and '.join(other)} does to each token is not known.")
    by_token = getattr(model, "attn_pool", None) is None and model.global_pool == "token"
    pooled = (2 if isinstance(model, VisionTransformerDistilled) else 1) if by_token else None
    layout = TokenLayout(
        blocks=blocks,
        attentions=[open_attention(block.attn) for block in blocks],
        norms=norms,
        dims=[int(model.embed_dim)] * len(blocks),
        patches=[math.prod(model.patch_embed.grid_size)] * len(blocks),
        num_prefix=int(model.num_prefix_tokens),
        grid=tuple(model.patch_embed.grid_size),
        patch_size=tuple(model.patch_embed.patch_size),
        pooled=pooled,
        has_class_token=model.cls_token is not None,
    )
    if pooled is not None:
        blocks[-1].__class__ = POOLED.get(type(blocks[-1]), type(blocks[-1]))
    return layout


def _windows(model: Any) -> TokenLayout:
    """Swin: blocks in stages, whose tokens attend within windows of a map that is halved between stages."""
    if model.patch_embed.strict_img_size is False:
        raise UnsupportedBackboneError(
            "Deltas within blocks need a Swin of fixed image size: build it without dynamic_img_size."
        )
    blocks = [block for stage in model.layers for block in stage.blocks]
    norms = [_entry(index, block) for index, block in enumerate(blocks)]
    return TokenLayout(
        blocks=blocks,
        attentions=[open_attention(block.attn, _count_windows(block)) for block in blocks],
        norms=norms,
        dims=[int(block.dim) for block in blocks],
        patches=[math.prod(block.input_resolution) for block in blocks],
        num_prefix=0,
        grid=tuple(blocks[-1].input_resolution),
        patch_size=tuple(model.patch_embed.patch_size),
        pooled=None,
        has_class_token=False,
        windowed=True,
        mergings=patch_mergings(model),
    )


def _entry(index: int, block: Any) -> nn.Module:
    kind = next((own for own, pooled in POOLED.items() if type(block) is pooled), type(block))
    if kind in PRE_NORM:
        return cast("nn.Module", block.norm1)
    if kind in POST_NORM:
        return nn.Identity()
    known = ", ".join(dict.fromkeys(cls.__name__ for cls in (*PRE_NORM, *POST_NORM)))
    raise UnsupportedBackboneError(
        f"Block {index} is a {type(block).__name__}, in which deltas are not known to be exact; known are {known}."
    )


def _count_windows(block: Any) -> int:
    sides = zip(block.input_resolution, block.window_size, strict=True)
    return math.prod(math.ceil(side / window) for side, window in sides)
