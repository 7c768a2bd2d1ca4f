"""How a model's attention changes with its prompts, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from vpt.backbones import class_attention
from vpt.deltas.prompt import Prompt
from vpt.errors import ConfigError
from vpt.models import TunedModel
from vpt.reports.style import ACCENT, NEUTRAL, short, style
from vpt.visualize.attention_maps import evaluating, strength
from vpt.visualize.figure_panels import UNTUNED_TUNED, WITHOUT_WITH, Array, Grid, draw_pairs, head

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class PromptAttention:
    """Attention of the class token (of the mean patch where there is none) with and without prompts.

    Attributes:
        without: (B, rows, columns), last block at strength 0, mean over heads, relative to uniform: 1 everywhere if
            all patches got the same.
        with_prompts: The same at strength 1.
        share: (layers, B, heads) in [0, 1], the part of each layer's attention that prompts take at strength 1; NaN
            where a layer has fewer heads than another.
        uniform: (layers,), what that part would be if all tokens, prompts included, got the same.
        guesses: Most likely class and its probability at strength 0 and 1 for each image: two lists of (class, p).
    """

    without: Array
    with_prompts: Array
    share: Array
    uniform: Array
    guesses: tuple[list[tuple[int, float]], list[tuple[int, float]]]


def has_prompts(model: TunedModel) -> bool:
    """Says whether a model has prompts.

    Args:
        model: Any.

    Returns:
        Whether any part of its delta is a `Prompt`.
    """
    return model.delta is not None and any(isinstance(part, Prompt) for part in model.delta.parts)


@torch.no_grad()
def measure_attention(model: TunedModel, images: Tensor) -> PromptAttention:
    """Runs images through a model at strength 0 and 1; mode and strength are put back afterwards.

    Args:
        model: With prompts.
        images: uint8 (B, 3, H, W).

    Returns:
        Maps, shares and predictions.

    Raises:
        ConfigError: The model has no prompts.
        UnsupportedBackboneError: The backbone's attention cannot be read.
    """
    if not has_prompts(model):
        raise ConfigError("The model has no prompts, so there is nothing to compare.")
    images = images.to(model.head.weight.device)
    layers, guesses = [], []
    for alpha in (0.0, 1.0):
        with evaluating(model), strength(model, alpha):
            layers.append(class_attention(model.backbone, images))
            chances, classes = model(images).softmax(dim=1).max(dim=1)
            guesses.append(list(zip(classes.tolist(), chances.tolist(), strict=True)))
    maps = [_relative(layer[-1].patches, model.backbone.layout.grid) for layer in layers]
    return PromptAttention(
        without=maps[0],
        with_prompts=maps[1],
        share=_side_by_side([layer.prompts.sum(dim=2).float().cpu() for layer in layers[1]]),
        uniform=np.array([layer.prompts.shape[2] / layer.keys for layer in layers[1]], dtype=np.float32),
        guesses=(guesses[0], guesses[1]),
    )


def _side_by_side(shares: Sequence[Tensor]) -> Array:
    """(B, heads) for each layer as one table; a Swin's later stages have more heads."""
    width = max(share.shape[1] for share in shares)
    table: Array = np.full((len(shares), len(shares[0]), width), np.nan, dtype=np.float32)
    for row, share in zip(table, shares, strict=True):
        row[:, : share.shape[1]] = share.numpy()
    return table


def _relative(patches: Tensor, grid: tuple[int, int]) -> Array:
    """Mean over heads, over the mean over patches: (B, heads, N) to (B, rows, columns)."""
    attention = patches.float().mean(dim=1)
    relative = attention / attention.mean(dim=1, keepdim=True)
    maps: Array = relative.reshape(-1, *grid).cpu().numpy()
    return maps


_MAPS_LABEL = "attention to a patch ÷ mean over patches\n(under each map: the predicted class)"


def draw_attention(
    model: TunedModel, images: Tensor, labels: Tensor | None, measured: PromptAttention | None = None
) -> Figure:
    """Draws the attention figure.

    Args:
        model: With prompts.
        images: uint8 (B, 3, H, W).
        labels: int64 (B,), or None where they are not known.
        measured: What `measure_attention` gave for them, if it is known already.

    Returns:
        A row per image (input, attention without, with, difference) over the prompts' share in every layer. Without
        the prompts is without the whole delta: where it has other parts the titles say untuned and tuned.

    Raises:
        ConfigError: The model has no prompts.
    """
    from matplotlib.figure import Figure

    measured = measure_attention(model, images) if measured is None else measured
    rows = len(images)
    with style():
        figure = Figure(figsize=(7.4, 1.75 * rows + 3.6), layout="constrained")
        top, bottom = cast("Any", figure.subfigures(2, 1, height_ratios=[1.75 * rows + 1.0, 2.6]))
        axes = top.subplots(rows, 4, squeeze=False)
        only = model.delta is not None and all(isinstance(part, Prompt) for part in model.delta.parts)
        words = WITHOUT_WITH if only else UNTUNED_TUNED
        draw_pairs(axes, measured.without, measured.with_prompts, images, _MAPS_LABEL, words)
        _caption_rows(axes, measured, labels, model.class_names)
        subject = "class token" if model.backbone.layout.has_class_token else "mean patch (no class token)"
        head(top, f"Where the {subject} looks in the last block")
        _draw_shares(bottom.subplots(), measured)
    return figure


def _caption_rows(axes: Grid, measured: PromptAttention, labels: Tensor | None, class_names: Sequence[str]) -> None:
    truths = [None] * len(axes) if labels is None else labels.tolist()
    for position, (row, truth) in enumerate(zip(axes, truths, strict=True)):
        if truth is not None:
            row[0].set_xlabel(short(class_names[truth]))
        for cell, guesses in zip(row[1:3], measured.guesses, strict=True):
            guess, chance = guesses[position]
            mark = "" if truth is None else "✓ " if guess == truth else "✗ "
            cell.set_xlabel(
                f"{mark}{short(class_names[guess])} ({chance:.0%})", color=ACCENT if mark == "✗ " else NEUTRAL
            )


def _draw_shares(axes: Axes, measured: PromptAttention) -> None:
    layers = np.arange(1, len(measured.share) + 1)
    heads = 100 * measured.share.mean(axis=1)
    axes.fill_between(layers, np.nanmin(heads, axis=1), np.nanmax(heads, axis=1), color=ACCENT, alpha=0.18, linewidth=0)
    axes.plot(
        layers,
        np.nanmean(heads, axis=1),
        color=ACCENT,
        marker="o",
        markersize=4,
        label="mean (band: lowest to highest head)",
    )
    axes.plot(
        layers, 100 * measured.uniform, color=NEUTRAL, linestyle="--", linewidth=1, label="if all tokens got the same"
    )
    axes.set_title("Share of its attention that the prompts take", loc="left")
    axes.set_xlabel("layer")
    axes.set_ylabel("% of attention")
    axes.set_xticks(layers[:: 1 + len(layers) // 20])
    axes.set_ylim(0, None)
    axes.legend(frameon=False)
