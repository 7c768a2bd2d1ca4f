"""Models whose every trained tensor differs from what it was drawn as."""

from __future__ import annotations

import torch

from vpt.backbones import create_backbone
from vpt.models.classifier import TunedModel


def tuned(name: str, weights: str, deltas: list[dict[str, object]]) -> TunedModel:
    torch.manual_seed(0)
    model = TunedModel(create_backbone(name, weights), 5, deltas)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()
