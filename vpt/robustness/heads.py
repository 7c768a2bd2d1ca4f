"""Heads that know the classes before anything is trained: the other end of WiSE-FT, written as delta files.

A linear probe is one too (`vpt.tuning.heads.read_head` reads either). Text heads begin in `vpt.robustness.text`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vpt.backbones import Backbone, pretrained_head
from vpt.errors import ConfigError
from vpt.tuning.files import save_delta
from vpt.tuning.model import TunedModel


def sub_head(head: nn.Linear, classes: Sequence[int]) -> nn.Linear:
    """Takes the rows of a pretrained classifier that are the classes of a task.

    Args:
        head: (C, features), e.g. of the ImageNet weights of the same backbone.
        classes: For each class of the task its position in 0..C-1, in the task's order.

    Returns:
        A frozen (classes, features) head; a missing bias becomes zero.

    Raises:
        ConfigError: A position does not exist, occurs twice, or there is none.
    """
    known = head.out_features
    if not classes:
        raise ConfigError("A head needs at least one class: give a position in the pretrained head for each.")
    for place, position in enumerate(classes):
        if not 0 <= position < known:
            raise ConfigError(f"Class {place} is matched to {position}, but the pretrained head has 0 to {known - 1}.")
        if (first := classes.index(position)) != place:
            raise ConfigError(f"Classes {first} and {place} are both matched to {position}: only one could ever win.")
    rows = torch.tensor(list(classes), device=head.weight.device)
    bias = head.weight.new_zeros(known) if head.bias is None else head.bias
    return frozen(head.weight[rows], bias[rows])


def own_head(backbone: Backbone, classes: Sequence[int] | None = None) -> nn.Linear:
    """The classifier that a backbone's weights were published with, or the part of it that a task needs.

    Args:
        backbone: From `create_backbone`.
        classes: As for `sub_head`; None for all.

    Returns:
        A frozen (classes, features) head.

    Raises:
        WeightsError: The weights have no linear classifier.
        ConfigError: The match of classes is impossible.
    """
    head = pretrained_head(backbone.name, backbone.weights)
    return head if classes is None else sub_head(head, classes)


def write_head(
    path: Path,
    backbone: Backbone,
    head: nn.Linear,
    class_names: Sequence[str],
    preset: dict[str, Any],
    info: Mapping[str, Any],
) -> Path:
    """Writes a head as a linear probe's delta file, which ``--anchor`` and ``init_head`` take.

    Args:
        path: Ends in ``.safetensors``.
        backbone: What the head reads; from `create_backbone`.
        head: (classes, features).
        class_names: The task's.
        preset: The preprocessing (`Preset.to_dict`).
        info: Where the head comes from; plain JSON values.

    Returns:
        The path.

    Raises:
        ConfigError: The head does not fit backbone or classes.
    """
    if head.weight.shape != (len(class_names), backbone.num_features):
        raise ConfigError(
            f"The head is {tuple(head.weight.shape)}, but {backbone.name} has {backbone.num_features} features and the "
            f"task {len(class_names)} classes."
        )
    model = TunedModel(backbone, len(class_names), (), class_names, preset)
    model.head.load_state_dict(head.state_dict())
    model.info = dict(info)
    return save_delta(path, model)


def frozen(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A head that does not train.

    Args:
        weight: (classes, features).
        bias: (classes,).
    """
    made = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        made.weight.copy_(weight)
        made.bias.copy_(bias)
    return made.requires_grad_(False)
