"""A backbone with the classifier that it was published with, on test sets that share its classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vpt.backbones import Backbone
from vpt.data import ImageDataset


@torch.inference_mode()
def pretrained_logits(backbone: Backbone, head: nn.Linear, dataset: ImageDataset, batch_size: int = 64) -> Tensor:
    """Classifies all images of a split.

    Args:
        backbone: Frozen; the images must have its size.
        head: Its classifier, :func:`vpt.backbones.pretrained_head`.
        dataset: The split.
        batch_size: Images in a forward pass.

    Returns:
        (N, classes) logits in list order, on the CPU.
    """
    device = head.weight.device
    answers = []
    for start in range(0, len(dataset), batch_size):
        rows: Sequence[int] = range(start, min(start + batch_size, len(dataset)))
        images = torch.stack([dataset[row]["image"] for row in rows]).to(device)
        answers.append(head(backbone(images)).float().cpu())
    return torch.cat(answers)
