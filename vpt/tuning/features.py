"""Frozen-prefix cache: what lies before the first trained parameter is a constant of the image (DESIGN decision 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from vpt.backbones.factory import Backbone


class FeatureCache:
    """Pooled features of a frozen backbone, computed once per image.

    Valid only for images that are a function of their key, that is without random augmentation.
    """

    def __init__(self, backbone: Backbone) -> None:
        """Starts empty.

        Args:
            backbone: Frozen, with nothing attached that is being trained.
        """
        self.backbone = backbone
        self._rows: dict[tuple[str, int], Tensor] = {}

    @torch.no_grad()
    def __call__(self, split: str, index: Tensor, images: Tensor) -> Tensor:
        """Looks features up and computes those that are missing.

        Args:
            split: Name of the set that the indices count in.
            index: (B,) position of each image in its set.
            images: (B, 3, H, W), uint8 in [0, 255] or float in [0, 1].

        Returns:
            (B, num_features), without gradient.
        """
        keys = [(split, position) for position in index.tolist()]
        missing = [row for row, key in enumerate(keys) if key not in self._rows]
        if missing:
            for row, features in zip(missing, self.backbone(images[missing]), strict=True):
                self._rows[keys[row]] = features
        return torch.stack([self._rows[key] for key in keys])
