"""WiSE-FT end-to-end: every tensor of a model moves between two endpoints, backbone and head alike.

Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, equation 1: θ(α) = (1 − α)·θ0 + α·θ1. Where each
layer has a strength of its own (LiNeS, ICLR 2025), α multiplies it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from vpt.backbones.factory import Backbone
from vpt.backbones.strength import Strength, by_place, checked_strength, times
from vpt.errors import ConfigError
from vpt.models.classifier import TunedModel
from vpt.models.delta_file import check_fingerprint, fill, load_classifier, read_head, unfilled
from vpt.models.delta_format import read_delta, targets_of
from vpt.run_record import file_identity

Way = Literal["end-to-end", "strength", "head", "none"]
"""What α moves: all tensors, the strength of a delta, the head alone, or nothing."""

COUNTER = "num_batches_tracked"
"""Batch norm's count of the batches it has seen: of no use where its momentum is a number, and no weight."""


@dataclass(frozen=True)
class Swept:
    """A classifier in eval mode, first at α = 1, that `set_alpha` moves between two models, α in [0, 1].

    `set_strength` takes one strength of all layers, or that of each; of the latter α is a share of `strengths`.
    """

    model: TunedModel
    way: Way
    set_strength: Callable[[Strength], None]
    strengths: Strength = 1.0

    def set_alpha(self, alpha: float) -> None:
        """Moves the model to α, of what each layer has."""
        self.set_strength(times(alpha, self.strengths))

    def halves(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """Images to what is the same at every α, and from there to logits."""
        halves = None if self.way == "end-to-end" else self.model.constant_part()
        if halves is None:
            return lambda images: images, self.model
        before, after = halves
        return before, lambda encoded: self.model.classify(after(encoded))


class Interpolation:
    """Writes θ(α) into one set of tensors, from both endpoints every time, so that nothing drifts.

    Only floating tensors that differ are interpolated, batch-norm statistics among them. Batch norm's counter of
    batches is the start's at α = 0 and the end's elsewhere. Besides these tensors it holds a copy of their start, which
    may share memory with them; their end may lie in a file that is mapped into memory.
    """

    def __init__(
        self,
        targets: Mapping[str, Tensor],
        start: Mapping[str, Tensor],
        end: Mapping[str, Tensor],
        backbone: Backbone | None = None,
    ) -> None:
        """Checks the endpoints, and sets what both share; targets hold anything, under each name of an endpoint.

        A `backbone` that the tensors are of says in which layer each lies. Raises a ConfigError if names, shapes or
        types of the endpoints differ, or integers other than that counter do.
        """
        check_alike(start, end)
        if strange := sorted(end.keys() - targets.keys()):
            raise ConfigError(f"The endpoints hold {_some(strange)}, which this model does not have.")
        self._backbone = backbone
        self._moving: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for key, last in end.items():
            target, first = targets[key], start[key]
            if same_bits(first, last):
                target.copy_(last)
            else:
                self._moving[key] = target, first.to(target.device).clone(), last.to(target.device)

    @torch.no_grad()
    def set_alpha(self, strength: Strength) -> None:
        """Moves the targets to α in [0, 1], else a ConfigError; the endpoints themselves come back bit for bit."""
        alphas = self._by_tensor(strength)
        for key, (target, start, end) in self._moving.items():
            alpha = alphas[key]
            if alpha in (0.0, 1.0) or not end.is_floating_point():  # lerp would turn −0 into 0 at the ends
                target.copy_(start if alpha == 0.0 else end)
            else:
                torch.lerp(start, end, alpha, out=target)

    def _by_tensor(self, strength: Strength) -> dict[str, float]:
        if self._backbone is not None:
            strength = checked_strength(strength, self._backbone)
            if not isinstance(strength, float):
                names = {key: key.removeprefix("backbone.model.") for key in self._moving}
                return by_place(strength, names, self._backbone)
        if not isinstance(strength, float | int) or not 0.0 <= strength <= 1.0:
            raise ConfigError(f"α lies between 0 (start) and 1 (end), got {strength}.")
        return dict.fromkeys(self._moving, float(strength))


def sweep(
    delta: Path,
    model: TunedModel,
    tensors: Mapping[str, Tensor],
    alphas: Sequence[float],
    anchor: Path | None = None,
    start: Path | None = None,
    strengths: Strength = 1.0,
) -> Swept:
    """Puts a delta file's tensors into its model (`vpt.models.delta_file.unfilled`), at α = 1, so that α moves it.

    The head at α = 0 is that of the anchor, a linear probe's delta file; the start is a delta file of the same
    architecture that α = 0 is to be, None for the pretrained backbone. `strengths` are those of the layers at α = 1.

    Raises:
        ConfigError: The endpoints do not belong together, or the head at α = 0 would be a random one.
        DeltaFileError: A file is not a delta file, or belongs to other weights.
    """
    head = None if anchor is None else read_head(anchor, model, "anchor")
    if start is not None:
        if not isinstance(strengths, float):
            raise ConfigError(
                "With --start deltas are interpolated as a whole, not layer by layer: leave out strengths."
            )
        return _end_to_end(model, _read_start(start, model, head), tensors, strengths)
    if any(key.startswith("backbone.") for key in tensors):
        if list(alphas) == [1.0] and strengths == 1.0:
            fill(model, tensors, str(delta))
            return _unmoved(model, strengths)
        if head is None:
            raise ConfigError(
                f"{delta} trained the whole backbone, so at α = 0 there is the pretrained one, whose head for these "
                "classes would be drawn at random: give --anchor with a linear probe's delta file"
                + (", or --alphas 1." if strengths == 1.0 else ".")
            )
        bare = {key: tensor for key, tensor in model.state_dict().items() if key.startswith("backbone.")}
        if not all(key in tensors and same_bits(tensor, tensors[key]) for key, tensor in bare.items()):
            return _end_to_end(model, bare | _named(head.to(tensors["head.weight"].dtype)), tensors, strengths)
        tensors = {key: tensor for key, tensor in tensors.items() if key not in bare}  # it is the bare backbone
    fill(model, tensors, str(delta))
    if head is not None:
        model.set_anchor(head)
    if model.delta is None and head is None:
        return _unmoved(model, strengths)
    way: Way = "strength" if model.delta is not None else "head"
    swept = Swept(model, way, model.set_strength, strengths)
    swept.set_alpha(1.0)
    return swept


def weakened(
    delta: Path, strengths: float | Sequence[float], anchor: Path | None = None, weights: str | None = None
) -> TunedModel:
    """Loads the model of a delta file at strengths as `checked_strength` reads them; for the rest see `sweep`.

    Its `info` says so, and has no metrics, which are of the tuned model.
    """
    model, tensors = unfilled(delta, weights)
    layers = checked_strength(strengths, model.backbone)
    if layers == 1.0:
        return load_classifier(delta, weights)
    model = sweep(delta, model, tensors, [0.0, 1.0], anchor, None, layers).model
    told = {"strengths": layers, "anchor": None if anchor is None else file_identity(anchor)}
    model.info = {key: value for key, value in model.info.items() if key != "metrics"} | told
    return model


def _unmoved(model: TunedModel, strengths: Strength) -> Swept:
    if strengths != 1.0:
        raise ConfigError("Strengths of layers move nothing here: give --anchor with a linear probe's delta file.")
    return Swept(model, "none", model.set_strength)


def _end_to_end(
    model: TunedModel, start: Mapping[str, Tensor], end: Mapping[str, Tensor], strengths: Strength
) -> Swept:
    line = Interpolation(model.state_dict(), start, end, model.backbone)
    swept = Swept(model, "end-to-end", line.set_alpha, strengths)
    swept.set_alpha(1.0)
    return swept


def check_alike(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Refuses two sets of named tensors that cannot be combined, with a ConfigError that names the tensor.

    They must agree in names, shapes and types, and in all integers but batch norm's counter of batches.
    """
    for where, extra in (("first", ours.keys() - theirs.keys()), ("second", theirs.keys() - ours.keys())):
        if extra:
            raise ConfigError(
                f"Only the {where} of two models holds {_some(sorted(extra))}: combine models of one kind."
            )
    for key, one in ours.items():
        other = theirs[key]
        if one.shape != other.shape:
            raise ConfigError(f"{key!r} has shape {tuple(one.shape)} in one model and {tuple(other.shape)} in another.")
        if one.dtype != other.dtype:
            raise ConfigError(f"{key!r} is {one.dtype} in one model and {other.dtype} in another.")
        if not one.is_floating_point() and key.rpartition(".")[2] != COUNTER and not same_bits(one, other):
            raise ConfigError(
                f"{key!r} ({one.dtype}) differs between two models: only floating tensors can be combined, all others "
                "must be equal."
            )


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, on any device, are the same bit for bit: 0 is not −0, and NaN is itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.flatten().view(torch.uint8), other.to(one.device).flatten().view(torch.uint8))


def _read_start(path: Path, model: TunedModel, head: nn.Linear | None) -> dict[str, Tensor]:
    header, tensors = read_delta(path)
    check_fingerprint(str(path), header["backbone"], model.backbone)
    specs = [] if model.delta is None else model.delta.specs
    for what, theirs, ours in (
        ("another delta", header["specs"], specs),
        ("other classes", header["class_names"], model.class_names),
        ("another preset", header["preset"], model.preset),
        ("other targets", targets_of(header), model.targets),
    ):
        if theirs != ours:
            raise ConfigError(f"The start {path} has {what}: give a delta file of the same configuration.")
    if head is not None:
        return tensors | _named(head)
    if header["info"].get("random_head"):
        raise ConfigError(
            f"The head in {path} was drawn at random: give --anchor with a linear probe's delta file for α = 0."
        )
    return tensors


def _named(head: nn.Linear) -> dict[str, Tensor]:
    return {f"head.{key}": tensor for key, tensor in head.state_dict().items()}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
