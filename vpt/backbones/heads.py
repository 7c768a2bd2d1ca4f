"""The classifier that a backbone's weights were published with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models import load_state_dict
from torch import nn

from vpt.backbones.weights import check_name
from vpt.errors import WeightsError


def pretrained_head(name: str, weights: str = "pretrained") -> nn.Linear:
    """Reads the classifier that belongs to a backbone's weights and that `create_backbone` leaves out.

    Args:
        name: timm's `architecture` or `architecture.tag`.
        weights: ``"pretrained"`` or a path to a local file, as for `create_backbone`.

    Returns:
        A frozen layer from pooled features to logits, (classes, features).

    Raises:
        UnknownNameError: timm does not know the name.
        WeightsError: The weights cannot be found or read, or have no linear classifier.
    """
    check_name(name)
    if weights == "random":
        raise WeightsError("Random weights have no pretrained classifier: give 'pretrained' or a file.")
    key = _classifier(name)
    weight, bias = _from_hub(name) if weights == "pretrained" else _from_file(Path(weights).expanduser(), key)
    if weight is None or weight.ndim != 2:
        raise WeightsError(f"The weights {weights!r} of {name} have no linear classifier {key!r}: use tuned ones.")
    head = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.zero_() if bias is None else head.bias.copy_(bias)
    return head.requires_grad_(False).eval()


def _classifier(name: str) -> str:
    key = timm.get_pretrained_cfg(name).classifier or "head"
    return key if isinstance(key, str) else str(key[0])


def _from_hub(name: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    record = timm.get_pretrained_cfg(name)
    if not record.has_weights or not record.num_classes:
        return None, None
    try:
        layer: Any = timm.create_model(name, pretrained=True).get_classifier()
    except Exception as error:  # the hub client raises what its HTTP library does, of whatever class
        raise WeightsError(f"The hub could not be reached for {name} ({type(error).__name__}): name a file.") from error
    return getattr(layer, "weight", None), getattr(layer, "bias", None)


def _from_file(path: Path, key: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if not path.is_file():
        raise WeightsError(f"No weights file {path}: give an existing file or 'pretrained'.")
    try:
        state = cast("dict[str, torch.Tensor]", load_state_dict(str(path)))
    except Exception as error:  # whatever the bytes provoke, the file is not one of weights
        raise WeightsError(f"{path} is not a readable weights file ({type(error).__name__}).") from error
    return state.get(f"{key}.weight"), state.get(f"{key}.bias")
