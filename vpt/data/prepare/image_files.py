"""Originals that are image files, with text, MATLAB or JSON files that say which is which and what is in the scene."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vpt.data.catalog.cards import Card
from vpt.data.datasets import fgvc, pets
from vpt.data.datasets.published_files import damaged
from vpt.data.images import decode_rgb
from vpt.data.prepare.originals import MissingOriginalError, Part, files, home, listed_files, order, text
from vpt.errors import DataError

Scene = Sequence[Sequence[float]]
CLEVR_DISTANCES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
KITTI_DISTANCES = (-100.0, 8.0, 20.0, 999.0)
KITTI_VEHICLES = ("Car", "Van", "Truck")
NO_VEHICLE = 1000.0  # metres
_CALTECH_TRAIN = 30  # images of each class, as in TensorFlow Datasets


def read_caltech101(source: Path, card: Card) -> dict[str, Part]:
    """``101_ObjectCategories/<class>/image_0001.jpg``; 30 of each class are for training, chosen by `order`."""
    folder = home(source, card.class_names[0])
    parts: dict[str, dict[str, int]] = {"train": {}, "test": {}}
    for label, names in enumerate(_class_folders(folder, card.class_names)):
        for place, position in enumerate(order(len(names)).tolist()):
            parts["train" if place < _CALTECH_TRAIN else "test"][names[position]] = label
    return {part: files(folder, [*labels], [*labels.values()]) for part, labels in parts.items()}


def read_class_folders(source: Path, card: Card) -> dict[str, Part]:
    """``<class>/<name>.jpg``: EuroSAT and RESISC45."""
    folder = home(source, card.class_names[0])
    labels = {name: label for label, names in enumerate(_class_folders(folder, card.class_names)) for name in names}
    return {"train": files(folder, [*labels], [*labels.values()])}


def read_dtd(source: Path, card: Card) -> dict[str, Part]:
    """``images/<class>/<name>.jpg`` and ``labels/{train,val,test}1.txt``."""
    folder = home(source, "images", "labels/test1.txt")

    def record(line: str) -> tuple[str, int]:
        return line, card.class_names.index(line.partition("/")[0])

    return {
        part: _listed(folder / "labels" / f"{part}1.txt", folder / "images", record)
        for part in ("train", "val", "test")
    }


def read_pets(source: Path, card: Card) -> dict[str, Part]:
    """``images/<name>.jpg`` and ``annotations/{trainval,test}.txt`` with ``name class species breed``, from 1."""
    folder = home(source, "images", "annotations/test.txt")
    return {
        part: listed_files(pets.read_list(folder / "annotations" / f"{part}.txt", folder), "images")
        for part in ("trainval", "test")
    }


def read_sun397(source: Path, card: Card) -> dict[str, Part]:
    """``SUN397/a/abbey/sun_<id>.jpg`` and the three lists of TensorFlow Datasets, ``/a/abbey/sun_<id>.jpg`` a line."""
    folder = home(source, "SUN397", "sun397_tfds_te.txt")

    def record(line: str) -> tuple[str, int]:
        name = line.removeprefix("/")
        return name, card.class_names.index(name.partition("/")[2].rpartition("/")[0])

    lists = {"train": "tr", "val": "va", "test": "te"}
    return {
        part: _listed(folder / f"sun397_tfds_{short}.txt", folder / "SUN397", record) for part, short in lists.items()
    }


def read_flowers(source: Path, card: Card) -> dict[str, Part]:
    """``jpg/image_00001.jpg``, ``imagelabels.mat`` (labels from 1) and ``setid.mat`` (numbers of images, from 1)."""
    folder = home(source, "jpg", "imagelabels.mat", "setid.mat")
    return {part: listed_files(images, "jpg") for part, images in fgvc.read_flowers(folder).lists.items()}


def _class_folders(folder: Path, classes: Sequence[str]) -> list[list[str]]:
    """Names of the JPEGs of each class, sorted, relative to the folder of all classes."""
    names = [sorted(f"{kind}/{file.name}" for file in (folder / kind).glob("*.jpg")) for kind in classes]
    for kind, found in zip(classes, names, strict=True):
        if not found:
            raise MissingOriginalError(f"{folder / kind} does not exist or holds no .jpg")
    return names


def _listed(file: Path, folder: Path, record: Callable[[str], tuple[str, int]]) -> Part:
    """Reads a text file with one image a line; empty lines are skipped."""
    pairs = []
    for number, line in enumerate(text(file).splitlines(), start=1):
        try:
            if line.strip():
                pairs.append(record(line.strip()))
        except ValueError:
            raise DataError(f"{file}, line {number}: {line!r} names no image of a known class; get it again.") from None
    return files(folder, [name for name, _ in pairs], [label for _, label in pairs])


_RADIUS = 300  # pixels, VTAB's btgraham-300
_KEPT = 0.9  # of the radius; the rim is an artefact of the sharpening


def read_retinopathy(source: Path, card: Card) -> dict[str, Part]:
    """``{train,test}/<image>.jpeg``, ``trainLabels.csv`` and ``retinopathy_solution.csv`` (image, level, Usage).

    Of the test images the public ones of the leaderboard are for validation, the private ones for the test.
    """
    folder = home(source, "train", "test", "trainLabels.csv", "retinopathy_solution.csv")
    train = _table(folder / "trainLabels.csv", "image", "level")
    other = _table(folder / "retinopathy_solution.csv", "image", "level", "Usage")
    parts = {
        "train": ("train", train),
        "validation": ("test", other[other["Usage"] == "Public"]),
        "test": ("test", other[other["Usage"] == "Private"]),
    }
    return {part: _part(folder / images, part, table) for part, (images, table) in parts.items()}


def _part(folder: Path, part: str, table: pd.DataFrame) -> Part:
    """The preprocessed images of a table, as PNG."""
    originals = files(folder, [f"{name}.jpeg" for name in table["image"]], table["level"].tolist())
    names = [f"{part}/{name.removesuffix('jpeg')}png" for name in originals.names]
    return Part(
        names, originals.labels, lambda position: sharpen(np.asarray(decode_rgb(folder / originals.names[position])))
    )


def _table(file: Path, *columns: str) -> pd.DataFrame:
    try:
        return pd.read_csv(file, usecols=list(columns), dtype={"image": str, "level": int})
    except (OSError, ValueError) as error:  # pandas' own are ValueErrors
        raise damaged(file, f"a table of {', '.join(columns)}", error) from error


def sharpen(image: NDArray[np.uint8], radius: int = _RADIUS) -> NDArray[np.uint8]:
    """Scales the eye, uint8 (H, W, 3) on black, to one radius, subtracts the local average colour and cuts off the rim.

    Graham, Kaggle Diabetic Retinopathy Detection competition report, 2015; numbers as in TensorFlow Datasets'
    btgraham-300, uncompressed. At most 2·0.9·radius pixels high and wide; grey outside the eye.
    """
    import cv2

    height, width = image.shape[:2]
    across = image[height // 2].sum(axis=1, dtype=np.int64)
    found = np.count_nonzero(across > across.mean() / 10) / 2
    scale = radius / (found if found >= 1 else height / 2)
    scaled = cv2.resize(image, None, fx=scale, fy=scale)
    sharpened = cv2.addWeighted(scaled, 4, cv2.GaussianBlur(scaled, (0, 0), radius / 30), -4, 128)
    height, width = sharpened.shape[:2]
    kept = int(radius * _KEPT)
    rows, columns = np.ogrid[:height, :width]
    outside = (rows - height // 2) ** 2 + (columns - width // 2) ** 2 > kept**2
    sharpened[outside] = 128
    top, left = max(0, height // 2 - kept), max(0, width // 2 - kept)
    return np.ascontiguousarray(sharpened[top : height // 2 + kept, left : width // 2 + kept])


def clevr(label: Callable[[Scene], int]) -> Callable[[Path, Card], dict[str, Part]]:
    """Makes the reader of CLEVR for a label: ``images/{train,val}/`` and ``scenes/CLEVR_{train,val}_scenes.json``.

    The label is that of a scene's ``pixel_coords`` (x, y, distance to the camera) of all objects.
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
    """Number of objects, 3 to 10, as label 0 to 7."""
    return len(scene) - 3


def clevr_distance(scene: Scene) -> int:
    """Label 0..5 of the nearest object: (0, 8], (8, 8.5], (8.5, 9], (9, 9.5], (9.5, 10], (10, 100]; else -1 or 6."""
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
    """Nearest car, van or truck of (type, metres in front): up to 8 m, up to 20 m, farther; 3 for none."""
    return _class_of(min([z for kind, z in objects if kind in KITTI_VEHICLES] + [NO_VEHICLE]), KITTI_DISTANCES)


def _class_of(value: float, bounds: Sequence[float]) -> int:
    """Number of the last bound that lies below a value; -1 if none does."""
    return int(np.searchsorted(np.asarray(bounds, np.float32), np.float32(value), side="left")) - 1


def kitti_parts(videos: Sequence[str]) -> dict[str, list[int]]:
    """Splits KITTI's training images by video, 80/10/10, as TensorFlow Datasets does: no video is in two parts.

    Gives the sorted numbers of the images of train, val and test: 6,347, 423 and 711 of the original.
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
