"""The kinds of attention figures: what each shows, what it needs, and how to read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vpt.atomic_write import write_text
from vpt.errors import ConfigError, UnknownNameError
from vpt.reports.page import document
from vpt.reports.style import save_figure
from vpt.visualize.attention_map_figures import (
    mass_figure,
    nearest_figure,
    prompts_figure,
    rollout_figure,
    share_figure,
    subject_figure,
)
from vpt.visualize.attention_maps import strength
from vpt.visualize.layer_features import features_figure, layer_features
from vpt.visualize.prompt_attention import draw_attention, has_prompts
from vpt.visualize.scene import Scene

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FEWEST = 8  # images that features are laid out of


@dataclass(frozen=True)
class Kind:
    """A kind of figure.

    Attributes:
        title: Its heading in the gallery.
        caption: How to read it.
        draw: Draws it.
        missing: What a scene lacks for it, a part of a sentence; empty if nothing.
    """

    title: str
    caption: str
    draw: Callable[[Scene], Figure]
    missing: Callable[[Scene], str] = lambda scene: ""


def _features(scene: Scene) -> Figure:
    labels = np.zeros(0, dtype=np.int64) if scene.crowd_labels is None else scene.crowd_labels.numpy()
    untuned = None
    if scene.model.delta is not None:
        with strength(scene.model, 0.0):
            untuned = layer_features(scene.model, scene.crowd)
    return features_figure(layer_features(scene.model, scene.crowd), untuned, labels, scene.model.class_names)


def _no_prompts(scene: Scene) -> str:
    return "" if has_prompts(scene.model) else "the model has no prompts"


def _no_keys(scene: Scene) -> str:
    keys = any(layer.to_prompts.shape[1] for layer in scene.tuned.layers)
    return "" if keys else "the model has no prompts"


def _no_classes(scene: Scene) -> str:
    if scene.crowd_labels is None:
        return "the classes of image files are not known: draw it from the data, without --images"
    few = len(scene.crowd) < _FEWEST
    return f"it takes {_FEWEST} images, and there are {len(scene.crowd)}" if few else ""


KINDS: dict[str, Kind] = {
    "compare": Kind(
        "With and without prompts",
        "The last block, relative to the mean patch, and below the part of the attention that prompts take in each "
        "layer.",
        lambda scene: draw_attention(scene.model, scene.images, scene.labels),
        _no_prompts,
    ),
    "class": Kind(
        "Layer by layer",
        "What the summary of the image attends to: the class token, or the mean over all patches where there is none. "
        "On Swin each layer has its own grid, windows stitched back.",
        lambda scene: subject_figure(scene.images, scene.tuned, scene.untuned, scene.names),
    ),
    "rollout": Kind(
        "Rollout",
        "Attention followed through all blocks (Abnar and Zuidema, 2020). Attention that reaches a prompt ends there; "
        "what remains of 100 % belongs to class and register tokens, or to the padding of Swin's windows.",
        lambda scene: rollout_figure(scene.images, scene.tuned, scene.untuned, scene.names),
    ),
    "share": Kind(
        "Share of attention on prompts",
        "Mean over the images. In brackets what the share would be if all keys got the same.",
        lambda scene: share_figure(scene.tuned),
        _no_keys,
    ),
    "mass": Kind(
        "Attention of patches to prompts",
        "This is how prompts act: as keys and values that patches and class token listen to.",
        lambda scene: mass_figure(scene.images, scene.tuned, scene.names),
        _no_keys,
    ),
    "prompts": Kind(
        "What each prompt looks at",
        "Each prompt asks with its own query, as in the form that puts prompts into the sequence. With deep prompts "
        "the answer is thrown away: the maps tell what a prompt resembles, not what it does.",
        lambda scene: prompts_figure(scene.images, scene.tuned, scene.names),
        _no_prompts,
    ),
    "patches": Kind(
        "Patches that listen to a prompt",
        "Of each image the patch with the largest attention weight to the prompt, mean over heads; best images first.",
        lambda scene: nearest_figure(*scene.searched),
        _no_keys,
    ),
    "features": Kind(
        "Features",
        "Only neighbourhoods mean something in a t-SNE, distances and sizes of groups do not. By neighbours: images "
        "whose five nearest others, in all dimensions, vote for the right class.",
        _features,
        _no_classes,
    ),
}


def draw(scene: Scene, kind: str) -> Figure:
    """Draws one kind of figure.

    Args:
        scene: Of what.
        kind: A key of `KINDS`.

    Returns:
        The figure.

    Raises:
        UnknownNameError: There is no such kind.
        ConfigError: The scene lacks what it needs.
    """
    if kind not in KINDS:
        raise UnknownNameError("kind", kind, KINDS)
    if missing := KINDS[kind].missing(scene):
        raise ConfigError(f"The figure {kind!r} cannot be drawn: {missing}.")
    return KINDS[kind].draw(scene)


def write_gallery(
    scene: Scene, out: Path, kinds: Sequence[str] = (), suffix: str = "png"
) -> tuple[list[Path], list[str]]:
    """Writes figures, and one page with all of them that needs nothing beside itself.

    Args:
        scene: Of what.
        out: A folder for ``KIND.suffix`` and ``index.html``; it is made.
        kinds: Keys of `KINDS`; empty for all that can be drawn.
        suffix: ``"png"``, ``"svg"`` or ``"pdf"``.

    Returns:
        The paths, and a sentence for each kind that was left out.

    Raises:
        UnknownNameError: There is no such kind.
        ConfigError: The scene lacks what a kind needs that was asked for, or `out` is a file.
    """
    if out.is_file():
        raise ConfigError(f"{out} is a file: several figures are written to a folder.")
    figures, left_out = {}, []
    for kind in kinds or KINDS:
        if not kinds and (missing := KINDS[kind].missing(scene)):
            left_out.append(f"{kind} is left out: {missing}.")
        else:
            figures[kind] = draw(scene, kind)
    paths = [save_figure(figure, out / f"{kind}.{suffix}") for kind, figure in figures.items()]
    model = scene.model
    specs = ", ".join(spec["name"] for spec in model.delta.specs) if model.delta is not None else "no delta"
    notes = [f"{model.backbone.name}, {specs}, {len(model.class_names)} classes.", *left_out]
    titles = {KINDS[kind].title: figure for kind, figure in figures.items()}
    page = document("Attention", notes, (), titles, {kind.title: kind.caption for kind in KINDS.values()})
    write_text(out / "index.html", page)
    return [*paths, out / "index.html"], left_out
