"""Everything that the figures of attention show, and how it changes with prompts, measured beside the model.

Exact: each number is read from the softmax that the fused path computes (`vpt.backbones.attention.recording`). On
Swin, windows are stitched back to the map of their block, the shift undone; the share that goes to padding is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vpt.argument_types import checked
from vpt.backbones import AttentionCall, Backbone, class_attention, extra_shares, recording
from vpt.backbones.attention.recording import summarise
from vpt.deltas.prompts.prompt import Prompt
from vpt.errors import ConfigError
from vpt.models import TunedModel

Array = NDArray[np.float32]

_BATCH = 16  # images at a time


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model or backbone and the deltas on it, which need not be parts of it, into eval mode, and each back."""
    backbone = cast("Backbone", model if isinstance(model, Backbone) else model.backbone)
    deltas = [part for part in backbone.attached if isinstance(part, nn.Module)]
    modes = {module: module.training for part in (model, *deltas) for module in part.modules()}
    try:
        for part in (model, *deltas):
            part.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def strength(model: TunedModel, alpha: float) -> Iterator[None]:
    """Gives a model the strength alpha, and then its own again."""
    before = model.strength
    model.set_strength(alpha)
    try:
        yield
    finally:
        model.set_strength(before)


@dataclass(frozen=True)
class LayerMaps:
    """Attention of one block; rows and columns are those of the block's own map.

    The subject is the class token, or all patches and the mean over them where there is none. Prompts are those in the
    sequence first, then extra keys in the order in which they were attached, keys of prefixes among them.

    Attributes:
        patches: The subject's attention to each patch, (B, heads, rows, columns).
        share: Part of the subject's attention that goes to prompts, (B, heads).
        patch_share: The same of the mean patch, (B, heads).
        uniform: That part if all keys got the same.
        to_prompts: Part of each patch's attention that goes to each prompt, mean over heads, (B, n, rows, columns).
        from_prompts: Part of each prompt's attention that goes to each patch, mean over heads, (B, m, rows, columns).
            The prompt asks with its own query, Q = W_q N(P) + b_q, in the concatenated form [tokens, prompts]. For deep
            prompts that query is dead: their outputs are discarded, and nothing that the model computes depends on it.
            On Swin a prompt asks in every window; this is the mean over the windows.
    """

    patches: Array
    share: Array
    patch_share: Array
    uniform: float
    to_prompts: Array
    from_prompts: Array

    @property
    def mass(self) -> Array:
        """Part of each patch's attention that goes to all prompts together, (B, rows, columns)."""
        total: Array = self.to_prompts.sum(axis=1)
        return total


@dataclass(frozen=True)
class AttentionMaps:
    """Attention of a model on some images, in `layers` first to last, and followed through all in `rollout`.

    `has_class_token` says whether the subject is the class token, also where the pool averages over patches and nothing
    reads it behind the last block; `dead_queries` that no prompt's query has any influence on the output, as of deep
    ones.
    """

    layers: list[LayerMaps]
    rollout: Rollout
    has_class_token: bool
    dead_queries: bool

    @property
    def subject(self) -> str:
        """Whose attention it is, for titles."""
        return "the class token" if self.has_class_token else "the mean patch (no class token)"

    def share(self, of_patches: bool = False) -> Array:
        """Part of the subject's attention, or the mean patch's, that goes to prompts: mean over images.

        (layers, heads) in [0, 1]; NaN where a layer has fewer heads than another.
        """
        return _table([(layer.patch_share if of_patches else layer.share).mean(axis=0) for layer in self.layers])

    def shares(self) -> PromptShares:
        """Of the class token, where there is one, and of the mean patch."""
        tables = {"of the class token": self.share()} if self.has_class_token else {}
        uniform = [layer.uniform for layer in self.layers]
        return PromptShares(tables | {"of the mean patch": self.share(of_patches=True)}, uniform)

    @property
    def strongest(self) -> int:
        """The block whose patches give the most of their attention to prompts, counted from 0."""
        return int(np.argmax([layer.patch_share.mean() for layer in self.layers]))


@dataclass(frozen=True)
class PromptShares:
    """Parts of attention that go to prompts, mean over images: `tables` (layers, heads) by whose it is.

    `uniform` is that part in each layer if all keys got the same.
    """

    tables: dict[str, Array]
    uniform: list[float]


@checked
@torch.no_grad()
def prompt_shares(model: TunedModel, images: Tensor) -> PromptShares:
    """Measures, in eval mode, what of its attention each block gives to prompts and prefixes, on any backbone.

    That of the class token and of the mean patch where tokens are known, else the mean over all that ask. An
    UnsupportedBackboneError where the attention cannot be read.
    """
    if model.backbone.has_layout:
        return attention_maps(model, images).shares()
    with evaluating(model):
        device = model.backbone.mean.device
        parts = [extra_shares(model.backbone, batch.to(device)) for batch in torch.split(images, _BATCH)]
    layers = [torch.cat([part[block].share for part in parts]) for block in range(len(parts[0]))]
    table = _table([_array(layer.mean(dim=0)) for layer in layers])
    return PromptShares({"of all that ask": table}, [layer.uniform for layer in parts[0]])


@checked
@torch.no_grad()
def attention_maps(model: TunedModel | Backbone, images: Tensor) -> AttentionMaps:
    """Measures attention in every block, in eval mode; every module's mode is put back, and nothing else is touched.

    Images are uint8 (B, 3, H, W), B ≥ 1. An UnsupportedBackboneError where the attention cannot be read.
    """
    backbone = model if isinstance(model, Backbone) else model.backbone
    if not len(images):
        raise ConfigError("Attention is measured on at least one image, got none.")
    with evaluating(model):
        parts = [_measure(backbone, batch.to(backbone.mean.device)) for batch in torch.split(images, _BATCH)]
    layers = [_join([part[0][block] for part in parts]) for block in range(len(parts[0][0]))]
    return AttentionMaps(
        layers=layers,
        rollout=Rollout(
            np.concatenate([part[1].patches for part in parts]), np.concatenate([part[1].prompts for part in parts], 1)
        ),
        has_class_token=backbone.layout.has_class_token,
        dead_queries=all(prompt.deep for prompt in _prompts(backbone)),
    )


def _measure(backbone: Backbone, images: Tensor) -> tuple[list[LayerMaps], Rollout]:
    with recording(backbone) as calls:
        backbone(images)
    layers, means = [], []
    for block, call in enumerate(calls):  # one block's weights at a time: 577 tokens and 24 blocks would need 8 GB
        weights = call.weights()
        layers.append(_layer(backbone, block, call, weights))
        means.append(weights.mean(dim=1))
    return layers, rollout(calls, means, backbone.layout.pooled)


def _join(parts: list[LayerMaps]) -> LayerMaps:
    joined = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("patches", "share", "patch_share", "to_prompts", "from_prompts")
    }
    return LayerMaps(uniform=parts[0].uniform, **joined)


def _layer(backbone: Backbone, block: int, call: AttentionCall, weights: Tensor) -> LayerMaps:
    start, tokens, places = call.first_patch, call.tokens, call.places
    prompts = torch.cat([weights[..., call.num_prefix : start], weights[..., tokens:]], dim=-1)[:, :, start:tokens]
    own = [weights[:, :, call.num_prefix : start]]
    asked = (call.as_called(prompt.queries, block) for prompt in _prompts(backbone))
    own += [call.weights_of(queries) for queries in asked if queries is not None]
    from_prompts = torch.cat([part[..., start:tokens].mean(dim=1) for part in own], dim=1)
    subject = summarise(call, weights, backbone.layout.has_class_token)
    patches = summarise(call, weights, False)
    return LayerMaps(
        patches=_array(subject.patches.unflatten(-1, places.grid)),  # type: ignore[no-untyped-call]
        share=_array(subject.prompts.sum(dim=-1)),
        patch_share=_array(patches.prompts.sum(dim=-1)),
        uniform=subject.prompts.shape[-1] / subject.keys,
        to_prompts=_array(places.stitch(prompts.mean(dim=1).transpose(1, 2))),
        from_prompts=_array(places.stitch(from_prompts) / places.windows),
    )


def _prompts(backbone: Backbone) -> list[Prompt]:
    return [part for part in backbone.attached if isinstance(part, Prompt)]


def _table(parts: Sequence[Array]) -> Array:
    """(..., heads) of each layer as one table; a Swin's later stages have more heads."""
    width = max(part.shape[-1] for part in parts)
    table: Array = np.full((len(parts), *parts[0].shape[:-1], width), np.nan, dtype=np.float32)
    for row, part in zip(table, parts, strict=True):
        row[..., : part.shape[-1]] = part
    return table


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().float().cpu().numpy()
    return array


@dataclass(frozen=True)
class Rollout:
    """How much of what the pool reads is from patches, (B, rows, columns), and each block's prompts, (layers, B)."""

    patches: Array
    prompts: Array


def rollout(calls: Sequence[AttentionCall], weights: Sequence[Tensor], pooled: int | None) -> Rollout:
    """Follows attention from the pool to the first block, given the weights of each call, (rows, queries, keys).

    These are means over heads. The pool reads the first `pooled` tokens; None stands for the mean over the patches, and
    for a pool by attention (SigLIP's).
    """
    last = calls[-1]
    images = len(weights[-1]) // last.places.windows
    head = weights[-1].new_zeros(images, last.first_patch)
    patches = weights[-1].new_zeros(images, *last.places.grid)
    if pooled is None:
        patches += 1 / patches[0].numel()
    else:
        head[:, :pooled] = 1 / pooled
    ended = []
    for call, own in zip(reversed(calls), reversed(weights), strict=True):
        places, start, tokens = call.places, call.first_patch, call.tokens
        row = torch.cat([head.repeat_interleave(places.windows, dim=0), places.cut(_spread(patches, places.grid))], 1)
        flow = torch.einsum("rq,rqk->rk", row, own) / 2
        flow[:, :tokens] += row / 2
        to_prompts = flow[:, call.num_prefix : start].sum(dim=1) + flow[:, tokens:].sum(dim=1)
        ended.append(to_prompts.view(images, -1).sum(dim=1))
        flow[:, call.num_prefix : start] = 0
        head, patches = flow[:images, :start], places.stitch(flow[:, start:tokens])
    prompts = torch.stack(ended[::-1])
    return Rollout(patches.float().cpu().numpy(), prompts.float().cpu().numpy())


def _spread(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """What four patches were merged into goes to each of them in equal parts."""
    if patches.shape[1:] == grid:
        return patches
    four = patches.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2) / 4
    return four[:, : grid[0], : grid[1]]


@dataclass(frozen=True)
class PromptAttention:
    """Attention of the class token (of the mean patch where there is none) with and without prompts.

    Attributes:
        without: (B, rows, columns), last block at strength 0, mean over heads, relative to uniform: 1 everywhere if
            all patches got the same.
        with_prompts: The same at strength 1.
        share: (layers, B, heads) in [0, 1], the part of each layer's attention that prompts take at strength 1; NaN
            where a layer has fewer heads than another.
        uniform: (layers,), what that part would be if all tokens, prompts included, got the same.
        guesses: Most likely class and its probability at strength 0 and 1 for each image: two lists of (class, p).
    """

    without: Array
    with_prompts: Array
    share: Array
    uniform: Array
    guesses: tuple[list[tuple[int, float]], list[tuple[int, float]]]


def has_prompts(model: TunedModel) -> bool:
    """Whether any part of a model's delta is a `Prompt`."""
    return model.delta is not None and any(isinstance(part, Prompt) for part in model.delta.parts)


@torch.no_grad()
def measure_attention(model: TunedModel, images: Tensor) -> PromptAttention:
    """Runs images, uint8 (B, 3, H, W), through a model at strength 0 and 1; mode and strength are put back.

    A ConfigError for a model without prompts, an UnsupportedBackboneError where attention cannot be read.
    """
    if not has_prompts(model):
        raise ConfigError("The model has no prompts, so there is nothing to compare.")
    images = images.to(model.backbone.mean.device)
    layers, guesses = [], []
    for alpha in (0.0, 1.0):
        with evaluating(model), strength(model, alpha):
            layers.append(class_attention(model.backbone, images))
            chances, classes = model(images).softmax(dim=1).max(dim=1)
            guesses.append(list(zip(classes.tolist(), chances.tolist(), strict=True)))
    seen = [layer[-1].patches.float().mean(dim=1) for layer in layers]
    maps = [_array((own / own.mean(dim=1, keepdim=True)).reshape(-1, *model.backbone.layout.grid)) for own in seen]
    return PromptAttention(
        without=maps[0],
        with_prompts=maps[1],
        share=_table([_array(layer.prompts.sum(dim=2)) for layer in layers[1]]),
        uniform=np.array([layer.prompts.shape[2] / layer.keys for layer in layers[1]], dtype=np.float32),
        guesses=(guesses[0], guesses[1]),
    )
