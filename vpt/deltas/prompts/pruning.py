"""Pruned prompts: tokens that are gone, segments of the others that are 0, and how much each of them matters.

E²VPT (Han et al., "E²VPT: An Effective and Efficient Approach for Visual Prompt Tuning", ICCV 2023, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType

import torch
from torch import Tensor, nn

from vpt.deltas.base import Shape, pick, stack
from vpt.errors import ConfigError

KEPT, PRUNED = "x", "."
PROBES: ContextVar[Mapping[nn.Module, Sequence[Tensor]]] = ContextVar("masks at 1", default=MappingProxyType({}))
"""While the gradient of masks is taken: those of each layer, (B, n, segments), by the prompts that they are of."""


class Mask(nn.Module):
    """Which prompts of each layer are left, and which segments of these.

    What trains of a layer are the segments that are left, (segments left, dim / segments); all others are 0, and a
    token of which none is left is absent. Where all others are whole, that is (tokens left, dim).

    Attributes:
        shapes: Of the prompts that are left, (tokens, dim) for each layer.
        stored: Of what trains of them, for each layer.
    """

    def __init__(self, words: Sequence[str], shapes: Sequence[Shape], like: Tensor) -> None:
        """Reads a text for each layer: a word for each of its prompts, a letter for each segment.

        The letters are ``x`` for what is left and ``.`` for what is pruned; `shapes` are (n, dim) before pruning. A
        ConfigError where the words are others than these, or a layer would have none left.
        """
        super().__init__()
        if len(words) != len(shapes):
            raise ConfigError(f"mask has {len(words)} lines for {len(shapes)} layers with prompts.")
        lines = [line.split() for line in words]
        if len({len(word) for line in lines for word in line}) != 1 or {*"".join(words)} - {KEPT, PRUNED, " "}:
            raise ConfigError(
                "mask has a word of x and . for each prompt, a letter for each of its segments, of which all prompts "
                "have as many, e.g. 'xxxx xx.. ....'."
            )
        if prunes_whole(words):
            lines = [[word[:1] for word in line] for line in lines]
        self.segments = max(len(word) for line in lines for word in line)
        self.shapes, self.stored = list[Shape](), list[Shape]()
        for layer, (line, (number, dim)) in enumerate(zip(lines, shapes, strict=True)):
            if len(line) != number:
                raise ConfigError(f"mask has {len(line)} words in line {layer} (counted from 0), for {number} prompts.")
            if dim % self.segments:
                raise ConfigError(f"mask cuts prompts into {self.segments} segments, which do not divide {dim}.")
            left = [word for word in line if KEPT in word]
            if not left:
                raise ConfigError(f"mask leaves no prompt in line {layer} (counted from 0): keep one of each layer.")
            rows = [place for place, letter in enumerate("".join(line)) if letter == KEPT]
            self.shapes.append((len(left), dim))
            self.stored.append((len(rows), dim // self.segments))
            count = iter(range(len(rows)))  # the places of what is pruned are behind the last row
            places = [next(count) if letter == KEPT else len(rows) for letter in "".join(left)]
            for name, values in (("rows", rows), ("places", places)):
                self.register_buffer(f"{name}_{layer}", torch.tensor(values, device=like.device), persistent=False)

    def cut(self, layer: int, prompts: Tensor) -> Tensor:
        """The segments that are left, (segments left, dim / segments), of all prompts of a layer, (n, dim)."""
        rows = self.get_buffer(f"rows_{layer}")
        return prompts.reshape(-1, prompts.shape[1] // self.segments).index_select(0, rows)

    def filled(self, layer: int, stored: Tensor) -> Tensor:
        """The prompts that are left, (tokens, dim), of their segments that are: the inverse of `cut` up to zeros."""
        number, dim = self.shapes[layer]
        if stored.numel() < number * dim:
            padded = torch.cat([stored, stored.new_zeros(1, stored.shape[1])])
            stored = padded.index_select(0, self.get_buffer(f"places_{layer}"))
        return stored.reshape(number, dim)

    def drawn(self, whole: nn.Parameter | nn.ParameterList, like: Tensor) -> nn.Parameter | nn.ParameterList:
        """What trains, as `stack` lays it out, with the values of what `stack` made without a mask."""
        cuts = iter([self.cut(layer, pick(whole, layer).detach()) for layer in range(len(self.shapes))])
        return stack(self.stored, like, lambda run: run.copy_(torch.stack([next(cuts) for _ in range(len(run))])))


def prunes_whole(words: Sequence[str]) -> bool:
    """Whether each prompt of a `Mask` is either whole or absent."""
    return all(len({*word}) == 1 for line in words for word in line.split())


def probed(part: nn.Module, layer: int, prompts: Tensor) -> Tensor:
    """Prompts (n, dim) of a layer, or (B, n, dim) under a mask for each image where one is set."""
    if (masks := PROBES.get().get(part)) is None:
        return prompts
    return prompts * masks[layer].repeat_interleave(prompts.shape[1] // masks[layer].shape[2], dim=2)


def mask_gradients(
    shapes: Mapping[nn.Module, Sequence[Shape]], segments: int, images: int, loss: Callable[[], Tensor], like: Tensor
) -> dict[nn.Module, list[Tensor]]:
    """∂L(x)/∂ρ of masks at 1 on the segments of prompts, for each of B images x.

    Args:
        shapes: (n, dim) of the prompts of each layer, by the deltas that they are of.
        segments: Equal parts of a prompt's channels.
        images: B; 1 for masks that all images of the loss share.
        loss: The sum of the losses of these images, each of which depends on its own image alone.
        like: Gives dtype and device of the masks.

    Returns:
        (B, n, segments) for each layer of each delta; their sum over segments is the gradient of a mask on tokens.
    """
    masks = {
        part: [like.new_ones(images, number, segments).requires_grad_() for number, _ in layers]
        for part, layers in shapes.items()
    }
    before = PROBES.set({**PROBES.get(), **masks})
    try:
        with torch.enable_grad():
            found = torch.autograd.grad(
                loss(),
                [mask for layers in masks.values() for mask in layers],
                allow_unused=True,  # of layers without prompts
                materialize_grads=True,
            )
    finally:
        PROBES.reset(before)
    left = iter(found)
    return {part: [next(left) for _ in layers] for part, layers in masks.items()}


def least_important(of_tokens: Tensor, of_segments: Tensor, tokens: int, segments: int) -> str:
    """The line of a `Mask` that prunes the least important prompts of a layer, and segments of the others.

    Args:
        of_tokens: The importance of each prompt, E|∂L(x)/∂ρ| over images x (Han et al., section 3.3), (n,).
        of_segments: Likewise of each segment, (n, segments).
        tokens: Per cent of the prompts to prune, from 0 to 99; rounded down, so that one is left.
        segments: Per cent of the segments of each other prompt to prune, likewise.
    """
    number, parts = of_segments.shape
    parts = parts if parts * segments // 100 else 1  # where segments of none go, a prompt is one
    # Stable: of equal ones the first go.
    gone = {*of_tokens.argsort(stable=True)[: number * tokens // 100].tolist()}
    order = of_segments.argsort(dim=1, stable=True)[:, : parts * segments // 100].tolist()
    words = []
    for token in range(number):
        out = range(parts) if token in gone else order[token]
        words.append("".join(PRUNED if place in out else KEPT for place in range(parts)))
    return " ".join(words)
