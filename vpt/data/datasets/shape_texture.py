"""Shape against texture: edges, silhouettes and cue-conflict images in 16 classes (Geirhos et al., ICLR 2019)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vpt.argument_types import checked
from vpt.data.catalog.cards import find_card
from vpt.data.catalog.classes import Groups
from vpt.data.datamodule import ImageDataModule
from vpt.data.datasets.published_files import check_count, find_folder, image_list
from vpt.data.list_files import read_json, read_table
from vpt.data.splits import listed_split, no_split
from vpt.data.transforms import get_preset
from vpt.errors import DataError

_NAME = "shape_texture16"
_FOLDERS = {"test": "cue-conflict", "edges": "edges", "silhouettes": "filled-silhouettes"}


class ShapeTextureDataModule(ImageDataModule):
    """Test images that have the shape of one class and, in the cue-conflict set, the texture of another.

    The test split is the cue-conflict set with its shapes as labels (`texture_labels`, int64 (N,), are the others);
    ``edges`` and ``silhouettes`` are shifts. There is nothing to train on: a classifier of ImageNet-1k answers, and
    :meth:`class_ids` gives its ids of each class, whose probabilities the paper averages.
    """

    @checked
    def __init__(
        self,
        root: str | Path | None = None,
        preset: str = "timm",
        image_size: int | list[int] = 224,
        batch_size: int = 64,
        num_workers: int = 0,
        allow_partial: bool = False,
    ) -> None:
        """Reads labels.csv and class16_to_in1k_indices.json; no image yet.

        Args:
            root: Folder of all datasets; None for :func:`vpt.data.default_root`.
            preset: Name of the preprocessing (:data:`vpt.data.transforms.PRESETS`).
            image_size: Pixels of the images, or [height, width].
            batch_size: Images in a batch.
            num_workers: Loader processes; 0 loads in the main process.
            allow_partial: Accept another number of images than the official one.
        """
        card = find_card(_NAME)
        folder = find_folder(card, root, _NAME, ["labels.csv", "class16_to_in1k_indices.json"])
        names, self._class_ids = _classes(folder / "class16_to_in1k_indices.json")
        files, shapes, textures, lines = _table(folder / "labels.csv", names)
        chosen, complete = get_preset(preset), True
        why = f"{card.title} is a test set: nothing of it can be trained on."
        splits = {name: no_split(f"{_NAME}/no-{name}", why) for name in ("train", "val")}
        for name, kind in _FOLDERS.items():
            rows = [row for row, file in enumerate(files) if file.startswith(f"{kind}/")]
            images = image_list(
                folder / "labels.csv",
                folder,
                [files[row] for row in rows],
                [shapes[row] for row in rows],
                [lines[row] for row in rows],
            )
            complete &= check_count(f"{_NAME}/{kind}", len(rows), card.sizes[name], allow_partial)
            splits[name] = listed_split(f"{_NAME}/{name}", images, chosen, image_size)
            if name == "test":
                self.texture_labels: NDArray[np.int64] = np.array([textures[row] for row in rows], np.int64)
        self.partial = not complete
        super().__init__(_NAME, names, splits, preset, image_size, batch_size, num_workers, 0, "none", card)

    def class_ids(self) -> Groups:
        """Returns the ImageNet-1k ids of each of the 16 classes."""
        return self._class_ids


def _classes(file: Path) -> tuple[list[str], Groups]:
    """Class names, sorted, and the ImageNet-1k ids of each."""
    content = read_json(file, "a map from class names to ImageNet-1k ids")
    try:
        names = sorted(content)
        groups = tuple(tuple(int(each) for each in content[name]) for name in names)
    except (ValueError, TypeError, LookupError) as error:
        raise DataError(f"{file} is not a map from class names to ImageNet-1k ids ({error}).") from error
    if not all(groups) or not all(0 <= each < 1000 for group in groups for each in group):
        raise DataError(f"{file}: every class needs ImageNet-1k ids, which lie in 0..999.")
    return names, groups


def _table(file: Path, names: list[str]) -> tuple[list[str], list[int], list[int], list[int]]:
    """The files with the numbers of their shape and texture, -1 for a texture that is none, and their lines."""
    table, lines = read_table(file, ["file", "shape_class"], ["texture_class"])
    shapes, textures = (
        [names.index(name) if name in names else -1 for name in table[column]]
        for column in ("shape_class", "texture_class")
    )
    for path, shape, texture, line in zip(table["file"], shapes, textures, lines, strict=True):
        if shape < 0 or (path.startswith("cue-conflict/") and texture < 0):
            raise DataError(f"{file}, line {line}: {path} has a class that is none of the {len(names)}.")
    return table["file"], shapes, textures, lines
