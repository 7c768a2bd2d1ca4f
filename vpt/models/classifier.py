"""`AdaptedModel`: a backbone, what was trained on it, and a head; and `TunedModel`, the classifier among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vpt.argument_types import checked
from vpt.backbones.factory import Backbone
from vpt.backbones.strength import Strength, checked_strength
from vpt.data.inference import is_single
from vpt.data.targets import Targets, check_multiclass
from vpt.deltas.base import READOUT, DeltaPart
from vpt.deltas.composition import Delta
from vpt.deltas.registry import Specs
from vpt.errors import ConfigError, DataError
from vpt.metrics import conformal
from vpt.models.activations import Activations
from vpt.models.calibration import HeldOut
from vpt.models.prediction import Prediction, answers, predictions, rule_of


class AdaptedModel(nn.Module):
    """A frozen or trained backbone, an optional delta and a head that a subclass draws.

    A delta file of it is marked with `format`; `info` is anything worth keeping with it: plain JSON values.
    """

    format: ClassVar[str]
    head: nn.Module

    @checked
    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        specs: Specs = (),
        class_names: Sequence[str] | None = None,
        preset: dict[str, Any] | None = None,
    ) -> None:
        """Attaches the delta, `specs` as for `attach`, and draws the head of at least one class.

        The backbone belongs to this model from now on; `class_names` are "0", "1", ... if None, and `preset` is the
        preprocessing that the model expects, as a plain dict. A ConfigError where the number of classes is not positive
        or differs from the number of names.
        """
        super().__init__()
        if num_classes < 1:
            raise ConfigError(f"num_classes must be at least 1, got {num_classes}.")
        self.class_names = [str(index) for index in range(num_classes)] if class_names is None else list(class_names)
        if len(self.class_names) != num_classes:
            raise ConfigError(f"{len(self.class_names)} class names were given for {num_classes} classes.")
        self.backbone = backbone
        self.delta: Delta | None = Delta(backbone, specs) if specs else None
        self._check_parts()
        self.head = self._draw_head(num_classes)
        if self.delta is not None:
            self.delta.attach()  # last: what is refused leaves the backbone as it was
        self.preset = dict(preset or {})
        self.info: dict[str, Any] = {}
        self.calibration: HeldOut | None = None
        self.activations: Activations | None = None
        self._strength: Strength = 1.0
        self.train()

    def _check_parts(self) -> None:
        """Refuses deltas that such a model cannot use, before they are attached."""

    def _draw_head(self, num_classes: int) -> nn.Module:
        """A head on the backbone's features, of its dtype and on its device."""
        raise NotImplementedError

    def encode(self, images: Tensor) -> Tensor:
        """The features that the head reads, (B, num_features, ...), of images (B, 3, H, W).

        Images are everywhere uint8 in [0, 255] or float in [0, 1].
        """
        raise NotImplementedError

    def classify(self, features: Tensor) -> Tensor:
        """Logits, (B, num_classes, ...), of features (B, num_features, ...)."""
        return cast("Tensor", self.head(features))

    def constant_part(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None:
        """Splits what computes the features at the first thing that trains.

        Into a function of the image that stays, and one from its result to the features; None if all changes.
        """
        raise NotImplementedError

    def file_header(self) -> dict[str, Any]:
        """What a delta file must say of the head for it to be drawn again: plain JSON values by name."""
        return {}

    def compile(self, **options: Any) -> None:
        """Runs the backbone with its deltas under `torch.compile` from now on: see `Backbone.compile`."""
        self.backbone.compile(**options)

    def parts(self) -> list[DeltaPart]:
        """The deltas of the model, in order."""
        return [] if self.delta is None else [cast("DeltaPart", part) for part in self.delta.parts]

    def penalties(self) -> list[Tensor]:
        """What training adds to its loss for the deltas, scalars that depend on their parameters alone."""
        return [penalty for part in self.parts() if (penalty := part.penalty()) is not None]

    def constant_blocks(self) -> int:
        """How many blocks lie before everything that trains: 0 for none, `READOUT` if only the head does."""
        if self.backbone.trains:
            return 0
        return min((part.first_block for part in self.backbone.attached), default=READOUT)

    @property
    def strength(self) -> Strength:
        """α in [0, 1] of the delta and of the head, or of each layer; a ConfigError where the parts have others."""
        return self._strength if self.delta is None else self.delta.strength

    def set_strength(self, alpha: float | Sequence[float]) -> None:
        """Moves between the frozen backbone, α = 0, and the tuned one, 1; `TunedModel` moves its head too.

        This is WiSE-FT (Wortsman et al., CVPR 2022) as a gate. A list has an α for each layer, or those of the first
        and the last with a line between (LiNeS; `vpt.backbones.strength.checked_strength`); the head has the last one.
        A ConfigError where α is no number in [0, 1], or is below 1 where the backbone itself was tuned.
        """
        alpha = checked_strength(alpha, self.backbone)
        if self.backbone.folded and alpha != self.strength:
            raise ConfigError("A folded model has its strength for good: set that of the model it was folded from.")
        if self.backbone.tuned and alpha != 1.0:
            raise ConfigError(
                "The whole backbone was tuned in place, and its pretrained weights are not kept in the model: `vpt "
                "robustness run --anchor` interpolates between both, or train the delta 'full', which keeps both."
            )
        if self.delta is not None:
            self.delta.set_strength(alpha)
        self._strength = alpha

    def owned(self) -> dict[str, Tensor]:
        """The tensors that belong to this model, frozen or not: of delta and head, and of a backbone that was tuned."""
        rooms = ("delta.", "head.", "backbone.") if self.backbone.tuned else ("delta.", "head.")
        return {key: tensor for key, tensor in self.state_dict(keep_vars=True).items() if key.startswith(rooms)}

    def folded(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """What a delta file keeps: canonical specs and tensors of an equal model, without what only training needs."""
        tensors = self.owned()
        if self.delta is None:
            return [], tensors
        specs, kept = self.delta.folded()
        return specs, {k: t for k, t in tensors.items() if not k.startswith("delta.")} | {
            f"delta.{key}": tensor for key, tensor in kept.items()
        }

    def parameter_counts(self) -> tuple[int, int]:
        """How many train, and how many there are; a trained copy and what it stands in for count once."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        replaced = sum(part.replaced for part in self.parts())
        return trainable, sum(p.numel() for p in self.parameters()) - replaced


class ValueHead(nn.Linear):
    """A linear head that gives numbers in their own units: offset + scale · (W x + b), of the training labels."""

    offset: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, **kind: Any) -> None:
        super().__init__(in_features, out_features, **kind)
        self.register_buffer("offset", torch.zeros(out_features, **kind))
        self.register_buffer("scale", torch.ones(out_features, **kind))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if fn(torch.zeros((), dtype=self.offset.dtype)).dtype in (torch.float16, torch.bfloat16):
            raise ConfigError("A model of numbers has single precision at least, or its units would be rounded.")
        return cast("nn.Module", super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def forward(self, features: Tensor) -> Tensor:
        """Numbers, (B, out_features), of features (B, in_features)."""
        return torch.addcmul(self.offset, self.scale, super().forward(features))


class TunedModel(AdaptedModel):
    """A classifier made of a frozen backbone, an optional delta and a linear head on its pooled features.

    Attributes:
        targets: What its outputs are: ``multiclass``, logits of classes of which an image has one; ``multilabel``,
            logits of classes of which it has any; ``regression``, numbers in their own units, named by `class_names`.
    """

    format = "vpt-delta/1"
    head: nn.Linear
    targets: Targets
    anchor_weight: Tensor | None
    anchor_bias: Tensor | None

    @checked
    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        specs: Specs = (),
        class_names: Sequence[str] | None = None,
        preset: dict[str, Any] | None = None,
        targets: Targets = "multiclass",
    ) -> None:
        """Makes the model as `AdaptedModel` does, for its `targets`."""
        self.targets = targets  # before the head is drawn
        super().__init__(backbone, num_classes, specs, class_names, preset)
        for name in ("anchor_weight", "anchor_bias"):  # they move with the model, and belong in no file
            self.register_buffer(name, None, persistent=False)

    def _draw_head(self, num_classes: int) -> nn.Linear:
        """Small random weights, zero bias."""
        like = self.backbone.mean
        kind = ValueHead if self.targets == "regression" else nn.Linear
        head = kind(self.backbone.num_features, num_classes, dtype=like.dtype, device=like.device)
        nn.init.trunc_normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        return head

    def file_header(self) -> dict[str, Any]:
        """``targets``, where an image has other than one class."""
        return {} if self.targets == "multiclass" else {"targets": self.targets}

    def encode(self, images: Tensor) -> Tensor:
        """Pooled features, (B, num_features)."""
        return cast("Tensor", self.backbone(images))

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (B, num_classes), of images (B, 3, H, W), uint8 in [0, 255] or float in [0, 1]."""
        return self.classify(self.backbone(images))

    def classify(self, features: Tensor) -> Tensor:
        """Applies the head, interpolated towards the anchor by the strength."""
        if self.anchor_weight is None or self.anchor_bias is None or (alpha := self._head_strength) == 1.0:
            return cast("Tensor", self.head(features))
        weight = torch.lerp(self.anchor_weight, self.head.weight, alpha)
        bias = torch.lerp(self.anchor_bias, self.head.bias, alpha)
        return nn.functional.linear(features, weight, bias)

    @property
    def _head_strength(self) -> float:
        alpha = self.strength
        return alpha if isinstance(alpha, float) else alpha[-1]

    def constant_part(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None:
        """See `AdaptedModel.constant_part`."""
        cut = self.constant_blocks()
        if cut == READOUT:
            return self.backbone.pooled, self.backbone.readout
        if cut == 0 or not self.backbone.has_layout:
            return None
        return partial(self.backbone.before_block, block=cut), lambda tokens: self.backbone.from_block(tokens, cut)

    @checked
    def predict(
        self,
        images: Any,
        top: int = 1,
        max_risk: float | None = None,
        coverage: float | None = None,
        set_rule: conformal.Rule = "lac",
        false_alarms: float | None = None,
        batch_size: int = 64,
    ) -> Prediction | list[Prediction]:
        """Classifies images, prepared as those were that the model was trained on.

        Args:
            images: A path, an image of Pillow, an array uint8 (H, W), (H, W, 3) or (H, W, 4) or a tensor uint8
                (3, H, W); or several: a folder, a batch (with one dimension more), or anything that yields images.
            top: How many of the most probable classes are told.
            max_risk: Answers of which more than this share would be wrong are declined as ``unsure``; in (0, 1).
            coverage: Gives each image the classes that hold the right one this often; in (0, 1).
            set_rule: How these are chosen: ``lac`` or ``aps`` (`vpt.metrics.conformal.nonconformity`).
            false_alarms: Images that are farther from the training images than all but this share of known ones are
                declined as ``unknown``; in (0, 1).
            batch_size: Images in a forward pass; only so many are in memory at a time.

        Returns:
            A prediction for one image, else a list in the order of the images, in which a damaged file has a `fault`.

        Raises:
            ConfigError: An image is none, a value is out of range, or a rate is asked for of a model that is not
                calibrated or by too few images.
            DataError: One single image cannot be read, or a folder has none.
        """
        found = list(self.predictions(images, top, max_risk, coverage, set_rule, false_alarms, batch_size))
        if not is_single(images):
            return found
        if found[0].fault:
            raise DataError(f"{found[0].fault}.")
        return found[0]

    def predictions(
        self,
        images: Any,
        top: int = 1,
        max_risk: float | None = None,
        coverage: float | None = None,
        set_rule: conformal.Rule = "lac",
        false_alarms: float | None = None,
        batch_size: int = 64,
    ) -> Iterator[Prediction]:
        """Does what `predict` does, one prediction after the other, for any number of images in constant memory."""
        calibration = self.calibration if self.strength == 1.0 else None  # it is of the tuned model
        rule = rule_of(self, calibration, max_risk, coverage, set_rule, false_alarms)
        return predictions(self, images, rule, top, batch_size)

    @checked
    def embed(self, images: Any, batch_size: int = 64) -> NDArray[np.float32]:
        """The features that the head reads, (N, num_features), of images as `predict` takes them.

        A DataError where one cannot be read; for the rest see `predict`.
        """
        parts = []
        for group, _, features in answers(self, images, batch_size):
            if faults := [photo.fault for photo in group if photo.fault]:
                raise DataError(f"{faults[0]}.")
            parts.append(features)
        return np.concatenate(parts) if parts else np.empty((0, self.backbone.num_features), np.float32)

    @checked
    def set_anchor(self, head: nn.Linear) -> None:
        """Sets the frozen backbone's head, e.g. a probe, so strength moves both; a ConfigError for another shape."""
        check_multiclass(self.targets, "Heads are interpolated for models")
        if head.weight.shape != self.head.weight.shape:
            raise ConfigError(
                f"The anchor head is {tuple(head.weight.shape)}, the tuned head {tuple(self.head.weight.shape)}: "
                "both must be trained on the same backbone and classes."
            )
        like = self.head.weight
        self.anchor_weight, self.anchor_bias = (part.detach().to(like).clone() for part in (head.weight, head.bias))

    @torch.no_grad()
    def settle_head(self) -> None:
        """Makes the head what it is at the present strength, for good, and drops the anchor."""
        if self.anchor_weight is not None and self.anchor_bias is not None and (alpha := self._head_strength) != 1.0:
            self.head.weight.copy_(torch.lerp(self.anchor_weight, self.head.weight, alpha))
            self.head.bias.copy_(torch.lerp(self.anchor_bias, self.head.bias, alpha))
        self.anchor_weight = self.anchor_bias = None
