"""Datasets as their authors publish them: where the folder is, which images it lists, and whether all are there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vpt.data.cache.content_hashes import home_path
from vpt.data.catalog.cards import Card
from vpt.data.images import ImageList, first_repeated
from vpt.data.splits import hold_out_every
from vpt.errors import DataError


def default_root() -> Path:
    """Returns the folder of all datasets: ``$VPT_DATA``, or ``datasets``."""
    return Path(os.environ.get("VPT_DATA") or "datasets")


def data_root(root: str | Path | None) -> Path:
    """Returns the folder of all datasets, ``~`` for the home folder; None for :func:`default_root`."""
    return home_path(root if root is not None else default_root())


def find_folder(card: Card, root: str | Path | None, official: str, needed: Sequence[str]) -> Path:
    """Finds the folder of a dataset below the data root, the first that holds all files and folders `needed`.

    It is ``<root>/<card's name>``, or within or beside it the authors' folder `official`. Where none does, a DataError
    names the first missing path, the expected tree and how to get the data.
    """
    root = data_root(root)
    candidates = [root / card.name / official, root / card.name, root / official]
    for folder in candidates:
        if all((folder / name).exists() for name in needed):
            return folder
    nearest = next((folder for folder in candidates if folder.is_dir()), root / card.name)
    missing = root if not root.is_dir() else nearest
    if missing.is_dir():
        missing = next(nearest / name for name in needed if not (nearest / name).exists())
    raise DataError(
        f"{missing} does not exist; set VPT_DATA or the root to the folder that holds {card.name}/ ({card.title}), "
        f"laid out as\n{card.layout.rstrip()}\n{card.obtain.rstrip()}"
    )


def image_list(
    file: Path, folder: Path, paths: Sequence[str], labels: Iterable[int], lines: Sequence[int] | None = None
) -> ImageList:
    """Makes a list of N images, relative to a folder, out of what a file of the authors says.

    `lines` is where each is in it, None for 1..N. A DataError where there is no image, or one is listed twice.
    """
    if not paths:
        raise DataError(f"{file} lists no image: unpack the archive again.")
    if (twice := first_repeated(paths, folder)) is not None:
        first, again = (position + 1 for position in twice)
        raise DataError(
            f"{file}: image {paths[twice[0]]} is listed twice, as number {first} and {again}; remove one of them."
        )
    return ImageList(file, folder, paths, np.fromiter(labels, dtype=np.int64), lines or range(1, len(paths) + 1))


def hold_out(images: ImageList, every: int, seed: int = 0) -> tuple[ImageList, ImageList]:
    """Splits one in `every` off an official training list to validate on (:func:`vpt.data.splits.hold_out_every`).

    Both keep the list's order; for 10 their sizes are those of the published FGVC splits, whose rule is not known.
    """
    kept, held = hold_out_every(images.paths, images.labels, every, seed)
    return images.take(kept), images.take(held)


def check_count(what: str, found: int, expected: int, allow_partial: bool, of: str = "images") -> bool:
    """Whether a number of images, or what else `of` says, is official; a DataError if not, unless accepted."""
    if found != expected and not allow_partial:
        raise DataError(
            f"{what}: found {found:,} {of}, expected {expected:,}; complete the copy, or set allow_partial=true, "
            "which the record of every result then states."
        )
    return found == expected


def damaged(file: Path, what: str, fault: object) -> DataError:
    """Returns the error for a file that is not what it should be; the fault is an exception or a sentence."""
    return DataError(f"{file} is not {what} ({str(fault).rstrip('.')}); get the file again.")


def read_mat(file: Path, *names: str) -> list[Any]:
    """Reads variables of a MATLAB file (5 to 7.2): numbers, characters, cells and structures.

    Nothing in it is executed. A DataError where it does not exist, is damaged or lacks a variable.
    """
    from scipy.io import loadmat

    if not file.is_file():
        raise DataError(f"{file} does not exist; unpack the archive that holds it there.")
    try:
        content = loadmat(file, variable_names=names)
        return [content[name] for name in names]
    except Exception as error:  # scipy raises a dozen unrelated types on damaged files
        raise damaged(file, f"a MATLAB file with {', '.join(names)}", error) from error
