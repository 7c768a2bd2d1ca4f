"""A tiny task and the delta files of a prompt run and of a linear probe on it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vpt.backbones import create_backbone
from vpt.data import ImageDataModule
from vpt.data.splits import Split
from vpt.models import TunedModel, save_delta

CLASSES = ("ant", "bee", "cat")
SIZE = 64
BACKBONE = "test_vit"  # timm's tiny one: six blocks of width 64


def images(n: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, 3, SIZE, SIZE), dtype=np.uint8)


def split(name: str, n: int, seed: int) -> Split:
    labels = np.arange(n, dtype=np.int64) % len(CLASSES)
    return Split(f"fake/{name}.txt", [f"{name}/{i}" for i in range(n)], labels, lambda: images(n, seed))


def task(
    n: int = 10, classes: tuple[str, ...] = CLASSES, preset: str = "square", size: int = SIZE, shift: str | None = "art"
) -> ImageDataModule:
    splits = {"train": split("train", 6, 1), "val": split("val", 6, 2), "test": split("test", n, 3)}
    if shift is not None:
        splits[shift] = split(f"shift_{shift}", 5, 4)
    return ImageDataModule("fake", classes, splits, preset, size, 4, 0, 0, "none", None)


@cache
def weights(folder: Path) -> str:
    """Random weights as a file, so that a model can be loaded again."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = folder / "weights.safetensors"
    save_file(create_backbone(BACKBONE, "random", SIZE).model.state_dict(), path)
    return str(path)


def write_delta(path: Path, specs: tuple[dict[str, object], ...], seed: int = 0, **changes: object) -> Path:
    torch.manual_seed(seed)
    backbone = create_backbone(BACKBONE, weights(path.parent), SIZE)
    arguments = {"class_names": CLASSES, "preset": task().preset.to_dict()} | changes
    model = TunedModel(backbone, len(arguments["class_names"]), specs, **arguments)  # type: ignore[arg-type]
    model.info = {"starts": {}}
    with torch.no_grad():
        for tensor in filter(torch.is_floating_point, model.owned().values()):
            tensor.normal_()
    return save_delta(path, model)


def write_full(path: Path, seed: int = 0, scale: float = 0.05, **changes: object) -> Path:
    """A fully fine-tuned model: everything moved a little, the head drawn anew."""
    torch.manual_seed(seed)
    arguments = {"class_names": CLASSES, "preset": task().preset.to_dict()} | changes
    model = TunedModel(create_backbone(BACKBONE, weights(path.parent), SIZE), len(CLASSES), (), **arguments)  # type: ignore[arg-type]
    model.backbone.unfreeze()
    model.info = {"starts": {}}
    with torch.no_grad():
        for key, tensor in model.owned().items():
            tensor.add_(torch.randn_like(tensor), alpha=1.0 if key.startswith("head.") else scale)
    return save_delta(path, model)


PROMPTS = ({"name": "prompt", "num_tokens": 4, "deep": True},)


def kept(out: Path, stem: str) -> Path:
    """The one record of a set at a strength, whose name ends in the hash of its protocol."""
    (path,) = (out / "records").glob(f"{stem}-{'[0-9a-f]' * 12}.parquet")
    return path
