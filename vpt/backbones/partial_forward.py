"""A backbone in two halves: up to a block, and from it on."""

from __future__ import annotations

from torch import Tensor

from vpt.backbones.factory import Backbone


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
        """
        self.backbone, self.cut = backbone, cut

    def before(self, images: Tensor) -> Tensor:
        """The tokens behind the first half.

        Args:
            images: (B, 3, H, W), uint8 in [0, 255] or float in [0, 1].

        Returns:
            (B, N, dim), or (B, H, W, dim) with windows.

        Raises:
            UnsupportedBackboneError: The blocks are not known.
        """
        return self.backbone.before_block(images, self.cut)

    def after(self, tokens: Tensor) -> Tensor:
        """The features of images from their tokens behind the first half.

        Args:
            tokens: What `before` returned.

        Returns:
            (B, num_features).
        """
        features: Tensor = self.backbone.readout(self.backbone.from_block(tokens, self.cut))
        return features
