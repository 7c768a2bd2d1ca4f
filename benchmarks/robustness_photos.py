"""Photos with ImageNet-1k labels as a task: 1,000 classes, the 16 of shape_texture16 as shifts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.robustness_trials import BACKBONE, Place
from vpt.backbones import create_backbone
from vpt.data import ImageDataModule, ImageList, ShapeTextureDataModule
from vpt.data.catalog.cards import find_card
from vpt.data.catalog.classes import Groups, imagenet_names
from vpt.data.datasets.imagenet_readers import read_test_set
from vpt.data.datasets.published import hold_out
from vpt.data.splits import Split, listed_split, no_split
from vpt.data.transforms import get_preset
from vpt.metrics.class_masks import group_mean
from vpt.robustness import Record
from vpt.robustness.interpolation.anchor_heads import own_head, write_head

PRESET = "timm"
STIMULI = {"cue-conflict": "test", "edges": "edges", "silhouettes": "silhouettes"}
"""Sets of shape_texture16, and the splits they are."""


class Photos(ImageDataModule):
    """flickr_in1k_1000 to test on, and in halves also to train on; edges, silhouettes, cue conflicts as shifts.

    A shift's label is the smallest ImageNet id of its class: :meth:`scored` makes 16 classes of the 1,000.
    """

    def __init__(self, place: Place, halves: bool, seed: int = 0) -> None:
        """Reads the lists; with `halves` tests on 500 of the 1,000 photos, trains on 400, validates on 100."""
        card = find_card("flickr_in1k_1000")
        images = read_test_set("flickr_in1k_1000", place.root, True, False).images
        stimuli = ShapeTextureDataModule(place.root)
        self.ids: Groups = stimuli.class_ids()
        self.textures = stimuli.texture_labels
        first = np.array([ids[0] for ids in self.ids])
        why = "The photos are a test set: train on half of them."
        splits = {name: no_split(f"flickr_in1k_1000/no-{name}", why) for name in ("train", "val")}
        parts = {"test": images}
        if halves:
            parts["test"], tuned = hold_out(images, 2)
            parts["train"], parts["val"] = hold_out(tuned, 5)
        splits |= {name: _split(name, part) for name, part in parts.items()}
        for name, split in STIMULI.items():
            found = stimuli.split(split)
            pixels: Callable[..., Any] = partial(_stimuli, stimuli, split)
            fingerprint = stimuli.describe()["fingerprint"]
            splits[name] = Split(f"shape_texture16/{name}", found.paths, first[found.labels], fingerprint, pixels)
        super().__init__("flickr_in1k_1000", imagenet_names(), splits, PRESET, 224, 10, 0, seed, "none", card)

    def scored(self, name: str, record: Record) -> list[tuple[str, NDArray[Any], NDArray[np.int64]]]:
        """What counts: of shape_texture16 the mean probability of each class's ids, as in its paper."""
        if name not in STIMULI:
            return [(name, record.scored, record.label)]
        logits, place = group_mean(record.logits, self.ids), {ids[0]: each for each, ids in enumerate(self.ids)}
        shapes = np.array([place[int(label)] for label in record.label], dtype=np.int64)
        if name != "cue-conflict":
            return [(name, logits, shapes)]
        return [(f"{name}, shape", logits, shapes), (f"{name}, texture", logits, self.textures[record.index])]


def _split(name: str, images: ImageList) -> Split:
    return listed_split(f"flickr_in1k_1000/{name}", images, get_preset(PRESET), 224)


def _stimuli(data: ShapeTextureDataModule, split: str) -> Any:
    return data.split(split).images


def own_head_file(place: Place, data: ImageDataModule) -> Path:
    """Writes the weights' own classifier of all 1,000 classes as a delta file."""
    path = place.build / "own-head.safetensors"
    if not path.is_file():
        backbone = create_backbone(BACKBONE, str(place.weights))
        info = {"head": "pretrained", "classes": None}
        write_head(path, backbone, own_head(backbone), data.class_names, data.preset.to_dict(), info)
    return path
