"""Originals whose labels are computed from what is in the scene: CLEVR and KITTI."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from vpt.data.catalog.cards import Card
from vpt.data.datasets.published_files import damaged
from vpt.data.prepare.originals import Part, files, home, text
from vpt.errors import DataError

Scene = Sequence[Sequence[float]]
CLEVR_DISTANCES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
KITTI_DISTANCES = (-100.0, 8.0, 20.0, 999.0)
KITTI_VEHICLES = ("Car", "Van", "Truck")
NO_VEHICLE = 1000.0  # metres


def clevr(label: Callable[[Scene], int]) -> Callable[[Path, Card], dict[str, Part]]:
    """Makes the reader of CLEVR for a label: ``images/{train,val}/`` and ``scenes/CLEVR_{train,val}_scenes.json``.

    Args:
        label: Of the ``pixel_coords`` of all objects of a scene.
    """

    def read(source: Path, card: Card) -> dict[str, Part]:
        folder = home(source, "images", "scenes/CLEVR_train_scenes.json", "scenes/CLEVR_val_scenes.json")
        return {name: part(folder / "scenes" / f"CLEVR_{name}_scenes.json", folder, name) for name in ("train", "val")}

    def part(file: Path, folder: Path, name: str) -> Part:
        try:
            scenes = json.loads(text(file))["scenes"]
            names = [f"{name}/{scene['image_filename']}" for scene in scenes]
            labels = [label([thing["pixel_coords"] for thing in scene["objects"]]) for scene in scenes]
        except (ValueError, LookupError, TypeError) as error:
            raise damaged(file, "CLEVR's scenes with image_filename and objects", error) from error
        return files(folder / "images", names, labels)

    return read


def clevr_count(scene: Scene) -> int:
    """Number of objects, 3 to 10, as label 0 to 7.

    Args:
        scene: ``pixel_coords`` (x, y, distance to the camera) of each object.
    """
    return len(scene) - 3


def clevr_distance(scene: Scene) -> int:
    """Distance of the nearest object in the classes (0, 8], (8, 8.5], (8.5, 9], (9, 9.5], (9.5, 10], (10, 100].

    Args:
        scene: ``pixel_coords`` (x, y, distance to the camera) of each object, at least one.

    Returns:
        Label 0 to 5; -1 or 6 for a distance outside all classes.
    """
    return _class_of(min(coordinates[2] for coordinates in scene), CLEVR_DISTANCES)


def read_kitti(source: Path, card: Card) -> dict[str, Part]:
    """``training/image_2/000000.png``, ``training/label_2/000000.txt`` and ``mapping/`` of the development kit."""
    folder = home(source, "training/image_2", "training/label_2")
    mapping = home(source, "mapping/train_mapping.txt", "mapping/train_rand.txt") / "mapping"
    labels = folder / "training" / "label_2"
    return {
        part: files(
            folder / "training" / "image_2",
            [f"{number:06d}.png" for number in numbers],
            [kitti_distance(_objects(labels / f"{number:06d}.txt")) for number in numbers],
        )
        for part, numbers in kitti_parts(_videos(mapping)).items()
    }


def kitti_distance(objects: Iterable[tuple[str, float]]) -> int:
    """Distance of the nearest car, van or truck: up to 8 m, up to 20 m, farther, and label 3 for no vehicle.

    Args:
        objects: Type and z of the location, in metres in front of the camera, of each object.

    Returns:
        Label 0 to 3.
    """
    return _class_of(min([z for kind, z in objects if kind in KITTI_VEHICLES] + [NO_VEHICLE]), KITTI_DISTANCES)


def _class_of(value: float, bounds: Sequence[float]) -> int:
    """Number of the last bound that lies below a value; -1 if none does."""
    return int(np.searchsorted(np.asarray(bounds, np.float32), np.float32(value), side="left")) - 1


def kitti_parts(videos: Sequence[str]) -> dict[str, list[int]]:
    """Splits KITTI's training images by video, 80/10/10, as TensorFlow Datasets does: no video is in two parts.

    Args:
        videos: Name of the video of each image.

    Returns:
        Numbers of the images of train, val and test, sorted: 6,347, 423 and 711 of the original.
    """
    images = defaultdict(list)
    for number, video in enumerate(videos):
        images[video].append(number)
    draw = np.random.RandomState(123)  # the draws of the published split
    share = max(1, 10 * len(images) // 100)
    test = set(draw.choice(sorted(images), share, replace=False).tolist())
    val = set(draw.choice(sorted(images.keys() - test), share, replace=False).tolist())
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for video, numbers in images.items():
        parts["test" if video in test else "val" if video in val else "train"] += numbers
    return {part: sorted(numbers) for part, numbers in parts.items()}


def _videos(mapping: Path) -> list[str]:
    """Name of the video of each image: train_rand.txt says which line, from 1, of train_mapping.txt an image has."""
    lines = dict(enumerate(text(mapping / "train_mapping.txt").splitlines(), start=1))
    try:
        numbers = [int(number) for number in text(mapping / "train_rand.txt").replace(",", " ").split()]
        return [lines[number].split()[1] for number in numbers]
    except (ValueError, LookupError) as error:
        raise damaged(mapping / "train_rand.txt", "a list of lines of train_mapping.txt", error) from error


def _objects(file: Path) -> list[tuple[str, float]]:
    """Type and z of each object; a line has type, three numbers, a box, dimensions, location x y z and rotation."""
    objects = []
    for number, line in enumerate(text(file).splitlines(), start=1):
        fields = line.split()
        try:
            if fields:
                objects.append((fields[0], float(fields[13])))
        except (IndexError, ValueError):
            raise DataError(
                f"{file}, line {number}: not the 15 fields of a KITTI object; get the file again."
            ) from None
    return objects
