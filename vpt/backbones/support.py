"""Which of timm's models take which deltas: built on the meta device, where nothing is computed or downloaded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import cast

import timm
import torch
from timm.models import get_pretrained_cfg, is_model, model_entrypoint
from torch import nn

from vpt.backbones.attention_layout import read_attention
from vpt.backbones.token_layout import read_layout
from vpt.errors import UnknownNameError, UnsupportedBackboneError
from vpt.image_size import ImageSize, as_size, sides


@dataclass(frozen=True)
class Support:
    """What is known of a model of timm.

    Attributes:
        name: Its architecture, without a tag.
        family: timm's module, e.g. ``vision_transformer``.
        parameters: Of the backbone, without a classifier; 0 where timm cannot build it without its weights.
        checkpoints: The tags of its published weights; the first is timm's default.
        image_size: Of the default weights, in pixels.
        licence: Of the default weights, as timm tells it; empty where it does not.
        refused: Why it takes no deep prompts and prefixes; empty where it does.
        whole: Whether timm runs it whole, so that of what needs its blocks it takes only these.
    """

    name: str
    family: str
    parameters: int
    checkpoints: tuple[str, ...]
    image_size: ImageSize
    licence: str
    refused: str
    whole: bool

    @property
    def prompts(self) -> bool:
        """Whether deep prompts and prefixes are exact on it."""
        return not self.refused

    @property
    def tokens(self) -> bool:
        """Whether shallow prompts, adapters, LoRA by the names of its maps and attention figures are exact, too."""
        return self.prompts and not self.whole

    @property
    def builds(self) -> bool:
        """Whether a linear probe, LoRA on layers by name, SSF and all that needs no known blocks can be had."""
        return self.parameters > 0


def model_names(pattern: str = "*") -> list[str]:
    """Architectures of timm that a pattern such as ``vit_*`` describes; an UnknownNameError where there are none."""
    found = [str(name) for name in timm.list_models(pattern)]
    if not found:
        raise UnknownNameError("backbone of timm", pattern, timm.list_models())
    return found


def support(name: str) -> Support:
    """Builds a model on the meta device and reads what can be said of it; an UnknownNameError where timm has none."""
    if not is_model(name):
        raise UnknownNameError("backbone of timm", name, timm.list_models())
    tags = _tags().get(name, ())
    record = get_pretrained_cfg(f"{name}.{tags[0]}" if tags and tags[0] else name)
    family = model_entrypoint(name).__module__.rpartition(".")[2]
    size: ImageSize = 224 if record is None else as_size(record.input_size[1:])
    parameters, refused, whole = _built(name, size)
    licence = "" if record is None else str(record.license or "")
    return Support(name, family, parameters, tags, size, licence, refused, whole)


def _built(name: str, size: ImageSize) -> tuple[int, str, bool]:
    try:
        with torch.device("meta"):
            model = cast("nn.Module", timm.create_model(name, pretrained=False, num_classes=0))
    except Exception as error:  # whatever timm's constructors raise where tensors have no values
        return 0, f"timm does not build it without values: {type(error).__name__}", False
    count = sum(parameter.numel() for parameter in model.parameters())
    try:
        read_layout(model)
    except UnsupportedBackboneError:
        try:
            read_attention(model, (3, *sides(size)))
        except UnsupportedBackboneError as error:
            return count, str(error), False
        return count, "", True
    return count, "", False


@cache
def _tags() -> dict[str, tuple[str, ...]]:
    """The tags of all published weights, by architecture."""
    found: dict[str, list[str]] = defaultdict(list)
    for whole in timm.list_pretrained():
        name, _, tag = str(whole).partition(".")
        found[name].append(tag)
    return {name: _default_first(name, tags) for name, tags in found.items()}


def _default_first(name: str, tags: list[str]) -> tuple[str, ...]:
    record = get_pretrained_cfg(name)
    default = "" if record is None else str(record.tag or "")
    return tuple(sorted(tags, key=lambda tag: (tag != default, tag)))


@dataclass(frozen=True)
class Count:
    """How many names and checkpoints there are, on how many deep prompts are exact, and on how many all deltas."""

    names: int
    checkpoints: int
    prompted_names: int
    prompted_checkpoints: int
    known_names: int
    known_checkpoints: int


def count(found: Iterable[Support]) -> Count:
    """Counts what can be built."""
    built = [each for each in found if each.builds]
    groups = built, [each for each in built if each.prompts], [each for each in built if each.tokens]
    return Count(*(number for group in groups for number in (len(group), sum(len(e.checkpoints) for e in group))))
