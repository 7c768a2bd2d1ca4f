"""timm's forward pass block by block, so that a call can say what belongs to it alone.

That is, which tokens the last block keeps, and which run beside a Swin's map; nothing of it is kept on a module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextvars import copy_context
from typing import Any, Protocol, cast

import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vpt.backbones.attention.windows import block_beside, merge_tokens
from vpt.backbones.token_layout import TokenLayout

BlockInputs = list[dict[str, Any]]
"""What each block is given besides the tokens, such as rotary embeddings."""


class Attached(Protocol):
    """What a delta part, which may put tokens beside the map of a Swin, is to its backbone.

    `first_block` blocks lie before all that it changes; `pools` says if the pool reads its tokens with the map,
    `reads_tokens` if it makes pooled features of its own of all final tokens of the patches.
    """

    first_block: int
    pools: bool

    @property
    def reads_tokens(self) -> bool:
        """Whether `pool` is asked."""

    def pool(self, tokens: Tensor, pooled: Tensor) -> Tensor:
        """Features, (B, num_features), of final tokens (B, patches, dim), and of those that the backbone pools."""

    @property
    def beside_strength(self) -> float:
        """α in [0, 1] of the tokens that it puts beside the map."""

    def joining(self, block: int, images: int) -> Tensor | None:
        """The tokens, (B, n, dim), that it puts beside the map of B images before a block; None for none."""


def embed(model: Any, images: Tensor) -> tuple[Tensor, BlockInputs]:
    """What timm of a known layout does with normalised images (B, 3, H, W) before the first block.

    Returns tokens (B, N, dim), or a map (B, H, W, dim) on a Swin, and what each block is given besides.
    """
    x = model.patch_embed(images)
    if isinstance(model, Eva):
        x, rope = cast("Any", model)._pos_embed(x)
        return cast("Any", model).norm_pre(x), _ropes(model, rope)
    if isinstance(model, Beit):
        tower = cast("Any", model)
        x = torch.cat((tower.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        return tower.pos_drop(x if tower.pos_embed is None else x + tower.pos_embed), block_inputs(model)
    if hasattr(model, "layers"):
        return x, block_inputs(model)
    return model.norm_pre(model.patch_drop(model._pos_embed(x))), block_inputs(model)


def block_inputs(model: Any) -> BlockInputs:
    """What each block is given besides the tokens where all patches of an image are there."""
    if isinstance(model, Eva):
        rope = cast("Any", model).rope
        if rope is None:
            return _ropes(model, None)
        known = getattr(rope, "feat_shape", None) is not None
        return _ropes(
            model, rope.get_embed() if known else rope.get_embed(shape=cast("Any", model).patch_embed.grid_size)
        )
    if isinstance(model, Beit):
        shared = cast("Any", model).rel_pos_bias
        bias = None if shared is None else shared()
        return [{"shared_rel_pos_bias": bias}] * len(cast("Any", model).blocks)
    stages = getattr(model, "layers", [model])
    return [{}] * sum(len(stage.blocks) for stage in stages)


def _ropes(model: Any, rope: Tensor | None) -> BlockInputs:
    by_block = rope is not None and getattr(model, "rope_mixed", False)
    return [{"rope": rope[block] if by_block and rope is not None else rope} for block in range(len(model.blocks))]


def run_blocks(
    model: nn.Module,
    layout: TokenLayout,
    x: Tensor,
    given: BlockInputs,
    blocks: range,
    parts: Iterable[Attached] = (),
    keep: int | None = None,
) -> tuple[Tensor, Mapping[Attached, Tensor]]:
    """Runs successive blocks, with activation checkpointing where timm's `set_grad_checkpointing` asks for it.

    From tokens or map x before the first to those behind the last, and the tokens beside it that the pool reads, (B, n,
    dim). `given` is `block_inputs` for all blocks of the model, `parts` may put tokens beside the map, and only the
    first `keep` tokens leave the model's last block; None for all.
    """
    last, run = len(layout.blocks) - 1, checkpointed if _wants_checkpoints(model) else _plain
    beside: dict[Attached, Tensor] = {}
    for index in blocks:
        block = layout.blocks[index]
        if index in layout.mergings:
            x = layout.mergings[index](x)
            beside = {part: merge_tokens(layout.mergings[index], tokens) for part, tokens in beside.items()}
        for part in parts:
            if (tokens := part.joining(index, x.shape[0])) is not None:
                beside[part] = tokens
        if beside:
            onward = [part for part in beside if part.pools or index < last]
            x, beside = run(block_beside, block, x, beside, onward)
        else:
            x = run(block, x, **given[index], **({"keep": keep} if keep is not None and index == last else {}))
    return x, beside


def _wants_checkpoints(model: nn.Module) -> bool:
    stages = getattr(model, "layers", [model])
    return torch.is_grad_enabled() and any(stage.grad_checkpointing for stage in stages)


def _plain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In a context of its own, so that nothing that is set within a block outlives it, however it ends."""
    if torch.compiler.is_compiling():
        return function(*args, **kwargs)
    return copy_context().run(function, *args, **kwargs)


def checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Keeps nothing but what it returns: it runs again for the backward pass, in the context of this call."""
    context = copy_context()

    def again(*args: Any, **kwargs: Any) -> Any:
        return context.copy().run(function, *args, **kwargs)

    return checkpoint(again, *args, use_reentrant=False, **kwargs)
