"""How the classes come apart from layer to layer: features of each block in two dimensions, untuned above tuned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vpt.backbones.compilation import eagerly
from vpt.errors import ConfigError
from vpt.models import TunedModel
from vpt.reports.style import short
from vpt.visualize.attention_maps import Array, evaluating
from vpt.visualize.figure_panels import chosen, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEWEST = 8  # images that features are laid out of
_COLUMNS, _BATCH, _NEIGHBOURS = 4, 16, 5
_COLOURS = (
    "#1d4ed8", "#c2410c", "#047857", "#7e22ce", "#a16207", "#0e7490", "#be185d", "#4b5563", "#84cc16", "#f59e0b",
)  # fmt: skip


@torch.no_grad()
def layer_features(model: TunedModel, images: Tensor) -> list[Array]:
    """Reads the summary of images, uint8 (B, 3, H, W), behind every block, before the final norm: (B, dim).

    The class token, or the mean over patches. An UnsupportedBackboneError where tokens are not known.
    """
    layout = model.backbone.layout
    kept: list[list[Tensor]] = [[] for _ in layout.blocks]

    def keeper(own: list[Tensor], patches: int) -> Any:
        def keep(block: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            whole = out[:, 0] if layout.has_class_token else out.flatten(1, -2)[:, -patches:].mean(dim=1)
            own.append(whole.float().cpu())

        return keep

    hooks = [
        block.register_forward_hook(keeper(own, patches))
        for block, own, patches in zip(layout.blocks, kept, layout.patches, strict=True)
    ]
    try:
        with evaluating(model), eagerly():
            for batch in torch.split(images, _BATCH):
                model.backbone(batch.to(model.backbone.mean.device))
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(own).numpy() for own in kept]


def plane(features: Array) -> Array:
    """Lays features out in two dimensions, each scaled to length 1 first, so that distances are those of angles.

    By t-SNE (van der Maaten and Hinton, JMLR 2008): perplexity 30, less for few images, from the principal components
    on, seed 0. From (n, dim) to (n, 2). A ConfigError where there are too few images.
    """
    if len(features) < FEWEST:
        raise ConfigError(f"A t-SNE takes at least {FEWEST} images, got {len(features)}.")
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(features) - 1) / 3)
    layout = TSNE(2, perplexity=perplexity, init="pca", random_state=0, n_jobs=1)
    laid: Array = layout.fit_transform(_unit(features))
    return laid


def features_figure(
    tuned: Sequence[Array], untuned: Sequence[Array] | None, labels: NDArray[np.int64], class_names: Sequence[str]
) -> Figure:
    """Draws `layer_features` of up to four layers, coloured by class, and above what they are at strength 0.

    The number in each title is the share of images whose nearest five others (by angle, in all dimensions) vote for
    their class: the plane may mislead, the number does not depend on it. A ConfigError where there are too few images.
    """
    layers = chosen(len(tuned), _COLUMNS)
    rows = [("tuned", tuned)] if untuned is None else [("untuned", untuned), ("tuned", tuned)]
    size = (2.3 * len(layers) + 1.7, 2.35 * len(rows) + 0.6)
    title = f"Features after each block, {len(labels)} images (t-SNE)"
    with panels(size, len(rows), len(layers), title) as (figure, grid):
        for line, (name, features) in zip(grid, rows, strict=True):
            line[0].set_ylabel(name, fontsize=11, fontweight="bold")
            for axes, layer in zip(line, layers, strict=True):
                _scatter(axes, plane(features[layer]), labels, class_names)
                axes.set_title(f"layer {layer + 1}: {neighbour_accuracy(features[layer], labels):.0%} k-NN")
        handles, names = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right center", frameon=False, markerscale=1.6)
    return figure


def neighbour_accuracy(features: Array, labels: NDArray[np.int64]) -> float:
    """Accuracy of the five nearest neighbours by cosine similarity, leave-one-out; ties go to the smaller label."""
    unit = _unit(features)
    near = unit @ unit.T
    np.fill_diagonal(near, -np.inf)
    votes = labels[np.argsort(-near, axis=1, kind="stable")[:, :_NEIGHBOURS]]
    guesses = np.array([np.bincount(vote).argmax() for vote in votes])
    return float((guesses == labels).mean())


def _unit(features: Array) -> Array:
    unit: Array = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return unit


def _scatter(axes: Axes, places: Array, labels: NDArray[np.int64], class_names: Sequence[str]) -> None:
    for order, label in enumerate(np.unique(labels)):
        own = places[labels == label]
        colour, marker = _COLOURS[order % len(_COLOURS)], "os^D"[order // len(_COLOURS) % 4]
        axes.scatter(
            own[:, 0], own[:, 1], s=11, color=colour, marker=marker, linewidths=0, alpha=0.85,
            label=short(class_names[label], 16),
        )  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(True)
