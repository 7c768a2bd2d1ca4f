"""The two students: how each starts, and how long it learns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from sources import teacher
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor, nn

import vpt.backbones.bundled  # noqa: F401 - registers the models with timm

# Dropped one at a time, these six hurt the cosine similarity of the CLS features to the teacher's least. After 40 steps
# they led every second block by 0.62 to 0.56.
KEPT_BLOCKS = (0, 1, 2, 4, 6, 7)


@dataclass(frozen=True)
class Student:
    """A backbone to be distilled, and its schedule.

    Attributes:
        start: Builds the model that the training starts from.
        averages: Whether its feature is the mean of its 8 × 8 tokens, not a token of its own.
        rounds: Rounds of 2,300 views.
        passes: Passes over them.
        warmup: Steps over which the learning rate rises.
        cooldown: Passes over which it falls to zero.
        precision: Of its matrix products.
    """

    start: Callable[[], nn.Module]
    averages: bool
    rounds: int
    passes: int
    warmup: int
    cooldown: int
    precision: torch.dtype


def trimmed_teacher() -> nn.Module:
    """Builds the ViT from the teacher: `KEPT_BLOCKS`, and embeddings resampled to patches of 8 in 64 pixels."""
    student: nn.Module = timm.create_model("vit_nano_patch8_64")
    state = {}
    for key, value in teacher().state_dict().items():
        prefix, _, rest = key.partition(".")
        if prefix == "blocks":
            block, _, name = rest.partition(".")
            if int(block) in KEPT_BLOCKS:
                state[f"blocks.{KEPT_BLOCKS.index(int(block))}.{name}"] = value
        elif prefix != "head":
            state[key] = value
    state["patch_embed.proj.weight"] = resample_patch_embed(state["patch_embed.proj.weight"], [8, 8])
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [8, 8])
    student.load_state_dict(state)
    return student


def grafted_swin() -> nn.Module:
    """Builds the Swin with the six blocks and the last norm of the shipped ViT as its second stage, the rest random.

    There one window is the whole grid of 8 × 8 tokens: a block whose position bias is zero is a block of the ViT.
    """
    student: nn.Module = timm.create_model("swin_nano_patch4_window8_64")
    state = student.state_dict()
    for key, value in timm.create_model("vit_nano_patch8_64", pretrained=True).state_dict().items():
        grafted = f"layers.1.{key}" if key.startswith("blocks.") else key
        if grafted.startswith(("layers.1.", "norm.")):
            state[grafted] = value
    student.load_state_dict(state)
    return student


def tokens(student: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Runs a student on normalised images (B, 3, 64, 64).

    Returns:
        Its feature, (B, 192), and its normed 8 × 8 tokens, (B, 64, 192).
    """
    model: Any = student
    found = model.forward_features(images)
    patches = found.flatten(1, 2) if found.ndim == 4 else found[:, 1:]
    return model.forward_head(found, pre_logits=True), patches


STUDENTS = {
    "vit_nano_patch8_64": Student(
        trimmed_teacher,
        averages=False,
        rounds=5,
        passes=3,
        warmup=100,
        cooldown=1,
        precision=torch.float32,
    ),
    # Half of it is new, so it needs more views and passes; in bfloat16 a step costs less than half.
    "swin_nano_patch4_window8_64": Student(
        grafted_swin,
        averages=True,
        rounds=10,
        passes=8,
        warmup=200,
        cooldown=2,
        precision=torch.bfloat16,
    ),
}
