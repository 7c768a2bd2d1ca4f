"""What a model attends to, with and without its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vpt.backbones import class_attention
from vpt.data import ImageDataset, Preset
from vpt.data.images import decode_rgb
from vpt.errors import ConfigError, DataError
from vpt.robustness.shifts import subset
from vpt.tuning import TunedModel, load
from vpt.tuning.prompts import Prompt
from vpt.visualize.figures import ACCENT, DIVERGING, NEUTRAL, SEQUENTIAL, save_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_IMAGES = 6
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"}


@dataclass(frozen=True)
class PromptAttention:
    """Attention of the class token (of the mean patch where there is none) with and without prompts.

    Attributes:
        without: (B, rows, columns), last block at strength 0, mean over heads, relative to uniform: 1 everywhere if
            all patches got the same.
        with_prompts: The same at strength 1.
        share: (layers, B, heads) in [0, 1], the part of each layer's attention that prompts take at strength 1.
        uniform: (layers,), what that part would be if all tokens, prompts included, got the same.
        guesses: Most likely class and its probability at strength 0 and 1 for each image: two lists of (class, p).
    """

    without: NDArray[np.float32]
    with_prompts: NDArray[np.float32]
    share: NDArray[np.float32]
    uniform: NDArray[np.float32]
    guesses: tuple[list[tuple[int, float]], list[tuple[int, float]]]


def attention_figure(delta: Path, images: Sequence[Path], out: Path, weights: str | None = None) -> Path:
    """Draws what a delta file's model attends to on some images, without and with its prompts.

    Args:
        delta: A delta file with prompts.
        images: Image files; a folder stands for its first six images by name.
        out: ``.png``, ``.svg`` or ``.pdf``.
        weights: Where the backbone's weights are; None for where they were at training time.

    Returns:
        The figure's path.

    Raises:
        ConfigError: The delta holds no prompts, or `out` has another suffix.
        DataError: There is no image, or one cannot be read.
        DeltaFileError: The file is not a delta file, or belongs to other weights.
        WeightsError: The backbone's weights cannot be found.
    """
    model = load(delta, weights)
    if not has_prompts(model):
        raise ConfigError(f"{delta} holds no prompts, so there is nothing to compare: give a prompt run's delta file.")
    preset = Preset.from_dict(model.preset)
    batch = np.stack([_read(path, preset, model.backbone.image_size) for path in _expand(images)])
    figure = draw_attention(model, torch.from_numpy(batch).permute(0, 3, 1, 2), None)
    return save_figure(figure, out)


def attention_figure_from_batch(model: TunedModel, images: Tensor, labels: Tensor | None, out: Path) -> Path:
    """Draws the same figure for images that are loaded already.

    Args:
        model: With prompts.
        images: uint8 (B, 3, H, W).
        labels: int64 (B,), or None where they are not known.
        out: ``.png``, ``.svg`` or ``.pdf``.

    Returns:
        The figure's path.

    Raises:
        ConfigError: The model has no prompts, or `out` has another suffix.
    """
    return save_figure(draw_attention(model, images, labels), out)


def sample_images(dataset: ImageDataset, number: int = NUM_IMAGES, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draws a few images of different classes.

    Args:
        dataset: A split of a data module.
        number: How many, at least 1; fewer come back if the split is smaller.
        seed: Of the draw.

    Returns:
        Images uint8 (B, 3, H, W) and labels int64 (B,), in list order.
    """
    index = subset(dataset.labels, number, seed)
    return torch.stack([dataset[int(i)]["image"] for i in index]), torch.from_numpy(dataset.labels[index])


def has_prompts(model: TunedModel) -> bool:
    """Says whether a model has prompts.

    Args:
        model: Any.

    Returns:
        Whether any part of its delta is a `Prompt`.
    """
    return model.delta is not None and any(isinstance(part, Prompt) for part in model.delta.parts)


@torch.inference_mode()
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
    mode, strength = model.training, model.strength
    layers, guesses = [], []
    model.eval()
    try:
        for alpha in (0.0, 1.0):
            model.set_strength(alpha)
            layers.append(class_attention(model.backbone, images))
            chances, classes = model(images).softmax(dim=1).max(dim=1)
            guesses.append(list(zip(classes.tolist(), chances.tolist(), strict=True)))
    finally:
        model.set_strength(strength)
        model.train(mode)
    maps = [_relative(layer[-1].patches, model.backbone.layout.grid) for layer in layers]
    tokens = [(layer.prompts.shape[2], layer.prefix.shape[2] + layer.patches.shape[2]) for layer in layers[1]]
    return PromptAttention(
        without=maps[0],
        with_prompts=maps[1],
        share=torch.stack([layer.prompts.sum(dim=2) for layer in layers[1]]).float().cpu().numpy(),
        uniform=np.array([prompts / (prompts + others) for prompts, others in tokens], dtype=np.float32),
        guesses=(guesses[0], guesses[1]),
    )


def draw_attention(model: TunedModel, images: Tensor, labels: Tensor | None) -> Figure:
    """Draws the attention figure.

    Args:
        model: With prompts.
        images: uint8 (B, 3, H, W).
        labels: int64 (B,), or None where they are not known.

    Returns:
        A row per image (input, attention without, with, difference) over the prompts' share in every layer.

    Raises:
        ConfigError: The model has no prompts.
    """
    from matplotlib.figure import Figure

    measured = measure_attention(model, images)
    rows = len(images)
    with style():
        figure = Figure(figsize=(7.4, 1.75 * rows + 3.6), layout="constrained")
        top, bottom = cast("Any", figure.subfigures(2, 1, height_ratios=[1.75 * rows + 1.0, 2.6]))
        axes = top.subplots(rows, 4, squeeze=False)
        _draw_maps(axes, measured, images)
        _caption_rows(axes, measured, labels, model.class_names)
        subject = "class token" if model.backbone.layout.has_class_token else "patches"
        top.suptitle(f"Where the {subject} looks in the last block", x=0.01, ha="left", fontsize=12, weight="bold")
        _draw_shares(bottom.subplots(), measured)
    return figure


def _relative(patches: Tensor, grid: tuple[int, int]) -> NDArray[np.float32]:
    """Mean over heads, over the mean over patches: (B, heads, N) to (B, rows, columns)."""
    attention = patches.float().mean(dim=1)
    relative = attention / attention.mean(dim=1, keepdim=True)
    maps: NDArray[np.float32] = relative.reshape(-1, *grid).cpu().numpy()
    return maps


def _draw_maps(axes: NDArray[np.object_], measured: PromptAttention, images: Tensor) -> None:
    difference = measured.with_prompts - measured.without
    both = np.concatenate([measured.without, measured.with_prompts])
    # A few sink patches can get 50 times the mean; they saturate so that the others stay visible.
    high, reach = float(np.quantile(both, 0.99)), float(np.quantile(np.abs(difference), 0.99))
    for row, image in zip(axes, images, strict=True):
        row[0].imshow(image.permute(1, 2, 0).cpu().numpy())
    for column, maps, colours, low, up in (
        (1, measured.without, SEQUENTIAL, 0.0, high),
        (2, measured.with_prompts, SEQUENTIAL, 0.0, high),
        (3, difference, DIVERGING, -reach, reach),
    ):
        for row, values in zip(axes, maps, strict=True):
            drawn = row[column].imshow(values, cmap=colours, vmin=low, vmax=up)
        if column != 1:
            below = axes[:, 1:3] if column == 2 else axes[:, 3]
            bar = axes[0, 0].figure.colorbar(
                drawn,
                ax=below.ravel().tolist(),
                location="bottom",
                shrink=0.8,
                aspect=30 if column == 2 else 14,
                pad=0.02,
                extend="max" if column == 2 else "both",
            )
            bar.set_label("attention to a patch ÷ mean" if column == 2 else "with − without")
            bar.outline.set_visible(False)
    for cell in axes.ravel():
        cell.set_xticks([])
        cell.set_yticks([])
        cell.spines[:].set_visible(False)


def _caption_rows(
    axes: NDArray[np.object_], measured: PromptAttention, labels: Tensor | None, class_names: Sequence[str]
) -> None:
    for cell, title in zip(axes[0], ("Input", "Without prompts", "With prompts", "Difference"), strict=True):
        cell.set_title(title)
    truths = [None] * len(axes) if labels is None else labels.tolist()
    for position, (row, truth) in enumerate(zip(axes, truths, strict=True)):
        if truth is not None:
            row[0].set_xlabel(class_names[truth])
        for cell, guesses in zip(row[1:3], measured.guesses, strict=True):
            guess, chance = guesses[position]
            mark = "" if truth is None else "✓ " if guess == truth else "✗ "
            cell.set_xlabel(f"{mark}{class_names[guess]} ({chance:.0%})", color=ACCENT if mark == "✗ " else NEUTRAL)


def _draw_shares(axes: Axes, measured: PromptAttention) -> None:
    layers = np.arange(1, len(measured.share) + 1)
    heads = 100 * measured.share.mean(axis=1)
    axes.fill_between(layers, heads.min(axis=1), heads.max(axis=1), color=ACCENT, alpha=0.18, linewidth=0)
    axes.plot(
        layers, heads.mean(axis=1), color=ACCENT, marker="o", markersize=4, label="mean (band: lowest to highest head)"
    )
    axes.plot(
        layers, 100 * measured.uniform, color=NEUTRAL, linestyle="--", linewidth=1, label="if all tokens got the same"
    )
    axes.set_title("How much of its attention the prompts take", loc="left")
    axes.set_xlabel("layer")
    axes.set_ylabel("% of attention")
    axes.set_xticks(layers)
    axes.set_ylim(0, None)
    axes.legend(frameon=False)


def _expand(paths: Sequence[Path]) -> list[Path]:
    """Files as they are, folders as their first images."""
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
            if not inside:
                raise DataError(f"There is no image in the folder {path}.")
            files += inside[:NUM_IMAGES]
        else:
            files.append(path)
    if not files:
        raise DataError("There is no image to draw: give image files or a folder of images.")
    return files


def _read(path: Path, preset: Preset, image_size: int) -> NDArray[np.uint8]:
    if not path.is_file():
        raise DataError(f"No image {path}.")
    try:
        return preset(decode_rgb(path), image_size)
    except Exception as error:  # PIL raises a dozen unrelated types on damaged files.
        raise DataError(f"{path} cannot be decoded as an image ({error}).") from error
