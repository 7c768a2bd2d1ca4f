"""A backbone in two halves: up to a block, and from it on."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

from vpt.backbones.attention.windows import patch_mergings
from vpt.backbones.factory import Backbone
from vpt.backbones.trim_last_block import Trimmable


class SplitBackbone:
    """Runs the blocks before a cut and those behind it apart; together they are the backbone.

    Attributes:
        cut: Blocks in the first half.
    """

    def __init__(self, backbone: Backbone, cut: int) -> None:
        """Splits.

        Args:
            backbone: In eval mode, its blocks known.
            cut: Blocks in the first half, at least 1 and fewer than there are.

        Raises:
            UnsupportedBackboneError: The blocks are not known.
        """
        self.backbone, self.cut = backbone, cut
        self._mergings = patch_mergings(backbone) if backbone.layout.windowed else {}
        # What blocks are given besides the tokens, such as rotary embeddings: the same for all images.
        self._besides: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def before(self, images: Tensor) -> Tensor:
        """The tokens behind the first half.

        Args:
            images: (B, 3, H, W), uint8 in [0, 255] or float in [0, 1].

        Returns:
            (B, N, dim), or (B, H, W, dim) with windows.
        """
        found: list[Tensor] = []

        def stop(block: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            found.append(output)
            raise _Stop

        with self.backbone.layout.blocks[self.cut - 1].register_forward_hook(stop), suppress(_Stop):
            self.backbone(images)
        return found[0]

    def after(self, tokens: Tensor) -> Tensor:
        """The features of images from their tokens behind the first half.

        Args:
            tokens: What `before` returned.

        Returns:
            (B, num_features).
        """
        if not self._besides:
            self._besides = self._record(tokens)
        model = cast("Any", self.backbone.model)
        if isinstance(model, Trimmable):
            model.trim_last(self.backbone.trim)
        for index in range(self.cut, len(self.backbone.layout.blocks)):
            if index in self._mergings:
                tokens = self._mergings[index](tokens)
            args, kwargs = self._besides[index]
            tokens = self.backbone.layout.blocks[index](tokens, *args, **kwargs)
        return cast("Tensor", self.backbone.readout(model.forward_head(model.norm(tokens), pre_logits=True)))

    @torch.no_grad()
    def _record(self, like: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def keep(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((args[1:], kwargs))

        size = self.backbone.image_size
        with ExitStack() as stack:
            for block in self.backbone.layout.blocks:
                stack.enter_context(block.register_forward_pre_hook(keep, with_kwargs=True, prepend=True))
            stack.enter_context(torch.random.fork_rng())  # dropout must not move the run's random numbers
            self.backbone(torch.zeros(1, 3, size, size, device=like.device))
        return calls


class _Stop(Exception):  # noqa: N818  # not an error: it ends a forward pass early
    """Raised and caught here only."""
