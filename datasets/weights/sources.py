"""Where the images and the teacher come from: lists under ``$VPT_DATA``, and AugReg ViT-Ti/16."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.models import VisionTransformer
from torch import Tensor, nn

TASKS = ("caltech101", "signdigits10")
TEACHER = "weights/vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"


def root() -> Path:
    """The folder of real data: ``$VPT_DATA``, else ``datasets``."""
    return Path(os.environ.get("VPT_DATA", "datasets"))


def read_list(task: str, name: str) -> tuple[list[Path], list[int]]:
    """Reads one split.

    Args:
        task: Folder under `root()`.
        name: List name without suffix, e.g. ``"train800val200"``.

    Returns:
        Image paths and labels, in file order.
    """
    rows = [line.rsplit(None, 1) for line in (root() / task / f"{name}.txt").read_text().splitlines() if line]
    return [root() / task / path for path, _ in rows], [int(label) for _, label in rows]


def squash(path: Path, size: int) -> Image.Image:
    """Decodes an image as RGB and resizes it to ``size`` × ``size`` pixels, whatever its shape (VTAB's way)."""
    return Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)


def normalize(images: Tensor) -> Tensor:
    """Turns uint8 images (B, H, W, 3) into the network's input (B, 3, H, W): mean 0.5, standard deviation 0.5."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def teacher(image_size: int = 224) -> VisionTransformer:
    """Builds the frozen ViT-Ti/16 with its ImageNet-1k head, its position embedding resampled to ``image_size``."""
    overlay = {"file": str(root() / TEACHER)}
    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, img_size=image_size
    )
    return model.eval().requires_grad_(False)


@cache
def plain_images(task: str, name: str, size: int) -> tuple[Tensor, list[int]]:
    """One split as uint8 images (N, size, size, 3), each squashed, and its labels."""
    paths, labels = read_list(task, name)
    return torch.from_numpy(np.stack([np.asarray(squash(path, size)) for path in paths])), labels


@torch.inference_mode()
def features(model: nn.Module, images: Tensor, batch: int = 50) -> Tensor:
    """Pooled features after the final norm, (N, 192), of uint8 images (N, H, W, 3)."""
    network: Any = model
    parts = [network.forward_features(normalize(part)) for part in torch.split(images, batch)]
    return torch.cat([network.forward_head(part, pre_logits=True) for part in parts])
