"""The final tokens of the patches, in their places."""

from __future__ import annotations

from torch import Tensor

from vpt.backbones.factory import Backbone
from vpt.errors import UnsupportedBackboneError


def map_size(backbone: Backbone) -> tuple[int, int]:
    """Rows and columns of the map: image size over patch size on a ViT, the last stage's on a Swin.

    Args:
        backbone: With or without deltas attached.

    Returns:
        (rows, columns).

    Raises:
        UnsupportedBackboneError: The backbone is neither.
    """
    try:
        return backbone.layout.grid
    except UnsupportedBackboneError as error:
        raise UnsupportedBackboneError(
            f"{backbone.name} has no known map of patches: segmentation takes timm's vision transformers and Swins."
        ) from error


def feature_map(backbone: Backbone, images: Tensor) -> Tensor:
    """Computes the final tokens of the patches, in their places.

    Deep prompts are keys and values and never tokens; shallow ones leave the sequence behind the last block. The map
    is what timm's `forward_features` gives: behind the model's last norm, where that stands before the pool.

    Args:
        backbone: With or without deltas attached.
        images: (B, 3, H, W), uint8 in [0, 255] or float in [0, 1].

    Returns:
        (B, num_features, rows, columns), as `map_size` says.

    Raises:
        UnsupportedBackboneError: The backbone is neither a ViT nor a Swin.
    """
    rows, columns = map_size(backbone)
    tokens = backbone.tokens(images)
    if not backbone.layout.windowed:  # a Swin's are a map already
        tokens = tokens[:, backbone.layout.num_prefix :].unflatten(1, (rows, columns))  # type: ignore[no-untyped-call]
    return tokens.permute(0, 3, 1, 2)
