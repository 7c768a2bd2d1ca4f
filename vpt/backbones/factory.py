"""A timm model in, one frozen `Backbone` out: images to pooled features, normalised inside."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from torch import Tensor, nn

from vpt.backbones.checkpoints import build, config, current_name, fingerprint
from vpt.backbones.token_layout import TokenLayout, read_layout
from vpt.backbones.trim_last_block import Trimmable
from vpt.errors import ConfigError, UnknownNameError, UnsupportedBackboneError

STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "inception": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


class Attached(Protocol):
    """What a delta part is to the backbone that it is attached to.

    Attributes:
        first_block: How many blocks lie before everything that it changes.
    """

    first_block: int

    def refresh(self) -> None:
        """Called before every forward pass."""


class Backbone(nn.Module):
    """A pretrained image encoder: frozen, in eval mode, with its own normalisation.

    Attributes:
        model: The timm model, without classifier.
        name: timm's name.
        weights: What was asked for: ``"pretrained"``, ``"random"`` or a path.
        weights_id: Where the weights come from, e.g. ``timm/vit_base_patch16_224.orig_in21k``.
        normalization: ``"weights"``, ``"imagenet"``, ``"inception"`` or ``"none"``.
        image_size: Height and width of the input in pixels.
        num_features: Width of the pooled features.
        fingerprint: SHA-256 of the weights as they were loaded.
        readout: Passes the pooled features on; what changes only them hooks on here.
        attached: The delta parts that change it now, in the order in which they were attached.
        trim: Where the pool reads one token, only that one passes the last block.
        tuned: Whether its own parameters have been trainable, so that they belong to what was trained on it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, name: str, weights: str, weights_id: str, image_size: int, normalization: str
    ) -> None:
        """Freezes a timm model. Use `create_backbone` instead.

        Args:
            model: The timm model, without classifier.
            name: timm's name.
            weights: What was asked for.
            weights_id: What was found.
            image_size: Pixels.
            normalization: Which statistics to normalise with.
        """
        super().__init__()
        self.model = model
        self.name, self.weights, self.weights_id = name, weights, weights_id
        self.image_size, self.normalization = image_size, normalization
        self.num_features = int(cast("Any", model).num_features)
        self.fingerprint = fingerprint(model)
        mean, std = _statistics(name, normalization)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.readout = nn.Identity()
        self.attached: list[Attached] = []
        self.trim = True
        self._layout: TokenLayout | UnsupportedBackboneError
        try:
            self._layout = read_layout(model)
        except UnsupportedBackboneError as error:
            self._layout = error
        self.tuned = False
        self.freeze()
        self.eval()

    @property
    def layout(self) -> TokenLayout:
        """The token layout.

        Raises:
            UnsupportedBackboneError: Prompts are not known to be exact on this model.
        """
        if isinstance(self._layout, UnsupportedBackboneError):
            raise self._layout
        return self._layout

    def freeze(self) -> None:
        """Freezes every parameter and keeps the model in eval mode from now on."""
        self.frozen = True
        self.requires_grad_(False)
        self.model.eval()

    def unfreeze(self) -> None:
        """Makes every parameter trainable; `train()` reaches the model again (dropout, drop path)."""
        self.frozen, self.tuned = False, True
        self.requires_grad_(True)
        self.model.train(self.training)

    def train(self, mode: bool = True) -> Backbone:
        """Sets the mode; a frozen model stays in eval mode.

        Args:
            mode: Training if true.

        Returns:
            Itself.
        """
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    def normalize(self, images: Tensor) -> Tensor:
        """Brings images to the statistics that the weights expect.

        Args:
            images: (B, 3, H, W), uint8 in [0, 255] or float in [0, 1].

        Returns:
            (B, 3, H, W) in the backbone's floating dtype.

        Raises:
            ConfigError: The shape is not that of the backbone's input.
        """
        expected = (3, self.image_size, self.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ConfigError(
                f"{self.name} takes images of shape (B, {', '.join(map(str, expected))}), got {tuple(images.shape)}: "
                "set the data's image_size, or build the backbone with image_size=..."
            )
        for part in self.attached:
            part.refresh()
        scaled = images.to(self.mean.dtype) / 255 if images.dtype == torch.uint8 else images.to(self.mean.dtype)
        return (scaled - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """Encodes images.

        Args:
            images: (B, 3, H, W), uint8 in [0, 255] or float in [0, 1].

        Returns:
            Pooled features before any classifier, (B, num_features).
        """
        return cast("Tensor", self.readout(self.pooled(images)))

    def pooled(self, images: Tensor) -> Tensor:
        """Encodes images without what hooks on `readout`.

        Args:
            images: As for `forward`.

        Returns:
            (B, num_features).
        """
        model = cast("Any", self.model)
        trimmed = isinstance(model, Trimmable) and self.trim
        features = model.features_for_pool if trimmed else model.forward_features
        return cast("Tensor", model.forward_head(features(self.normalize(images)), pre_logits=True))

    def tokens(self, images: Tensor) -> Tensor:
        """All final tokens of a ViT, or the final map of another model.

        Args:
            images: (B, 3, H, W), uint8 in [0, 255] or float in [0, 1].

        Returns:
            What timm's `forward_features` returns; for a ViT (B, prefix + patches, num_features), without prompts.
        """
        return cast("Tensor", cast("Any", self.model).forward_features(self.normalize(images)))


def create_backbone(
    name: str, weights: str = "pretrained", image_size: int | None = None, normalization: str = "weights"
) -> Backbone:
    """Builds a frozen backbone from a timm name.

    Args:
        name: timm's `architecture` or `architecture.tag`, e.g. ``"vit_base_patch16_224.orig_in21k"``; or
            ``"vit_nano_patch8_64"`` or ``"swin_nano_patch4_window8_64"``, whose weights ship with this package.
        weights: ``"pretrained"`` (shipped, else from the timm hub), ``"random"``, or a path to a local file
            (safetensors, or a PyTorch state dict read with ``weights_only=True``).
        image_size: Pixels; None for the weights' own size. Position embeddings are resampled by timm.
        normalization: ``"weights"`` for the statistics that belong to the weights, or ``"imagenet"``,
            ``"inception"``, ``"none"`` to follow a preset.

    Returns:
        The backbone, in eval mode, no parameter of which requires a gradient.

    Raises:
        UnknownNameError: The name or the normalisation does not exist.
        WeightsError: The weights cannot be found, fetched or loaded.
    """
    if normalization != "weights" and normalization not in STATISTICS:
        raise UnknownNameError("normalization", normalization, ["weights", *STATISTICS])
    name = current_name(name, warn=weights == "pretrained")
    size = input_size(name) if image_size is None else image_size
    model, weights_id = build(name, weights, size if size != input_size(name) else None)
    return Backbone(model, name, weights, weights_id, size, normalization)


def input_size(name: str) -> int:
    """The image size that a backbone's weights were trained at.

    Args:
        name: timm's name.

    Returns:
        Pixels.

    Raises:
        UnknownNameError: timm does not know the name.
    """
    return int(config(name)["input_size"][-1])


def _statistics(name: str, normalization: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if normalization != "weights":
        return STATISTICS[normalization]
    record = config(name)
    return tuple(record["mean"]), tuple(record["std"])


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
