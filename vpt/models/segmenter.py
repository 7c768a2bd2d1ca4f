"""`DenseModel`: a backbone, what was trained on it, and a head on every patch; images in, pixels' classes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.functional import interpolate

from vpt.backbones.factory import Backbone, feature_map, map_size
from vpt.deltas.base import READOUT
from vpt.errors import ConfigError, UnknownNameError
from vpt.models.classifier import AdaptedModel

HEADS = ("linear", "conv")


class DenseModel(AdaptedModel):
    """A segmentation model: the classes of each patch, enlarged bilinearly to the image.

    Attributes:
        head: On the map of the patches; ``linear`` is a 1×1 convolution, that is one linear layer for every patch.
    """

    format = "vpt-dense/1"

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        specs: Sequence[Mapping[str, Any]] = (),
        class_names: Sequence[str] | None = None,
        preset: dict[str, Any] | None = None,
        kind: str = "linear",
        width: int = 128,
    ) -> None:
        """Attaches the delta and draws the head, whose last layer is small and without bias at first.

        Args:
            backbone: A ViT or a Swin; from now on it belongs to this model.
            num_classes: At least 1, background included.
            specs: The delta, as for `attach`; empty for none.
            class_names: One per class; None for "0", "1", ...
            preset: The preprocessing, as a plain dict.
            kind: Of head: ``linear``, or ``conv``: a 3×3 convolution, GELU, and then the linear layer.
            width: Channels between the two layers of ``conv``, at least 1.

        Raises:
            ConfigError: A number is out of range, or a part of the delta acts on pooled features alone.
            UnknownNameError: There is no such head.
            UnsupportedBackboneError: The backbone is neither a ViT nor a Swin.
        """
        if kind not in HEADS:
            raise UnknownNameError("head", kind, HEADS)
        if width < 1:
            raise ConfigError(f"The width of the head must be at least 1, got {width}.")
        map_size(backbone)
        self._kind, self._width = kind, width
        read, backbone.reads_map = backbone.reads_map, True
        try:
            super().__init__(backbone, num_classes, specs, class_names, preset)
        except BaseException:
            backbone.reads_map = read
            raise

    def _check_parts(self) -> None:
        if any(part.changes_pool for part in self.parts()):
            raise ConfigError(
                "A part of the delta changes the pooled features, which a segmentation head does not read: leave out "
                "mlp_head, sidetune and reference_pooling."
            )

    def _draw_head(self, num_classes: int) -> nn.Module:
        like, features = self.backbone.mean, self.backbone.layout.dims[-1]
        place: Any = {"dtype": like.dtype, "device": like.device}
        conv = self._kind == "conv"
        last = nn.Conv2d(self._width if conv else features, num_classes, 1, **place)
        nn.init.trunc_normal_(last.weight, std=0.01)
        nn.init.zeros_(cast("Tensor", last.bias))
        return nn.Sequential(nn.Conv2d(features, self._width, 3, padding=1, **place), nn.GELU(), last) if conv else last

    def encode(self, images: Tensor) -> Tensor:
        """The map of the patches.

        Args:
            images: (B, 3, H, W), uint8 in [0, 255] or float in [0, 1].

        Returns:
            (B, num_features, rows, columns).
        """
        return feature_map(self.backbone, images)

    def forward(self, images: Tensor) -> Tensor:
        """Classifies the pixels of images.

        Args:
            images: (B, 3, H, W), uint8 in [0, 255] or float in [0, 1].

        Returns:
            Logits, (B, num_classes, H, W).
        """
        return enlarge(self.classify(self.encode(images)), (int(images.shape[-2]), int(images.shape[-1])))

    def constant_part(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None:
        """The whole map, where only the head trains; else nothing is constant.

        Returns:
            `encode` and the identity, or None.
        """
        return (self.encode, nn.Identity()) if self.constant_blocks() == READOUT else None

    def file_header(self) -> dict[str, Any]:
        """Kind and width of the head."""
        return {"head": {"kind": self._kind, "width": self._width}}


def enlarge(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Brings the logits of patches to pixels, bilinearly; the outer edges of both maps agree.

    Args:
        logits: (B, classes, rows, columns).
        size: (H, W) in pixels.

    Returns:
        (B, classes, H, W).
    """
    return interpolate(logits, size, mode="bilinear", align_corners=False)
