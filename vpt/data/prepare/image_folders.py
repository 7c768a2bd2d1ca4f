"""Originals that are image files in folders, with text or MATLAB files that say which is which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vpt.data.catalog.cards import Card
from vpt.data.datasets import fgvc, pets
from vpt.data.datasets.published_files import damaged
from vpt.data.images import decode_rgb
from vpt.data.prepare.originals import MissingOriginalError, Part, files, home, listed_files, text
from vpt.data.prepare.vtab_splits import order
from vpt.errors import DataError

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
    """Scales the eye to one radius, subtracts the local average colour and cuts off the rim.

    Graham, Kaggle Diabetic Retinopathy Detection competition report, 2015; numbers as in TensorFlow Datasets'
    btgraham-300, except that the result is not compressed.

    Args:
        image: uint8 (H, W, 3), an eye on black.
        radius: Of the eye in the result, in pixels.

    Returns:
        uint8, at most 2·0.9·radius pixels high and wide; grey outside the eye.
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
