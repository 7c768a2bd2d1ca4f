"""Figures of attention maps: a row for each image, one scale for what is compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vpt.errors import ConfigError
from vpt.reports.style import NEUTRAL, SEQUENTIAL, short, style
from vpt.visualize.attention_maps import AttentionMaps, LayerMaps
from vpt.visualize.prompt_attention import UNTUNED_TUNED, bare, draw_pairs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float32]

_LAYERS, _PROMPTS = 6, 10  # columns that fit
_SATURATED = 0.97  # above this quantile colours saturate: sink patches get 20 times the mean and more
_TIMES = "attention to a patch ÷ mean over patches"


def subject_figure(
    images: Tensor, tuned: AttentionMaps, untuned: AttentionMaps | None = None, names: Sequence[str] = ()
) -> Figure:
    """Draws the class token's attention to patches in several layers; the mean over patches where there is none.

    Args:
        images: uint8 (B, 3, H, W), those of the maps.
        tuned: With the delta.
        untuned: Without it, drawn above for each image; None for no comparison.
        names: Of the images' classes, where they are known.

    Returns:
        A row for each image and model, a column for each of up to six layers; on Swin in each layer's own grid.
    """
    layers = chosen(len(tuned.layers), _LAYERS)
    pairs = [("", tuned)] if untuned is None else [("untuned", untuned), ("tuned", tuned)]
    rows, labels = [], []
    for place in range(len(images)):
        for name, maps in pairs:
            rows.append([relative(maps.layers[layer].patches[place].mean(axis=0)) for layer in layers])
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
    """Draws what each prompt looks at, by its own query in the concatenated form; see `LayerMaps.from_prompts`.

    Args:
        images: uint8 (B, 3, H, W), those of the maps.
        tuned: With prompts.
        names: Of the images' classes, where they are known.
        layer: Counted from 0; None for the one whose patches attend most to prompts, of those whose prompts have
            queries: not so where there are only the keys of prefixes.

    Returns:
        A row for each image, a column for each of the first ten prompts.

    Raises:
        ConfigError: No prompt of this layer has a query.
    """
    if layer is None:
        layer = max(range(len(tuned.layers)), key=lambda block: _asked_most(tuned.layers[block]))
    looks = tuned.layers[layer].from_prompts
    if not looks.shape[1]:
        raise ConfigError(f"No prompt asks in layer {layer + 1}, so there is nothing that it looks at.")
    prompts = range(min(looks.shape[1], _PROMPTS))
    dead = "Deep prompts: the query is dead, the output does not depend on it." if tuned.dead_queries else ""
    return _grid(
        f"What each prompt looks at in layer {layer + 1}, by its own{' (dead)' if dead else ''} query",
        list(images),
        [[relative(looks[place, prompt]) for prompt in prompts] for place in range(len(images))],
        [f"prompt {prompt + 1}" for prompt in prompts],
        _TIMES,
        names,
        note=dead,
    )


def mass_figure(images: Tensor, tuned: AttentionMaps, names: Sequence[str] = ()) -> Figure:
    """Draws how much of each patch's attention goes to the prompts.

    Args:
        images: uint8 (B, 3, H, W), those of the maps.
        tuned: With prompts.
        names: Of the images' classes, where they are known.

    Returns:
        A row for each image, a column for each of up to six layers; below each map its mean.
    """
    layers = chosen(len(tuned.layers), _LAYERS)
    rows = [[100 * tuned.layers[layer].mass[place] for layer in layers] for place in range(len(images))]
    return _grid(
        "How much of each patch's attention goes to the prompts, mean over heads",
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
    """Draws attention followed through all blocks; see `vpt.visualize.attention_maps`.

    Args:
        images: uint8 (B, 3, H, W), those of the maps.
        tuned: With the delta.
        untuned: Without it; None for no comparison.
        names: Of the images' classes, where they are known.

    Returns:
        A row for each image; below each map how much comes from all patches and from all prompts.
    """
    from matplotlib.figure import Figure

    title = "Attention rollout: which patches the pooled features come from"
    after = np.stack([relative(own) for own in tuned.rollout.patches])
    sources = [_sources(tuned, place) for place in range(len(images))]
    label = "part of a patch ÷ mean over patches"
    if untuned is None:
        below = [[text] for text in sources]
        return _grid(title, list(images), [[own] for own in after], ["all layers"], label, names, below=below)
    before = np.stack([relative(own) for own in untuned.rollout.patches])
    with style():
        figure = Figure(figsize=(7.4, 1.85 * len(images) + 1.2), layout="constrained")
        axes = figure.subplots(len(images), 4, squeeze=False)
        draw_pairs(axes, before, after, images, label, UNTUNED_TUNED)
        figure.axes[-1].tick_params(labelsize=7.5)  # differences are small: their ticks are long and their bar is short
        for place, row in enumerate(axes):
            row[0].set_xlabel(short(names[place]) if names else "")
            row[1].set_xlabel(_sources(untuned, place))
            row[2].set_xlabel(sources[place])
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, weight="bold")
    return figure


def share_figure(tuned: AttentionMaps) -> Figure:
    """Draws the share of attention on prompts for each layer and head, mean over images.

    Args:
        tuned: With prompts.

    Returns:
        A heat map for the class token and one for the mean patch; only the latter where there is no class token.
    """
    from matplotlib.figure import Figure

    tables = {"of the mean patch": tuned.share(of_patches=True)}
    if tuned.has_class_token:
        tables = {"of the class token": tuned.share()} | tables
    depth, heads = tables["of the mean patch"].shape
    high = 100 * float(np.nanmax(list(tables.values())))
    size = (1.6 + len(tables) * max(2.4, 0.42 * heads), 1.3 + max(1.8, 0.3 * depth))
    with style():
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(1, len(tables), squeeze=False)[0]
        for axes, (name, table) in zip(panels, tables.items(), strict=True):
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
        panels[0].set_ylabel("layer")
        bar = figure.colorbar(image, ax=list(panels), pad=0.02, aspect=18)
        bar.set_label(f"% of attention\n(if all keys got the same: {_uniform(tuned)}%)")
        bar.outline.set_visible(False)
        figure.suptitle("Share of attention on prompts", x=0.01, ha="left", fontsize=12, weight="bold")
    return figure


def chosen(number: int, most: int) -> list[int]:
    """Picks positions evenly, the last among them.

    Args:
        number: Of positions, at least 1.
        most: How many fit.

    Returns:
        Ascending positions, counted from 0.
    """
    few = min(number, most)
    return [number * (place + 1) // few - 1 for place in range(few)]


def relative(values: Array) -> Array:
    """Divides by the mean, so that 1 is what each patch would get if all got the same.

    Args:
        values: (rows, columns).

    Returns:
        Likewise.
    """
    result: Array = values / max(float(values.mean()), 1e-12)
    return result


def percent(value: float) -> str:
    """Writes a percentage with two digits: one prompt among 196 patches has half a per cent.

    Args:
        value: In [0, 100].

    Returns:
        The number without its sign.
    """
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _asked_most(layer: LayerMaps) -> tuple[bool, float]:
    """Orders blocks by the patches' attention to prompts, those behind all others whose prompts have no query."""
    return layer.from_prompts.shape[1] > 0, float(layer.patch_share.mean())


def _sources(maps: AttentionMaps, place: int) -> str:
    patches, prompts = float(maps.rollout.patches[place].sum()), float(maps.rollout.prompts[:, place].sum())
    return f"patches {patches:.0%}" + (f", prompts {prompts:.0%}" if prompts else "")


def _uniform(maps: AttentionMaps) -> str:
    shares = [100 * layer.uniform for layer in maps.layers]
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
    from matplotlib.figure import Figure

    high = float(np.quantile(np.concatenate([values.ravel() for row in rows for values in row]), _SATURATED))
    with style():
        figure = Figure(
            figsize=(max(5.6, 1.35 * (len(columns) + 1)), 1.4 * len(rows) + 1.25 + 0.2 * bool(note)),
            layout="constrained",
        )
        axes = figure.subplots(len(rows), len(columns) + 1, squeeze=False)
        drawn: Any = None
        for place, (line, image, row) in enumerate(zip(axes, images, rows, strict=True)):
            line[0].imshow(image.permute(1, 2, 0).cpu().numpy())
            line[0].set_ylabel(labels[place] if labels else "")
            line[0].set_xlabel(short(names[place], 16) if names else "")
            for position, (cell, values) in enumerate(zip(line[1:], row, strict=True)):
                drawn = cell.imshow(values, cmap=SEQUENTIAL, vmin=0, vmax=high)
                cell.set_xlabel(below[place][position] if below else "")
        for cell in axes.ravel():
            bare(cell)
        for cell, name in zip(axes[0], ["Input", *columns], strict=True):
            cell.set_title(name)
        _bar(figure, axes, drawn, label)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, weight="bold")
        if note:
            figure.supxlabel(note, x=0.01, ha="left", fontsize=9, color=NEUTRAL)
    return figure


def _bar(figure: Figure, axes: NDArray[np.object_], drawn: Any, label: str) -> None:
    bar = figure.colorbar(
        drawn, ax=axes.ravel().tolist(), location="bottom", shrink=0.5, aspect=34, pad=0.06 / len(axes), extend="max"
    )
    bar.set_label(label)
    bar.outline.set_visible(False)
