"""Prompts in other places than the sequence: added to the patches, or to a frame of pixels.

Added: the ablation on prompt location of Jia et al., ECCV 2022, section 4.2. Framed: the padding template of Bahng et
al., "Exploring Visual Prompts for Adapting Large-Scale Models", 2022. Both start at zero, which is the backbone, and
strength α scales what is added.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vpt.backbones.factory import Backbone
from vpt.backbones.strength import Place
from vpt.deltas.base import DeltaPart, Handle, chosen_blocks, pick, stack
from vpt.deltas.registry import register_delta
from vpt.errors import ConfigError
from vpt.image_size import sides, size_text


@register_delta("prompt_add")
class PromptAdd(DeltaPart):
    """A learned vector added to each patch on its way into the first block, or into every one.

    `tokens` are (layers, patches, dim), or a list of such where their shape changes from layer to layer.
    """

    def __init__(self, backbone: Backbone, deep: bool = False, layers: Sequence[int] | None = None) -> None:
        """Starts at zero.

        Before the first block only; if `deep` before every one, or `layers` ``[first, last + 1]`` counted from 0.
        """
        super().__init__(backbone)
        layout = backbone.layout
        if layers is not None and not deep:
            raise ConfigError("layers needs deep prompts: without deep they are added before the first block only.")
        chosen = chosen_blocks(len(layout.blocks), layers) if deep else [0]
        self.first_block = chosen[0]
        self._blocks = [layout.blocks[number] for number in chosen]
        self._shapes = [(layout.patches[number], layout.dims[number]) for number in chosen]
        self.tokens = stack(self._shapes, backbone.mean, torch.zero_)

    def hooks(self) -> Iterator[Handle]:
        """An addition before every chosen block; before shallow prompts have joined the patches."""
        for layer, block in enumerate(self._blocks):
            yield block.register_forward_pre_hook(partial(self._add, layer), prepend=True)

    def places(self) -> Mapping[Any, Place]:
        """See `DeltaPart`: by layer, among those that have vectors."""
        return dict(enumerate(self._blocks))

    def expected_parameters(self) -> int:
        """Σ patches · dim over the layers."""
        return sum(patches * dim for patches, dim in self._shapes)

    def _add(self, layer: int, block: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if (strength := self.at(layer)) == 0.0:
            return None
        x, prompts = args[0], pick(self.tokens, layer)
        prompts = prompts if strength == 1.0 else strength * prompts
        if x.ndim == 4:  # the map of a Swin, (B, H, W, dim)
            return (x + prompts.view(x.shape[1:]), *args[1:])
        others = x.shape[1] - len(prompts)  # class and register tokens, and prompts of other deltas, come first
        return (torch.cat([x[:, :others], x[:, others:] + prompts], dim=1), *args[1:])


@register_delta("prompt_pad")
class PromptPad(DeltaPart):
    """A learned frame of pixels added to the normalised image.

    `rows` are top and bottom, (2, C, width, W), `columns` between them, (2, C, H − 2 · width, width).
    """

    def __init__(self, backbone: Backbone, width: int = 30) -> None:
        """Starts at zero; `width` is that of the frame in pixels, at least 1 and less than half of the image."""
        super().__init__(backbone)
        size, like = sides(backbone.image_size), backbone.mean
        if not 1 <= width < min(size) / 2:
            most = (min(size) - 1) // 2
            raise ConfigError(
                f"A frame of {width} pixels does not fit {size_text(backbone.image_size)} pixels: give 1 to {most}."
            )
        self._width, self._size = width, size
        self.rows = nn.Parameter(like.new_zeros(2, len(like), width, size[1]))
        self.columns = nn.Parameter(like.new_zeros(2, len(like), size[0] - 2 * width, width))

    def hooks(self) -> Iterator[Handle]:
        """The frame on the normalised image."""
        yield self.backbone.entry.register_forward_pre_hook(self._add)

    def places(self) -> Mapping[Any, Place]:
        """See `DeltaPart`: with the embeddings."""
        return {0: 0}

    def expected_parameters(self) -> int:
        """2 · C · width · (H + W − 2 · width)."""
        return 2 * len(self.backbone.mean) * self._width * (sum(self._size) - 2 * self._width)

    def frame(self) -> Tensor:
        """The frame around an empty middle, (C, H, W)."""
        height, width = (side - 2 * self._width for side in self._size)
        empty = self.columns.new_zeros(len(self.backbone.mean), height, width)
        middle = torch.cat([self.columns[0], empty, self.columns[1]], dim=2)
        return torch.cat([self.rows[0], middle, self.rows[1]], dim=1)

    def _add(self, embedding: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if (strength := self.at(0)) == 0.0:
            return None
        frame = self.frame() if strength == 1.0 else strength * self.frame()
        return (args[0] + frame, *args[1:])
