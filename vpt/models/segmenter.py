"""`DenseModel`: a backbone, what was trained on it, and a head on every patch; images in, pixels' classes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.functional import interpolate

from vpt.argument_types import checked
from vpt.backbones.factory import Backbone
from vpt.deltas.base import READOUT
from vpt.deltas.registry import Specs
from vpt.errors import ConfigError, UnknownNameError, UnsupportedBackboneError
from vpt.models.classifier import AdaptedModel

HEADS = ("linear", "conv")


class DenseModel(AdaptedModel):
    """A segmentation model: the classes of each patch, enlarged bilinearly to the image."""

    format = "vpt-dense/1"

    @checked
    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        specs: Specs = (),
        class_names: Sequence[str] | None = None,
        preset: dict[str, Any] | None = None,
        kind: str = "linear",
        width: int = 128,
    ) -> None:
        """Attaches the delta and draws the head, whose last layer is small and without bias at first.

        The backbone is a ViT or a Swin; other arguments are those of `AdaptedModel`, background is a class. The kind of
        head is ``linear``, a 1×1 convolution, that is one linear layer for every patch, or ``conv``: a 3×3 convolution
        to `width` channels, at least 1, GELU, and then the linear layer. A ConfigError where a number is out of range,
        or a part of the delta acts on pooled features alone; an UnknownNameError where there is no such head; an
        UnsupportedBackboneError where the backbone is neither a ViT nor a Swin.
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
                "mlp_head, attention_pool, sidetune and reference_pooling."
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
        """The map of the patches, (B, num_features, rows, columns)."""
        return feature_map(self.backbone, images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of pixels, (B, num_classes, H, W), of images (B, 3, H, W), uint8 in [0, 255] or float in [0, 1]."""
        return enlarge(self.classify(self.encode(images)), (int(images.shape[-2]), int(images.shape[-1])))

    def constant_part(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None:
        """`encode` and the identity where only the head trains; else nothing is constant."""
        return (self.encode, nn.Identity()) if self.constant_blocks() == READOUT else None

    def file_header(self) -> dict[str, Any]:
        """Kind and width of the head."""
        return {"head": {"kind": self._kind, "width": self._width}}


def map_size(backbone: Backbone) -> tuple[int, int]:
    """(rows, columns) of a ViT's patches or a Swin's last map; an UnsupportedBackboneError for other backbones."""
    try:
        return backbone.layout.grid
    except UnsupportedBackboneError as error:
        raise UnsupportedBackboneError(
            f"{backbone.name} has no known map of patches: segmentation takes timm's vision transformers and Swins."
        ) from error


def feature_map(backbone: Backbone, images: Tensor) -> Tensor:
    """Computes the final tokens of the patches in their places, (B, num_features, rows, columns) as `map_size` says.

    Deep prompts are keys and values and never tokens; shallow ones leave the sequence behind the last block. The map is
    what timm's `forward_features` gives: behind the model's last norm, where that stands before the pool.
    """
    rows, columns = map_size(backbone)
    tokens = backbone.tokens(images)
    if not backbone.layout.windowed:  # a Swin's are a map already
        tokens = tokens[:, backbone.layout.num_prefix :].unflatten(1, (rows, columns))  # type: ignore[no-untyped-call]
    return tokens.permute(0, 3, 1, 2)


def enlarge(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Brings logits of patches, (B, classes, rows, columns), to (H, W) pixels; the outer edges of both maps agree."""
    return interpolate(logits, size, mode="bilinear", align_corners=False)
