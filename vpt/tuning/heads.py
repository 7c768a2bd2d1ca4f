"""The head of one delta file for another model: of a linear probe, or a zero-shot one."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from vpt.errors import ConfigError
from vpt.tuning.files import read_delta
from vpt.tuning.model import TunedModel


def read_head(path: str | Path, model: TunedModel, role: str) -> nn.Linear:
    """Reads a head that belongs to the bare backbone of a model.

    Args:
        path: A delta file that holds a head only, e.g. a linear probe's.
        model: The model, on the same backbone and classes.
        role: What the head is for, e.g. ``"anchor"``; the messages begin with it.

    Returns:
        The (classes, features) head, on the CPU.

    Raises:
        DeltaFileError: The file is not a delta file.
        ConfigError: It holds more than a head, or was made for another backbone, preprocessing or other classes.
    """
    header, tensors = read_delta(path)
    if set(tensors) != {"head.weight", "head.bias"}:
        raise ConfigError(f"The {role} {path} is not a linear probe: it holds more than a head.")
    backbone = model.backbone
    for what, theirs, ours in (
        ("backbone weights", header["backbone"]["fingerprint"], backbone.fingerprint),
        ("image size", header["backbone"]["image_size"], backbone.image_size),
        ("normalization", header["backbone"]["normalization"], backbone.normalization),
        ("preset", header["preset"], model.preset),
        ("classes", header["class_names"], model.class_names),
    ):
        if theirs != ours:
            raise ConfigError(
                f"The {role} {path} was trained with other {what} than the delta: train the linear probe on the same "
                "task and backbone."
            )
    head = nn.Linear(backbone.num_features, len(model.class_names))
    head.load_state_dict({key.removeprefix("head."): tensor for key, tensor in tensors.items()})
    return head.requires_grad_(False)
