"""Models whose every trained tensor differs from what it was drawn as."""

from __future__ import annotations

from typing import Any

import timm
import torch

from vpt.backbones import Backbone, create_backbone
from vpt.models.classifier import TunedModel

DEPTHS: dict[str, dict[str, Any]] = {
    "vit_nano_patch8_64": {"depth": 2},
    "swin_nano_patch4_window8_64": {"depths": (2, 1)},  # windows, shifted ones, and behind a merging
}


def tuned(name: str, weights: str, deltas: list[dict[str, object]]) -> TunedModel:
    torch.manual_seed(0)
    return _moved(TunedModel(create_backbone(name, weights), 5, deltas))


def small(name: str, deltas: list[dict[str, object]]) -> TunedModel:
    """A shipped architecture with few blocks and random weights: exporters take time for each block."""
    torch.manual_seed(0)
    backbone = Backbone(timm.create_model(name, **DEPTHS[name]), name, "random", "random", 64, "weights")
    return _moved(TunedModel(backbone, 5, deltas))


def _moved(model: TunedModel) -> TunedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()
