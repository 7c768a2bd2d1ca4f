"""Attention that is looked at: what each attention module was given, and from it the exact weights, beside the model.

Nothing in the model changes: a hook keeps the arguments of timm's own call, and the weights are computed from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from vpt.argument_types import checked
from vpt.backbones.attention.base import OpenAttention
from vpt.backbones.attention.windows import Places, window_places
from vpt.backbones.compilation import eagerly
from vpt.backbones.factory import Backbone

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of one attention module; a row is an image, or in Swin a window of one.

    Keys are in the order [prefix tokens, shallow prompts, patches, extra keys]; queries likewise without extra keys.
    `places` is where the patches lie, `num_prefix` counts class, distillation and register tokens, `args` and `kwargs`
    came with the call, and `context` is where it was made, with what belonged to that call of the backbone.
    """

    backbone: Backbone
    attention: OpenAttention
    places: Places
    num_prefix: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    context: Context = field(default_factory=copy_context)

    def as_called(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Calls a function that reads what belonged to the call, such as tokens that run beside a Swin's map."""
        with self.backbone.computing():
            return self.context.copy().run(function, *args, **kwargs)

    @property
    def tokens(self) -> int:
        """Tokens of the sequence, which are also keys."""
        return int(self.args[0].shape[1])

    @property
    def first_patch(self) -> int:
        """The first token that is a patch; between it and the prefix lie shallow prompts."""
        return self.tokens - self.places.area

    @torch.no_grad()
    def weights(self, num_queries: int | None = None) -> Tensor:
        """Softmax weights of the first tokens, None for all: (rows, heads, queries, tokens + extra keys)."""
        return self.as_called(self.attention.weights, num_queries, *self.args, **self.kwargs)

    @torch.no_grad()
    def weights_of(self, queries: Tensor) -> Tensor:
        """The weights of what asks from outside the sequence: neither a position bias nor a shift mask holds for it.

        Queries of (1 or B, heads, n, head_dim) give (rows, heads, n, tokens + extra keys).
        """
        _, keys, values, _ = self.as_called(self.attention.prepare, *self.args, **self.kwargs)
        keys, _, bias = self.as_called(self.attention.edited, keys, values, None)
        if queries.shape[0] > 1:
            queries = queries.repeat_interleave(self.places.windows, dim=0)
        return self.attention.shares(queries, keys, bias)


@checked
@contextmanager
def recording(backbone: Backbone) -> Iterator[list[AttentionCall]]:
    """Keeps every call of the blocks' attention while it is open, in a list that grows by a call a block, in order.

    An UnsupportedBackboneError where the backbone's attention cannot be read.
    """
    layout, calls = backbone.layout, list[AttentionCall]()
    with ExitStack() as stack:
        stack.enter_context(eagerly())
        for block, attention in enumerate(layout.attentions):
            places = window_places(layout.blocks[block]) if layout.windowed else Places(layout.grid, layout.grid)
            keep = partial(_keep, backbone, calls, places, layout.num_prefix)
            stack.enter_context(attention.register_forward_pre_hook(keep, with_kwargs=True))
        yield calls


def _keep(
    backbone: Backbone, calls: list[AttentionCall], places: Places, prefix: int, attention: Any, args: Any, kwargs: Any
) -> None:
    given = {key: value for key, value in kwargs.items() if key != "keep"}  # all that ask are looked at
    calls.append(AttentionCall(backbone, attention, places, prefix, args, given))


@dataclass(frozen=True)
class LayerAttention:
    """Attention of one block, from the class token, or averaged over all patches where there is none.

    To class, distillation and register tokens, `prefix` (B, heads, prefix tokens); to `patches` of the block's own map
    in row-major order, (B, heads, rows · columns); to `prompts`, (B, heads, n), n = 0 without prompts or at strength 0.
    They are shares of one softmax: over their last dimensions they sum to 1, less what goes to the padding of a Swin
    whose windows do not fit its map. A query sees `keys` keys, prompts included.
    """

    prefix: Tensor
    patches: Tensor
    prompts: Tensor
    keys: int


@checked
@torch.no_grad()
def class_attention(backbone: Backbone, images: Tensor) -> list[LayerAttention]:
    """Records the attention of every block, first to last, in one forward pass of images as `Backbone` takes them.

    An UnsupportedBackboneError where the backbone's attention cannot be read.
    """
    with recording(backbone) as calls:
        backbone(images)
    queries = 1 if backbone.layout.has_class_token else None
    return [summarise(call, call.weights(queries), queries is not None) for call in calls]


def summarise(call: AttentionCall, weights: Tensor, by_token: bool) -> LayerAttention:
    """Reads the summarising token's attention from the weights (rows, heads, queries, keys) of a call.

    Token 0 summarises the image if `by_token`, and only its weights are needed; else the mean over its patches.
    """
    start, tokens, places = call.first_patch, call.tokens, call.places
    if by_token:
        weights = weights[:, :, 0]
    else:
        # Padding asks too, but nobody hears the answer.
        real = places.cut(weights.new_ones(1, *places.grid)).repeat(len(weights) // places.windows, 1)
        weights = torch.einsum("rhqk,rq->rhk", weights[:, :, start:tokens], real) / real[: places.windows].sum()
    whole = weights.unflatten(0, (-1, places.windows)).sum(dim=1)  # type: ignore[no-untyped-call]
    return LayerAttention(
        prefix=whole[..., : call.num_prefix],
        patches=places.stitch(weights[..., start:tokens]).flatten(-2),
        prompts=torch.cat([whole[..., call.num_prefix : start], whole[..., tokens:]], dim=-1),
        keys=weights.shape[-1],
    )


@dataclass(frozen=True)
class ExtraShare:
    """Attention of one module on extra keys: mean over all that ask, (B, heads), and that if all keys got the same."""

    share: Tensor
    uniform: float


@checked
@torch.no_grad()
def extra_shares(backbone: Backbone, images: Tensor) -> list[ExtraShare]:
    """Measures the attention on extra keys in every block that attends, in one forward pass.

    Read where queries meet all keys, so that neither tokens nor maps need be known. Where several softmaxes make a head
    (differential attention) each is one; a map between heads behind the softmax (CaiT) counts. An
    UnsupportedBackboneError where the backbone's attention is not known.
    """
    found = dict[OpenAttention, ExtraShare]()
    attentions = backbone.attention_layout.attentions
    with ExitStack() as stack:
        stack.enter_context(eagerly())
        for attention in attentions:
            stack.enter_context(_measuring(attention, len(images), found))
        backbone(images)
    none = ExtraShare(images.new_zeros(len(images), 1, dtype=torch.float32), 0.0)
    return [found.get(attention, none) for attention in attentions]


@contextmanager
def _measuring(attention: OpenAttention, images: int, found: dict[OpenAttention, ExtraShare]) -> Iterator[None]:
    """Reads what an attention module attends to beside its own keys, where an edit adds some."""
    changed, attend, own = attention._changed, attention.attend, list[int]()

    def counted(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        own[:] = [keys.shape[2]]
        return changed(keys, values)

    def measured(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float | None = None) -> Tensor:
        share = attention.shares(q, k, bias)[..., own[0] :].sum(dim=-1).mean(dim=-1)
        by_image = share.float().reshape(images, -1, share.shape[1]).mean(dim=1)
        found[attention] = ExtraShare(by_image, 1 - own[0] / k.shape[2])
        return attend(q, k, v, bias, dropout)

    instance = attention.__dict__
    instance["_changed"], instance["attend"] = counted, measured
    try:
        yield
    finally:
        del instance["_changed"], instance["attend"]
