"""The head that belongs to the bare backbone: the other end of the head's interpolation."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import nn

from vpt.errors import ConfigError
from vpt.tuning.files import read_header
from vpt.tuning.model import TunedModel


def read_anchor(path: Path, model: TunedModel) -> nn.Linear:
    """Reads the head of a linear probe that was trained beside a tuned model.

    Args:
        path: The linear probe's delta file.
        model: The tuned model.

    Returns:
        The (classes, features) head.

    Raises:
        DeltaFileError: The file is not a delta file.
        ConfigError: It is not a linear probe, or was trained on another backbone, preprocessing or other classes.
    """
    header = read_header(path)
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
    if set(tensors) != {"head.weight", "head.bias"}:
        raise ConfigError(f"The anchor {path} is not a linear probe: it holds more than a head.")
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
                f"The anchor {path} was trained with other {what} than the delta: train the linear probe on the same "
                "task and backbone."
            )
    head = nn.Linear(backbone.num_features, len(model.class_names))
    head.load_state_dict({key.removeprefix("head."): tensor for key, tensor in tensors.items()})
    return head
