"""Figures of attention maps: a row for each image or prompt, one scale for what is compared.

Images are those of the maps, uint8 (B, 3, H, W), and names those of their classes, where they are known. `tuned` are
maps with the delta, `untuned` without it; None for no comparison. Layers and prompts count from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor

from vpt.deltas.prompts.prompt import Prompt
from vpt.errors import ConfigError
from vpt.models import TunedModel
from vpt.reports.style import ACCENT, NEUTRAL, SEQUENTIAL, short, style
from vpt.visualize.attention_maps import (
    Array,
    AttentionMaps,
    LayerMaps,
    PromptAttention,
    PromptShares,
    measure_attention,
)
from vpt.visualize.figure_panels import Grid, bare, chosen, colour_bar, draw_pairs, head, panels, show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LAYERS, _PROMPTS = 6, 10  # columns that fit
_SEARCHED, _CROPS = 5, 8  # prompts and patches of `nearest_figure`
_SATURATED = 0.97  # above this quantile colours saturate: sink patches get 20 times the mean and more
_TIMES = "attention to a patch ÷ mean over patches"
_WITHOUT_WITH = ("Without prompts", "With prompts", "with − without")
_UNTUNED_TUNED = ("Untuned", "Tuned", "tuned − untuned")


def draw_attention(
    model: TunedModel, images: Tensor, labels: Tensor | None, measured: PromptAttention | None = None
) -> Figure:
    """Draws a row per image (input, attention without, with, difference) over the prompts' share in every layer.

    Without the prompts is without the whole delta: where it has other parts the titles say untuned and tuned. Labels
    are int64 (B,), or None where they are not known; `measured` is what `measure_attention` gave, if it did already. A
    ConfigError where the model has no prompts.
    """
    from matplotlib.figure import Figure

    measured = measure_attention(model, images) if measured is None else measured
    rows = len(images)
    with style():
        figure = Figure(figsize=(7.4, 1.75 * rows + 3.6), layout="constrained")
        top, bottom = cast("Any", figure.subfigures(2, 1, height_ratios=[1.75 * rows + 1.0, 2.6]))
        axes = top.subplots(rows, 4, squeeze=False)
        only = model.delta is not None and all(isinstance(part, Prompt) for part in model.delta.parts)
        label = f"{_TIMES}\n(under each map: the predicted class)"
        words = _WITHOUT_WITH if only else _UNTUNED_TUNED
        draw_pairs(axes, measured.without, measured.with_prompts, images, label, words)
        _caption_rows(axes, measured, labels, model.class_names)
        subject = "the class token" if model.backbone.layout.has_class_token else "the mean patch (no class token)"
        head(top, f"Attention of {subject} in the last block")
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
    mean, even = np.nanmean(heads, axis=1), 100 * measured.uniform
    axes.plot(layers, mean, "o-", color=ACCENT, markersize=4, label="mean over heads (band: min to max)")
    axes.plot(layers, even, "--", color=NEUTRAL, linewidth=1, label="uniform attention")
    axes.set_title("Share of its attention on prompts", loc="left")
    axes.set_xlabel("layer")
    axes.set_ylabel("% of attention")
    axes.set_xticks(layers[:: 1 + len(layers) // 20])
    axes.set_ylim(0, None)
    axes.legend(frameon=False)


def subject_figure(
    images: Tensor, tuned: AttentionMaps, untuned: AttentionMaps | None = None, names: Sequence[str] = ()
) -> Figure:
    """Draws the class token's attention to patches in several layers; the mean over patches where there is none.

    There is a row for each image and model, a column for each of up to six layers; on Swin in each layer's own grid.
    """
    layers = chosen(len(tuned.layers), _LAYERS)
    pairs = [("", tuned)] if untuned is None else [("untuned", untuned), ("tuned", tuned)]
    rows, labels = [], []
    for place in range(len(images)):
        for name, maps in pairs:
            rows.append([_relative(maps.layers[layer].patches[place].mean(axis=0)) for layer in layers])
            labels.append(name)
    shown = [image for image in images for _ in pairs]
    captions = [name for name in names for _ in pairs]
    return _grid(
        f"What {tuned.subject} attends to, mean over heads",
        shown,
        rows,
        [f"layer {layer + 1}" for layer in layers],
        _TIMES,
        captions,
        labels=labels,
    )


def prompts_figure(images: Tensor, tuned: AttentionMaps, names: Sequence[str] = (), layer: int | None = None) -> Figure:
    """Draws what each of the first ten prompts attends to, by its own query; see `LayerMaps.from_prompts`.

    Without a layer it is the one whose patches attend most to prompts, of those whose prompts have queries: not so
    where there are only the keys of prefixes. A ConfigError where no prompt of this layer has a query.
    """
    if layer is None:
        layer = max(range(len(tuned.layers)), key=lambda block: _asked_most(tuned.layers[block]))
    looks = tuned.layers[layer].from_prompts
    if not looks.shape[1]:
        raise ConfigError(f"No prompt has a query in layer {layer + 1}, so there is no attention of prompts to draw.")
    prompts = range(min(looks.shape[1], _PROMPTS))
    dead = "Deep prompts: the output does not depend on this query." if tuned.dead_queries else ""
    return _grid(
        f"What each prompt attends to in layer {layer + 1}, by its own{' (unused)' if dead else ''} query",
        list(images),
        [[_relative(looks[place, prompt]) for prompt in prompts] for place in range(len(images))],
        [f"prompt {prompt + 1}" for prompt in prompts],
        _TIMES,
        names,
        note=dead,
    )


def mass_figure(images: Tensor, tuned: AttentionMaps, names: Sequence[str] = ()) -> Figure:
    """Draws how much of each patch's attention goes to the prompts in up to six layers; below each map its mean."""
    layers = chosen(len(tuned.layers), _LAYERS)
    rows = [[100 * tuned.layers[layer].mass[place] for layer in layers] for place in range(len(images))]
    return _grid(
        "Attention of each patch to the prompts, mean over heads",
        list(images),
        rows,
        [f"layer {layer + 1}" for layer in layers],
        "% of the patch's attention",
        names,
        below=[[f"mean {percent(float(values.mean()))}%" for values in row] for row in rows],
    )


def rollout_figure(
    images: Tensor, tuned: AttentionMaps, untuned: AttentionMaps | None = None, names: Sequence[str] = ()
) -> Figure:
    """Draws attention followed through all blocks; below each map how much comes from all patches and all prompts."""
    title = "Attention rollout: which patches the pooled features come from"
    after = np.stack([_relative(own) for own in tuned.rollout.patches])
    sources = [_sources(tuned, place) for place in range(len(images))]
    label = "rollout of a patch ÷ mean over patches"
    if untuned is None:
        below = [[text] for text in sources]
        return _grid(title, list(images), [[own] for own in after], ["all layers"], label, names, below=below)
    before = np.stack([_relative(own) for own in untuned.rollout.patches])
    with panels((7.4, 1.85 * len(images) + 1.2), len(images), 4, title) as (figure, axes):
        draw_pairs(axes, before, after, images, label, _UNTUNED_TUNED)
        figure.axes[-1].tick_params(labelsize=7.5)  # differences are small: their ticks are long and their bar is short
        for place, row in enumerate(axes):
            row[0].set_xlabel(short(names[place]) if names else "")
            row[1].set_xlabel(_sources(untuned, place))
            row[2].set_xlabel(sources[place])
    return figure


def share_figure(shares: PromptShares) -> Figure:
    """Draws the share of attention on prompts for each layer and head, a heat map for each table."""
    tables = shares.tables
    depth, heads = next(iter(tables.values())).shape
    high = 100 * float(np.nanmax(list(tables.values())))
    size = (1.6 + len(tables) * max(2.4, 0.42 * heads), 1.3 + max(1.8, 0.3 * depth))
    with panels(size, 1, len(tables), "Share of attention on prompts") as (figure, grid):
        for axes, (name, table) in zip(grid[0], tables.items(), strict=True):
            image = axes.imshow(100 * table, cmap="Oranges", vmin=0, vmax=high, aspect="auto")
            for (layer, head), value in np.ndenumerate(100 * table):
                colour = "white" if value > 0.65 * high else "black"
                text = "" if np.isnan(value) else percent(float(value))
                axes.text(head, layer, text, ha="center", va="center", fontsize=8, color=colour)
            axes.set_xticks(range(heads), [str(head + 1) for head in range(heads)])
            axes.set_yticks(range(depth), [str(layer + 1) for layer in range(depth)])
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            axes.set_title(name, loc="left")
            axes.set_xlabel("head")
        grid[0, 0].set_ylabel("layer")
        label = f"% of attention\n(uniform attention: {_uniform(shares.uniform)}%)"
        colour_bar(image, grid, label, pad=0.02, aspect=18)
    return figure


def nearest_patches(layer: LayerMaps, prompt: int, number: int = _CROPS) -> list[tuple[int, int, int, float]]:
    """Finds the patches that attend most to a prompt, at most one of each image.

    The score of patch i of image b is the attention weight from it to prompt p, mean over the heads h of the block,
    s(b, i) = 1/H · Σ_h softmax_k(q_bhi · k_bhk / √d + bias)_p: how much of p's value the block mixes into the patch.
    This is how a deep prompt acts on the image; its own query acts on nothing. Gives (image, row, column, score in [0,
    1]) of at most `number`, best first; ties go to the first in row-major order.
    """
    scores = layer.to_prompts[:, prompt]
    flat = scores.reshape(len(scores), -1)
    best = flat.argmax(axis=1)
    tops = flat[np.arange(len(flat)), best]
    order = np.argsort(-tops, kind="stable")[:number]
    columns = scores.shape[2]
    return [(int(i), int(best[i]) // columns, int(best[i]) % columns, float(tops[i])) for i in order]


def nearest_figure(images: Tensor, tuned: AttentionMaps, layer: int | None = None) -> Figure:
    """Draws the patches that attend most to some prompts of a layer, or of `tuned.strongest`; see `nearest_patches`.

    There is a row for each of the five prompts that patches attend to most, a column for each of up to eight patches.
    Each is framed within a crop of three by three patches; where those end the image ends. A ConfigError where there
    are no prompts in this layer.
    """
    layer = tuned.strongest if layer is None else layer
    maps = tuned.layers[layer]
    if not maps.to_prompts.shape[1]:
        raise ConfigError(f"There are no prompts in layer {layer + 1}, so no patch attends to one.")
    prompts = np.argsort(-maps.to_prompts.mean(axis=(0, 2, 3)), kind="stable")[:_SEARCHED]
    columns = min(_CROPS, len(images))
    size = (max(5.6, 1.15 * columns + 0.6), 1.4 * len(prompts) + 0.8)
    title = f"Patches with the highest attention to each prompt in layer {layer + 1}, of {len(images)} images"
    note = "Below: attention of the framed patch to the prompt, mean over heads."
    with panels(size, len(prompts), columns, title, note) as (figure, axes):
        for line, prompt in zip(axes, prompts, strict=True):
            line[0].set_ylabel(f"prompt {prompt + 1}", fontweight="bold")
            for cell, (image, row, column, score) in zip(line, nearest_patches(maps, int(prompt)), strict=False):
                _crop(cell, images[image], maps.to_prompts.shape[2:], row, column)
                cell.set_xlabel(f"{score:.1%}")
    return figure


def _crop(axes: Axes, image: Tensor, grid: tuple[int, ...], row: int, column: int) -> None:
    from matplotlib.patches import Rectangle

    height, width = image.shape[1] / grid[0], image.shape[2] / grid[1]
    show(axes, image)
    axes.set_xlim((column - 1) * width - 0.5, (column + 2) * width - 0.5)
    axes.set_ylim((row + 2) * height - 0.5, (row - 1) * height - 0.5)
    corner = (column * width - 0.5, row * height - 0.5)
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=ACCENT, linewidth=1.5))
    bare(axes)
    axes.set_facecolor("#e5e7eb")


def _relative(values: Array) -> Array:
    """Divides by the mean, so that 1 is what each patch would get if all got the same."""
    result: Array = values / max(float(values.mean()), 1e-12)
    return result


def percent(value: float) -> str:
    """A percentage in [0, 100] with two digits, without its sign: one prompt among 196 patches has half a per cent."""
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _asked_most(layer: LayerMaps) -> tuple[bool, float]:
    """Orders blocks by the patches' attention to prompts, those behind all others whose prompts have no query."""
    return layer.from_prompts.shape[1] > 0, float(layer.patch_share.mean())


def _sources(maps: AttentionMaps, place: int) -> str:
    patches, prompts = float(maps.rollout.patches[place].sum()), float(maps.rollout.prompts[:, place].sum())
    return f"patches {patches:.0%}" + (f", prompts {prompts:.0%}" if prompts else "")


def _uniform(parts: Sequence[float]) -> str:
    shares = [100 * part for part in parts]
    low, high = percent(min(shares)), percent(max(shares))
    return low if low == high else f"{low} to {high}"


def _grid(
    title: str,
    images: Sequence[Tensor],
    rows: Sequence[Sequence[Array]],
    columns: Sequence[str],
    label: str,
    names: Sequence[str] = (),
    note: str = "",
    labels: Sequence[str] | None = None,
    below: Sequence[Sequence[str]] | None = None,
) -> Figure:
    """A row of maps behind each image, under one colour bar."""
    high = float(np.quantile(np.concatenate([values.ravel() for row in rows for values in row]), _SATURATED))
    size = (max(5.6, 1.35 * (len(columns) + 1)), 1.4 * len(rows) + 1.25 + 0.2 * bool(note))
    with panels(size, len(rows), len(columns) + 1, title, note) as (figure, axes):
        drawn: Any = None
        for place, (line, image, row) in enumerate(zip(axes, images, rows, strict=True)):
            show(line[0], image)
            line[0].set_ylabel(labels[place] if labels else "")
            line[0].set_xlabel(short(names[place], 16) if names else "")
            for position, (cell, values) in enumerate(zip(line[1:], row, strict=True)):
                drawn = cell.imshow(values, cmap=SEQUENTIAL, vmin=0, vmax=high)
                cell.set_xlabel(below[place][position] if below else "")
        for cell in axes.ravel():
            bare(cell)
        for cell, name in zip(axes[0], ["Input", *columns], strict=True):
            cell.set_title(name)
        pad = 0.06 / len(axes)
        colour_bar(drawn, axes, label, location="bottom", shrink=0.5, aspect=34, pad=pad, extend="max")
    return figure
