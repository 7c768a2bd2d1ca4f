"""The kinds of attention figures: what each shows and needs, how to read it, and what it is drawn of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vpt.argument_types import checked
from vpt.atomic_write import check_writable, write_text
from vpt.data import ImageDataModule, ImageDataset, Preset
from vpt.data.images import LeftOut, decode, find_images
from vpt.data.targets import check_multiclass
from vpt.errors import ConfigError, DataError, UnknownNameError
from vpt.image_size import ImageSize
from vpt.models import TunedModel, load_classifier
from vpt.reports.page import document
from vpt.reports.style import save_figure
from vpt.robustness.evaluate import check_data
from vpt.visualize.attention_map_figures import (
    draw_attention,
    mass_figure,
    nearest_figure,
    prompts_figure,
    rollout_figure,
    share_figure,
    subject_figure,
)
from vpt.visualize.attention_maps import (
    AttentionMaps,
    PromptShares,
    attention_maps,
    has_prompts,
    prompt_shares,
    strength,
)
from vpt.visualize.layer_features import FEWEST, features_figure, layer_features

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CROWD = 64  # images that are searched for patches
_IN_FOLDER = 6  # images that a folder stands for
_MOST = 32


class Scene:
    """A model and the images that it is looked at with; everything is measured once, when it is first needed.

    These are a few images and a crowd of many, (B, C, H, W) as the model takes them; labels, int64 (B,), are None where
    not known.
    """

    def __init__(
        self, model: TunedModel, images: Tensor, labels: Tensor | None, crowd: Tensor, crowd_labels: Tensor | None
    ) -> None:
        """Keeps what is given."""
        self.model, self.images, self.labels = model, images, labels
        self.crowd, self.crowd_labels = crowd, crowd_labels

    @property
    def names(self) -> list[str]:
        """Class names of the few images; empty where they are not known."""
        return [] if self.labels is None else [self.model.class_names[label] for label in self.labels.tolist()]

    @cached_property
    def tuned(self) -> AttentionMaps:
        """Maps of the few images."""
        return attention_maps(self.model, self.images)

    @cached_property
    def untuned(self) -> AttentionMaps | None:
        """The same at strength 0; None without a delta that could be taken away."""
        if self.model.delta is None:
            return None
        with strength(self.model, 0.0):
            return attention_maps(self.model, self.images)

    @cached_property
    def shares(self) -> PromptShares:
        """What of its attention each layer gives to prompts, on the few images."""
        return self.tuned.shares() if self.model.backbone.has_layout else prompt_shares(self.model, self.images)

    @cached_property
    def searched(self) -> tuple[Tensor, AttentionMaps]:
        """Images evenly from the crowd, and their maps."""
        images = self.crowd[:: -(-len(self.crowd) // _CROWD)]
        return images, attention_maps(self.model, images)


def sample_images(dataset: ImageDataset, number: int = 4, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """Draws an image and label for each of a number of classes, at most all; a ConfigError for less than 1.

    Where an image has other than one class, the first images, without labels.
    """
    if number < 1:
        raise ConfigError(f"The number of images must be at least 1, got {number}.")
    if dataset.labels.ndim > 1:
        return torch.stack([dataset[i]["image"] for i in range(min(number, len(dataset)))]), None
    generator = np.random.default_rng(seed)
    classes = generator.permutation(np.unique(dataset.labels))[:number]
    index = [int(generator.choice(np.flatnonzero(dataset.labels == label))) for label in classes]
    return torch.stack([dataset[i]["image"] for i in index]), torch.from_numpy(classes)


def sample_crowd(dataset: ImageDataset, classes: int = 10, per_class: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draws several images each of a few classes, fewer where there are fewer; gives images and ascending labels."""
    generator = np.random.default_rng(seed)
    drawn = np.sort(generator.permutation(np.unique(dataset.labels))[:classes])
    index = [generator.permutation(np.flatnonzero(dataset.labels == label))[:per_class] for label in drawn]
    chosen = np.concatenate(index)
    return torch.stack([dataset[int(i)]["image"] for i in chosen]), torch.from_numpy(dataset.labels[chosen])


@checked
def scene_from_files(delta: Path, images: Sequence[Path], weights: str | None = None) -> Scene:
    """Prepares the kinds of figures that need no classes, for image files; raises what `load_classifier` does, too.

    A folder stands for the first six images in and below it, by name. A ConfigError where there are more than 32
    images, and a DataError where there is no image, or one cannot be read.
    """
    model = load_classifier(delta, weights).float()  # figures are drawn in single precision
    batch = _batch(model, images)
    return Scene(model, batch, None, batch, None)


@checked
def scene_from_data(
    delta: Path, data: ImageDataModule, weights: str | None = None, number: int = 4, per_class: int = 20
) -> Scene:
    """Prepares all kinds of figures for test images of the task; raises what `load_classifier` does, too.

    Maps are drawn of a number of images, at least 1, and figures of many images of so many per class of ten classes. A
    ConfigError where the data do not belong to the delta, and a DataError where an image cannot be read.
    """
    model = load_classifier(delta, weights).float()  # figures are drawn in single precision
    check_data(delta, model, data)
    check_multiclass(model.targets, "Figures of test images are")
    split = data.split("test")
    return Scene(model, *sample_images(split, number), *sample_crowd(split, per_class=per_class))


def _batch(model: TunedModel, images: Sequence[Path]) -> Tensor:
    preset = Preset.from_dict(model.preset)
    paths = _expand(images, model.backbone.raw)
    batch = np.stack([_read(path, preset, model.backbone.image_size) for path in paths])
    return torch.from_numpy(batch).permute(0, 3, 1, 2)


def _expand(paths: Sequence[Path], arrays: bool) -> list[Path]:
    """Files as they are, folders as their first images."""
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            left = LeftOut()
            inside = find_images(path, left, arrays)
            if not inside:
                others = f" (not read: {text})" if (text := left.text(path)) else ""
                raise DataError(f"There is no image in the folder {path}{others}.")
            files += map(Path, inside[:_IN_FOLDER])
        else:
            files.append(path)
    if not files:
        raise DataError("There is no image to draw: give image files or a folder of images.")
    if len(files) > _MOST:
        raise ConfigError(f"A figure has a row for each image and takes {_MOST} at most, got {len(files)}.")
    return files


def _read(path: Path, preset: Preset, image_size: ImageSize) -> NDArray[Any]:
    if not path.is_file():
        raise DataError(f"{path} is no file." if path.exists() else f"No image {path}.")
    try:
        return preset(decode(path, preset.channels), image_size)
    except DataError:
        raise
    except Exception as error:  # PIL raises a dozen unrelated types on damaged files.
        raise DataError(f"{path} cannot be decoded as an image ({error}).") from error


@dataclass(frozen=True)
class Kind:
    """A kind of figure: its heading in the gallery, how to read it, and what a scene lacks for it, if anything."""

    title: str
    caption: str
    draw: Callable[[Scene], Figure]
    missing: Callable[[Scene], str] = lambda scene: ""
    of_tokens: bool = True

    def lacks(self, scene: Scene) -> str:
        """What a scene lacks for it; nothing where it can be drawn."""
        if self.of_tokens and not scene.model.backbone.has_layout:
            return f"which tokens of {scene.model.backbone.name} lie where is not known (--kind share needs none)"
        return self.missing(scene)


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
    few = len(scene.crowd) < FEWEST
    return f"it takes {FEWEST} images, and there are {len(scene.crowd)}" if few else ""


KINDS: dict[str, Kind] = {
    "compare": Kind(
        "With and without prompts",
        "The last block, relative to the mean over patches, and below the share of attention on prompts in each layer.",
        lambda scene: draw_attention(scene.model, scene.images, scene.labels),
        _no_prompts,
    ),
    "class": Kind(
        "Layer by layer",
        "Attention of the class token, or the mean over all patches where there is none. On Swin each layer has its "
        "own grid, reassembled from its windows.",
        lambda scene: subject_figure(scene.images, scene.tuned, scene.untuned, scene.names),
    ),
    "rollout": Kind(
        "Rollout",
        "Attention rollout through all blocks (Abnar and Zuidema, 2020). Attention that reaches a prompt ends there; "
        "what remains of 100 % belongs to class and register tokens, or to the padding of Swin's windows.",
        lambda scene: rollout_figure(scene.images, scene.tuned, scene.untuned, scene.names),
    ),
    "share": Kind(
        "Share of attention on prompts",
        "Mean over the images. In brackets the share under uniform attention.",
        lambda scene: share_figure(scene.shares),
        lambda scene: "" if max(scene.shares.uniform) else "the model has no prompts",
        of_tokens=False,
    ),
    "mass": Kind(
        "Attention of patches to prompts",
        "This is how prompts act: as keys and values that patches and class token attend to.",
        lambda scene: mass_figure(scene.images, scene.tuned, scene.names),
        _no_keys,
    ),
    "prompts": Kind(
        "What each prompt attends to",
        "By the prompt's own query, as a token of the sequence. The output of a deep prompt is discarded: the maps "
        "show what a prompt is similar to, not its effect.",
        lambda scene: prompts_figure(scene.images, scene.tuned, scene.names),
        _no_prompts,
    ),
    "patches": Kind(
        "Patches that attend to a prompt",
        "Of each image the patch with the largest attention weight to the prompt, mean over heads; highest first.",
        lambda scene: nearest_figure(*scene.searched),
        _no_keys,
    ),
    "features": Kind(
        "Features",
        "In a t-SNE only neighbourhoods are meaningful, distances and sizes of clusters are not. k-NN: accuracy of the "
        "five nearest neighbours by cosine similarity, in all dimensions.",
        _features,
        _no_classes,
    ),
}


@checked
def draw(scene: Scene, kind: str) -> Figure:
    """Draws one of the `KINDS`; an UnknownNameError for others, a ConfigError where the scene lacks what it needs."""
    _check(scene, kind)
    return KINDS[kind].draw(scene)


def _check(scene: Scene, kind: str) -> None:
    if kind not in KINDS:
        raise UnknownNameError("kind", kind, KINDS)
    if missing := KINDS[kind].lacks(scene):
        raise ConfigError(f"The figure {kind!r} cannot be drawn: {missing}.")


@checked
def write_gallery(
    scene: Scene, out: Path, kinds: Sequence[str] = (), suffix: str = "png"
) -> tuple[list[Path], list[str]]:
    """Writes figures, and one page with all of them that needs nothing beside itself.

    ``KIND.suffix`` and ``index.html`` go to the folder `out`, which is made; `kinds` are keys of `KINDS`, empty for all
    that can be drawn, `suffix` is ``"png"``, ``"svg"`` or ``"pdf"``. Gives the paths, and a sentence for each kind left
    out. An UnknownNameError where there is no such kind, a ConfigError where one lacks what it needs, an OutputError
    where `out` cannot be written.
    """
    check_writable(out, folder=True)
    for kind in kinds:
        _check(scene, kind)
    figures, left_out, paths = {}, [], []
    for kind in kinds or KINDS:
        if not kinds and (missing := KINDS[kind].lacks(scene)):
            left_out.append(f"{kind} is left out: {missing}.")
        else:
            figures[kind] = draw(scene, kind)
            paths.append(save_figure(figures[kind], out / f"{kind}.{suffix}"))
    model = scene.model
    specs = ", ".join(spec["name"] for spec in model.delta.specs) if model.delta is not None else "no delta"
    notes = [f"{model.backbone.name}, {specs}, {len(model.class_names)} classes.", *left_out]
    titles = {KINDS[kind].title: figure for kind, figure in figures.items()}
    page = document("Attention", notes, (), titles, {kind.title: kind.caption for kind in KINDS.values()})
    write_text(out / "index.html", page)
    return [*paths, out / "index.html"], left_out
