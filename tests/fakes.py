"""Generated data in the layout of the real ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def make_task(
    folder: Path,
    classes: int = 3,
    per_class: tuple[int, int, int] = (4, 2, 3),
    shifts: Sequence[str] = (),
    size: tuple[int, int] = (28, 20),
    seed: int = 0,
) -> Path:
    """Writes a task of noisy, differently coloured JPEGs and returns its folder.

    Args:
        folder: Folder of the task, created; its parent is the root.
        classes: Number of classes.
        per_class: Images of each class in train800, val200 and test (and in each shift).
        shifts: Names of extra test lists.
        size: Width and height in pixels.
        seed: Seed of colours and noise.
    """
    random = np.random.default_rng(seed)
    colours = random.integers(30, 226, size=(classes, 3))
    counts = dict(zip(("train800", "val200", "test"), per_class, strict=True))
    lists: dict[str, list[str]] = {}
    for name in [*counts, *(f"shift_{shift}" for shift in shifts)]:
        lines = lists.setdefault(name, [])
        for label in range(classes):
            for number in range(counts.get(name, per_class[2])):
                path = f"images/{name}/class {label}/{number}.jpg"  # the space is on purpose
                pixels = colours[label] + random.integers(-25, 26, size=(size[1], size[0], 3))
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / path, quality=95)
                lines.append(f"{path}\t{label}")
    lists["train800val200"] = lists["train800"] + lists["val200"]
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "classes.json").write_text(json.dumps([f"colour {label}" for label in range(classes)]), encoding="utf-8")
    return folder


def make_folder(
    folder: Path,
    counts: Mapping[str, int],
    classes: Sequence[str] = ("cat", "dog", "owl"),
    size: tuple[int, int] = (28, 20),
) -> Path:
    """Writes folders of classes and returns their root.

    Args:
        folder: The root, created.
        counts: Images of each class in each split folder, e.g. ``{"train": 5, "test": 2}``.
        classes: Names of the class folders.
        size: Width and height in pixels.
    """
    random = np.random.default_rng(0)
    for split, count in counts.items():
        for name in classes:
            for number in range(count):
                path = folder / split / name / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return folder
