"""Images and lists onto the disk, so that what is killed half-way can go on and never looks finished."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vpt.atomic_write import atomic_write, write_text
from vpt.data.content_hashes import in_threads
from vpt.data.prepare.originals import Part, Picture
from vpt.data.prepare.vtab_splits import Chosen
from vpt.errors import DataError

LAST = "test.txt"  # written last: a task without it is not finished
SOURCE = ".source"  # written first: which original the images are from
_SAMPLED = 16  # images of a part that stand for its contents


def write_task(folder: Path, parts: Mapping[str, Part], lists: Mapping[str, Chosen], classes: Sequence[str]) -> None:
    """Writes images, then classes.json and the lists, ``test.txt`` last.

    Images that are there already are kept, if ``.source`` says that they are of the same original.

    Args:
        folder: Of the task.
        parts: The original.
        lists: The images of ``train800``, ``val200`` and ``test``.
        classes: One name a class.

    Raises:
        DataError: An image is missing or damaged in the original, the folder holds images of another original, or the
            disk cannot be written.
    """
    wanted = {part: sorted({*_positions(lists, part)}) for part in parts}
    jobs = [(parts[part], position) for part, positions in wanted.items() for position in positions]

    def one(job: tuple[Part, int]) -> None:
        part, position = job
        _save(part, position, folder / "images" / part.names[position])

    try:
        _claim(folder, _hash(parts, wanted))
        for _ in in_threads(one, jobs, f"Preparing {folder.name}"):
            pass
        texts = {f"{name}.txt": _lines(parts[chosen.part], chosen) for name, chosen in lists.items()}
        texts["train800val200.txt"] = texts["train800.txt"] + texts["val200.txt"]
        texts["classes.json"] = json.dumps(list(classes), ensure_ascii=False)
        texts[LAST] = texts.pop(LAST)
        for left in folder.rglob(".*.part"):  # of a call that was killed
            left.unlink(missing_ok=True)
        for name, content in texts.items():
            write_text(folder / name, content)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written ({error}); the images written so far are kept, run the command again when "
            "that is mended."
        ) from error


def _claim(folder: Path, source: str) -> None:
    """Notes which original the images to come are from; refuses a folder with images of another."""
    marker = folder / SOURCE
    if marker.is_file() and marker.read_text(encoding="utf-8") == source:
        return
    if (folder / "images").exists():
        raise DataError(
            f"{folder} holds images of another or an unknown original: remove the folder to prepare it anew."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(marker, source)


def _hash(parts: Mapping[str, Part], wanted: Mapping[str, Sequence[int]]) -> str:
    """Hashes name, size, paths and labels of each part, and a sample of its images."""
    digest = hashlib.sha256()
    for name, part in parts.items():
        digest.update(json.dumps([name, len(part.names), *part.names]).encode() + part.labels.tobytes())
        for position in wanted[name][:: max(1, len(wanted[name]) // _SAMPLED)]:
            digest.update(_contents(_picture(part, position)))
    return digest.hexdigest()


def _contents(picture: Picture) -> bytes:
    if isinstance(picture, Path):
        return picture.read_bytes()
    return picture if isinstance(picture, bytes) else np.asarray(picture).tobytes()


def _positions(lists: Mapping[str, Chosen], part: str) -> list[int]:
    return [position for chosen in lists.values() if chosen.part == part for position in chosen.positions.tolist()]


def _lines(part: Part, chosen: Chosen) -> str:
    rows = ((part.names[position], part.labels[position]) for position in chosen.positions.tolist())
    return "".join(f"images/{name}\t{label}\n" for name, label in rows)


def _save(part: Part, position: int, file: Path) -> None:
    """Writes one image: a file copied as it is, bytes as they are, pixels as PNG."""
    if file.exists():
        return
    picture = _picture(part, position)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as partial:
        _fill(partial, picture)


def _picture(part: Part, position: int) -> Picture:
    try:
        picture = part.picture(position)
    except OSError as error:
        raise DataError(f"{part.names[position]} cannot be read from the original ({error}).") from error
    if isinstance(picture, Path) and not picture.is_file():
        raise DataError(f"{picture} is missing, though the original lists it; unpack the original again.")
    return picture


def _fill(file: Path, picture: Picture) -> None:
    if isinstance(picture, Path):
        shutil.copyfile(picture, file)
    elif isinstance(picture, bytes):
        file.write_bytes(picture)
    else:
        Image.fromarray(np.asarray(picture)).save(file, "PNG")
