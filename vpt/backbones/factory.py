"""A timm model in, one frozen `Backbone` out: images to pooled features or a map of them, normalised inside."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from vpt.argument_types import checked, shown
from vpt.backbones.attention_layout import RUN_WHOLE, AttentionLayout, read_attention
from vpt.backbones.block_forward import Attached, BlockInputs, block_inputs, embed, run_blocks
from vpt.backbones.checkpoints import (
    architecture_of,
    build,
    config,
    current_name,
    fingerprint,
    function_fingerprint,
    width,
)
from vpt.backbones.compilation import CompiledCalls
from vpt.backbones.frozen_weights import wide_weights
from vpt.backbones.normalization import Normalization, check_normalization, check_values, plain, statistics
from vpt.backbones.token_layout import TokenLayout, read_layout
from vpt.errors import ConfigError, UnknownNameError, UnsupportedBackboneError
from vpt.image_size import GivenSize, ImageSize, as_size, sides

T = TypeVar("T")
_IN_POOL = ("fc_norm.", "attn_pool.")  # timm's names of what a vision transformer applies to pooled features only


class Backbone(nn.Module):
    """A pretrained image encoder: frozen, in eval mode, with its own normalisation.

    Attributes:
        model: The timm model of this `name`, without classifier.
        weights: What was asked for: ``"pretrained"``, ``"random"``, ``"random:N"`` or a path.
        weights_id: Where the weights come from, e.g. ``timm/vit_base_patch16_224.orig_in21k``.
        normalization: ``"weights"``, ``"imagenet"``, ``"inception"`` or ``"none"``; or ``mean`` and ``std`` of each
            channel of images that are in their own unit, `raw`.
        image_size: Of the input in pixels: one number where it is square, else (height, width).
        pool: timm's name of the pool; None for the one that belongs to the weights.
        num_features: Width of the pooled features.
        weights_fingerprint: SHA-256 of the weights as they were loaded.
        kept_fingerprint: And as they are kept, which is another where they are `narrow`.
        fingerprint: SHA-256 of what makes the function: of that one, and of what the name and the pool add.
        readout: Passes the pooled features on; what changes only them hooks on here.
        attached: The delta parts that change it now, in the order in which they were attached.
        trim: Drop patch tokens in the last block where only one token is pooled.
        reads_map: Whether its model reads the map of tokens and never the pooled features: what only the pool passes is
            then not trained.
        tuned: Whether `unfreeze` has made its own parameters trainable, so that they belong to what was trained on it.
        folded: Whether what was tuned has been written into it for good (`vpt.export.onnx_torch.fold`).
        narrow: Whether its linear layers and convolutions keep their weights in bfloat16, and it computes as under
            autocast to it, whatever that of its caller.
    """

    mean: Tensor
    std: Tensor
    _units: Tensor

    def __init__(
        self,
        model: nn.Module,
        name: str,
        weights: str,
        weights_id: str,
        image_size: GivenSize,
        normalization: Normalization,
        pool: str | None = None,
        narrow: bool = False,
    ) -> None:
        """Freezes a timm model without classifier; attributes say what arguments are. Use `create_backbone`."""
        super().__init__()
        self.model = model
        self.name, self.weights, self.weights_id = name, weights, weights_id
        self.image_size = as_size(image_size)
        self.raw = not isinstance(normalization, str)
        self.normalization = plain(normalization)
        self.pool = pool
        self.num_features = width(model)
        self.weights_fingerprint = fingerprint(model)
        self.fingerprint = function_fingerprint(self.weights_fingerprint, name, pool, narrow)
        mean, std = statistics(name, normalization)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.entry, self.readout = nn.Identity(), nn.Identity()
        self.attached: list[Attached] = []
        self.trim, self.reads_map = True, False
        self._layout, self._unknown = _or_reason(read_layout, model)
        self._attention, self._unattended = (
            _or_reason(read_attention, model, self.input_shape) if self._layout is None else (self._layout, "")
        )
        self.tuned = self.folded = False
        self._compiled: CompiledCalls | None = None
        self.narrow = narrow
        self.freeze()
        self._apply(lambda tensor: tensor)
        self.kept_fingerprint = fingerprint(model) if narrow else self.weights_fingerprint
        self.eval()

    def is_recorded_as(self, recorded: Mapping[str, Any]) -> bool:
        """Tells whether what a file or a checkpoint says of its backbone is true of this one's function.

        `recorded` has ``name``, ``fingerprint`` (in version 0.1.0 of the weights alone), and ``pool`` if not the
        weights' own; image size and normalisation are not compared.
        """
        if recorded["fingerprint"] == self.fingerprint:
            return True
        alike = architecture_of(recorded["name"]) == architecture_of(self.name)
        own = self.pool is None and recorded.get("pool") is None and not self.narrow
        return alike and own and recorded["fingerprint"] == self.weights_fingerprint

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Of an image: (channels, height, width)."""
        return len(self.mean), *sides(self.image_size)

    @property
    def image_kind(self) -> str:
        """Which images it takes, in the words of a `Preset`."""
        return f"{len(self.mean)} channels" if self.raw else "8-bit RGB"

    def random_images(self, batch: int, seed: int = 0) -> Tensor:
        """Draws images (batch, C, H, W) that it takes, on the CPU: uint8, or float32 where they are `raw`."""
        generator, shape = torch.Generator().manual_seed(seed), (batch, *self.input_shape)
        if self.raw:
            mean, std = self._units.float().cpu()
            return cast("Tensor", torch.randn(shape, generator=generator) * std + mean)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    @property
    def layout(self) -> TokenLayout:
        """The token layout; an UnsupportedBackboneError where the blocks of this model are not known."""
        if self._layout is None:
            raise UnsupportedBackboneError(f"{self.name}: {self._unknown if self._attention is None else RUN_WHOLE}")
        return self._layout

    @property
    def has_layout(self) -> bool:
        """Whether its blocks and tokens are known."""
        return self._layout is not None

    @property
    def attention_layout(self) -> AttentionLayout:
        """Where it attends; an UnsupportedBackboneError where its attention is not known."""
        if self._attention is None:
            raise UnsupportedBackboneError(f"{self.name}: {self._unattended}")
        return self._attention

    @property
    def has_attention(self) -> bool:
        """Whether its attention is known, as it is wherever its tokens are."""
        return self._attention is not None

    def freeze(self) -> None:
        """Freezes every parameter and keeps the model in eval mode from now on."""
        self.frozen = True
        self.requires_grad_(False)
        self.model.eval()

    def _apply(self, fn: Any, recurse: bool = True) -> Backbone:
        """Moves and casts as any module; what is kept in bfloat16 stays in it, and units of images are not rounded."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.raw:  # half precision does not tell numbers apart that are far from 0
            kind = torch.promote_types(self.mean.dtype, torch.float32)
            units = statistics(self.name, self.normalization)
            self._units = torch.tensor(units, dtype=kind, device=self.mean.device)[:, :, None, None]
        if self.narrow and self.mean.dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(f"frozen_dtype takes all else in float32 or bfloat16, not in {self.mean.dtype}.")
        if self.narrow:
            for weight in wide_weights(self.model).values():
                weight.data = weight.data.bfloat16()
        return self

    def widen(self) -> None:
        """Brings the weights that are kept in bfloat16 to the precision of all else, where they lose nothing."""
        self.narrow = False
        for weight in wide_weights(self.model).values():
            weight.data = weight.data.to(self.mean.dtype)

    def unfreeze(self) -> None:
        """Makes every parameter that is read trainable; `train()` reaches the model again (dropout, drop path).

        A ConfigError where its weights are kept in bfloat16.
        """
        if self.narrow:
            raise ConfigError(
                "frozen_dtype is of what stays frozen, and here all of the backbone trains: leave it out."
            )
        self.frozen, self.tuned = False, True
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.reads(name))
        self.model.train(self.training)

    @property
    def trains(self) -> bool:
        """Whether any parameter of its own requires a gradient."""
        return any(parameter.requires_grad for parameter in self.model.parameters())

    def reads(self, name: str) -> bool:
        """Whether what the model computes depends on a parameter, named as in `model.named_parameters()`."""
        return not (self.reads_map and name.startswith(_IN_POOL))

    def train(self, mode: bool = True) -> Backbone:
        """Sets the mode; a frozen model stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    def normalize(self, images: Tensor) -> Tensor:
        """Brings images (B, 3, H, W), any integer in [0, 255] or float in [0, 1], to what the weights expect.

        Where they are `raw`, images (B, C, H, W) of any numbers, by their own mean and deviation. In the
        backbone's floating dtype. A ConfigError where shape, dtype or values are not those of its input; values are not
        looked at while a graph is recorded or a function is vectorised.
        """
        if not isinstance(images, Tensor):
            raise ConfigError(
                f"Images are a tensor (B, {len(self.mean)}, H, W), got {shown(images)}: stack them, torch.from_numpy."
            )
        expected = self.input_shape
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ConfigError(
                f"{self.name} takes images of shape (B, {', '.join(map(str, expected))}), got {tuple(images.shape)}: "
                "set the data's image_size, or build the backbone with image_size=..."
            )
        if images.device != self.mean.device:
            raise ConfigError(f"Images lie on {images.device}, the backbone on {self.mean.device}: move one of them.")
        if images.dtype != torch.uint8:
            check_values(images, self.raw)
        if self.raw:
            mean, std = self._units
            return cast("Tensor", (images.to(mean.dtype) - mean) / std).to(self.mean.dtype)
        scaled = images.to(self.mean.dtype)
        return ((scaled if images.is_floating_point() else scaled / 255) - self.mean) / self.std

    def compile(self, **options: Any) -> None:
        """Computes under `torch.compile`, with its options, all from normalised images to `readout`.

        Numbers change by rounding. In place: state dicts stay as they are. Copies are not compiled.
        """
        self._compiled = CompiledCalls(**options)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is compiled for this very module."""
        return super().__getstate__() | {"_compiled": None}  # type: ignore[no-any-return, no-untyped-call]

    def forward(self, images: Tensor) -> Tensor:
        """Encodes images as `normalize` takes them into pooled features before any classifier, (B, num_features)."""
        return cast("Tensor", self.readout(self.pooled(images)))

    def pooled(self, images: Tensor) -> Tensor:
        """Encodes images without what hooks on `readout`, (B, num_features)."""
        return self._precisely(self._pooled, self.normalize(images))

    def computing(self) -> AbstractContextManager[Any]:
        """In what whatever computes with its layers has to: autocast where their weights are `narrow`."""
        return torch.autocast(self.mean.device.type, torch.bfloat16) if self.narrow else nullcontext()

    def _precisely(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """Calls a part of the forward pass in the precision of the weights, which it does not give on."""
        found = self._call(function, *args)
        return found.to(self.mean.dtype) if self.narrow else found

    def _call(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        with self.computing():
            return function(*args) if self._compiled is None else self._compiled(function, *args)

    def _pooled(self, normalized: Tensor) -> Tensor:
        if self._layout is None:
            model = cast("Any", self.model)
            return cast("Tensor", model.forward_head(model.forward_features(self.entry(normalized)), pre_logits=True))
        return self._from_block(0, *embed(self.model, self.entry(normalized)))

    def tokens(self, images: Tensor) -> Tensor:
        """Final tokens of a ViT, (B, prefix + patches, num_features) without prompts; else the final map."""
        return self._precisely(self._tokens, self.normalize(images))

    def _tokens(self, normalized: Tensor) -> Tensor:
        model = cast("Any", self.model)
        if self._layout is None:
            return cast("Tensor", model.forward_features(self.entry(normalized)))
        x, given = embed(model, self.entry(normalized))
        blocks = range(len(self._layout.blocks))
        return cast("Tensor", model.norm(run_blocks(model, self._layout, x, given, blocks, self.attached)[0]))

    def before_block(self, images: Tensor, block: int) -> Tensor:
        """The first half of the forward pass, up to `block` ≥ 1: tokens (B, N, dim), or (B, H, W, dim) with windows."""
        return self._call(self._before_block, block, self.normalize(images))  # in the precision of the next block

    def _before_block(self, block: int, normalized: Tensor) -> Tensor:
        x, given = embed(self.model, self.entry(normalized))
        return run_blocks(self.model, self.layout, x, given, range(block), self.attached)[0]

    def from_block(self, tokens: Tensor, block: int) -> Tensor:
        """The second half: what `before_block` gave to pooled features, (B, num_features), `readout` included."""
        return cast("Tensor", self.readout(self._precisely(self._from_block, block, tokens, block_inputs(self.model))))

    def _from_block(self, first: int, x: Tensor, given: BlockInputs) -> Tensor:
        model, layout = cast("Any", self.model), self.layout
        readers = [part for part in self.attached if part.reads_tokens]
        keep = layout.pooled if self.trim and not readers else None
        blocks = range(first, len(layout.blocks))
        x, beside = run_blocks(model, layout, x, given, blocks, self.attached, keep)
        x = model.norm(x)
        pooled = cast("Tensor", model.forward_head(x, pre_logits=True))
        pooled = self._pooled_with(pooled, beside) if beside else pooled
        for part in readers:
            pooled = part.pool(x.flatten(1, 2) if layout.windowed else x[:, layout.num_prefix :], pooled)
        return pooled

    def _pooled_with(self, pooled: Tensor, beside: Mapping[Attached, Tensor]) -> Tensor:
        """The mean over a Swin's map and the tokens beside it, which count by the strength of whom they belong to."""
        patches, norm = math.prod(self.layout.grid), cast("nn.Module", self.model.norm)
        total, number = pooled * patches, float(patches)
        for part, tokens in beside.items():
            total = total + part.beside_strength * norm(tokens).sum(dim=1)
            number += part.beside_strength * tokens.shape[1]
        return total / number


def _or_reason(read: Callable[..., T], *args: Any) -> tuple[T | None, str]:
    """What is read of a model, or why it cannot be; a stored exception would keep the frames of its callers alive."""
    try:
        return read(*args), ""
    except UnsupportedBackboneError as error:
        return None, str(error)


@checked
def create_backbone(
    name: str,
    weights: str | Path = "pretrained",
    image_size: GivenSize | None = None,
    normalization: str | dict[str, list[float]] = "weights",
    pool: str | None = None,
    frozen_dtype: Literal["bfloat16"] | None = None,
) -> Backbone:
    """Builds a frozen backbone from a timm name. PyTorch's global random numbers are left where they were.

    Args:
        name: timm's `architecture` or `architecture.tag`, e.g. ``"vit_base_patch16_224.orig_in21k"``; or
            ``"vit_nano_patch8_64"`` or ``"swin_nano_patch4_window8_64"``, whose weights ship with this package.
        weights: ``"pretrained"`` (shipped, else from the timm hub), ``"random"`` or ``"random:N"`` (drawn with the
            seed 0 or N, the same each time), or a path to a local file: safetensors, or a PyTorch state dict read with
            ``weights_only=True``, of the network alone or as a training keeps it (``teacher``, ``backbone.``, ...).
        image_size: Pixels, or [height, width]; None for the weights' own size. Position embeddings are resampled by
            timm.
        normalization: ``"weights"`` for the statistics that belong to the weights, or ``"imagenet"``,
            ``"inception"``, ``"none"`` to follow a preset; or ``mean`` and ``std`` of each channel of images in their
            own unit, of as many channels as there are numbers: the first layer of the weights is then converted by
            timm's rule (for one channel the sum over RGB, for more RGB repeated, times 3 / channels), if it has others.
        pool: Which pool makes the features of the final tokens or map: None for the weights' own in timm, or one that
            the model's class has there, e.g. ``"token"`` (the class token, as DINOv3's paper) or ``"avg"`` (the mean of
            the patches) on a ViT, ``"avg"`` or ``"max"`` on a convolutional network.
        frozen_dtype: ``"bfloat16"`` keeps the weights of linear layers and convolutions in it, in half the memory, and
            computes as under autocast to bfloat16 without a cast in a step; None for all in fp32.

    Returns:
        The backbone, in eval mode, no parameter of which requires a gradient.

    Raises:
        ConfigError: The image size is not of whole numbers of at least 1, impossible for the model, or not the weights'
            own and no whole number of patches; or statistics are no finite numbers.
        UnknownNameError: The name or the normalisation does not exist.
        UnsupportedBackboneError: The model has no such pool, takes no image size, or does not encode an image to one
            vector.
        WeightsError: The weights cannot be found, fetched or loaded.
    """
    check_normalization(normalization)
    channels = 3 if isinstance(normalization, str) else len(normalization["mean"])
    name, weights = current_name(name, warn=weights == "pretrained"), str(weights)  # a Path is a file, too
    size = input_size(name) if image_size is None else as_size(image_size)
    own = size == input_size(name)
    model, weights_id, pool = build(name, weights, None if own else size, pool, channels)
    if frozen_dtype not in (None, "bfloat16"):
        raise UnknownNameError("frozen_dtype", frozen_dtype, ["bfloat16"])
    return Backbone(model, name, weights, weights_id, size, normalization, pool, frozen_dtype is not None)


@checked
def input_size(name: str) -> ImageSize:
    """The image size that a backbone's weights were trained at, in pixels."""
    return as_size(config(name)["input_size"][1:])
