"""Diabetic retinopathy of Kaggle 2015, with the preprocessing of that competition's winner, which VTAB uses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vpt.data.cards import Card
from vpt.data.images import decode_rgb
from vpt.data.prepare.parts import Part, damaged, files, home

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
