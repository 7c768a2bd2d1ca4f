"""Features of images before the first trained parameter, kept for as long as all that they depend on stays."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from vpt.backbones import Backbone
from vpt.models.feature_cache import FeatureCache


def feature_cache(
    backbone: Backbone, data: Any, compute: Callable[[Tensor], Tensor], place: tuple[Hashable, ...]
) -> FeatureCache:
    """An empty cache of what `compute` makes of a data module's images, or that of an equal task in this process.

    `place` is all that it depends on besides: where it is cut, and in which precision and on which device it computes.
    """
    described = data.describe() if (known := getattr(data, "hashed", True)) else data.outline()
    images = (described.get("fingerprint"), described["preset"], str(described.get("channels")))
    constants = (backbone.fingerprint, str(backbone.normalization), *images, data.image_size, *place)
    return FeatureCache(compute, constants if known else None)
