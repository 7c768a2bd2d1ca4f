"""The 19 tasks of VTAB-1k: how each original is read, which ranges its lists are taken from, and how it is written.

Sizes and ranges are those of VTAB (Zhai et al. 2019) on TensorFlow Datasets; the cards have the versions.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from vpt.atomic_write import atomic_write, write_text
from vpt.data.cache.content_hashes import home_path, in_threads
from vpt.data.catalog.cards import find_card
from vpt.data.images import first_repeated
from vpt.data.prepare import arrays, image_files
from vpt.data.prepare.originals import Chosen, MissingOriginalError, Part, Picture, Reader, SplitRule, choose
from vpt.data.prepare.tfrecord import read_dmlab
from vpt.errors import DataError, UnknownNameError

LAST = "test.txt"  # written last: a task without it is not finished
SOURCE = ".source"  # written first: which original the images are from
_SAMPLED = 16  # images of a part that stand for its contents


@dataclass(frozen=True)
class Task:
    """How an original becomes a task: what reads it, and which of its images are in which list."""

    read: Reader
    split: SplitRule


_PUBLISHED = ("train", "val", "test")
_PUBLISHED_TFDS = ("train", "validation", "test")
_NINE_TENTHS = ("train[:90%]", "train[90%:]", "test")
_SIX_TENTHS = ("train[:60%]", "train[60%:80%]", "train[80%:]")
_CLEVR = SplitRule({"train": 70_000, "val": 15_000}, "train[:90%]", "train[90%:]", "val")
_DSPRITES = SplitRule({"train": 737_280}, "train[:80%]", "train[80%:90%]", "train[90%:]")
_SMALLNORB = SplitRule({"train": 24_300, "test": 24_300}, "train", "test[:50%]", "test[50%:]")
_PETS = SplitRule({"trainval": 3_680, "test": 3_669}, "trainval[:80%]", "trainval[80%:]", "test")
_CAMELYON = SplitRule({"train": 262_144, "valid": 32_768, "test": 32_768}, "train", "valid", "test")
_RETINOPATHY = SplitRule({"train": 35_126, "validation": 10_906, "test": 42_670}, *_PUBLISHED_TFDS)
_FLOWERS = SplitRule({"train": 1_020, "val": 1_020, "test": 6_149}, *_PUBLISHED)
_SUN397 = SplitRule({"train": 76_128, "val": 10_875, "test": 21_750}, *_PUBLISHED)
_DMLAB = SplitRule({"train": 65_550, "validation": 22_628, "test": 22_735}, *_PUBLISHED_TFDS)

TASKS: dict[str, Task] = {
    "cifar": Task(arrays.read_cifar100, SplitRule({"train": 50_000, "test": 10_000}, *_NINE_TENTHS)),
    "caltech101": Task(image_files.read_caltech101, SplitRule({"train": 3_060, "test": 6_084}, *_NINE_TENTHS)),
    "dtd": Task(image_files.read_dtd, SplitRule({"train": 1_880, "val": 1_880, "test": 1_880}, *_PUBLISHED)),
    "oxford_flowers102": Task(image_files.read_flowers, _FLOWERS),
    "oxford_iiit_pet": Task(image_files.read_pets, _PETS),
    "svhn": Task(arrays.read_svhn, SplitRule({"train": 73_257, "test": 26_032}, *_NINE_TENTHS)),
    "sun397": Task(image_files.read_sun397, _SUN397),
    "patch_camelyon": Task(arrays.read_camelyon, _CAMELYON),
    "eurosat": Task(image_files.read_class_folders, SplitRule({"train": 27_000}, *_SIX_TENTHS)),
    "resisc45": Task(image_files.read_class_folders, SplitRule({"train": 31_500}, *_SIX_TENTHS)),
    "diabetic_retinopathy": Task(image_files.read_retinopathy, _RETINOPATHY),
    "clevr_count": Task(image_files.clevr(image_files.clevr_count), _CLEVR),
    "clevr_dist": Task(image_files.clevr(image_files.clevr_distance), _CLEVR),
    "dmlab": Task(read_dmlab, _DMLAB),
    "kitti": Task(image_files.read_kitti, SplitRule({"train": 6_347, "val": 423, "test": 711}, *_PUBLISHED)),
    "dsprites_loc": Task(arrays.dsprites(lambda latents: arrays.dsprites_bin(latents[:, 4], 32)), _DSPRITES),
    "dsprites_ori": Task(arrays.dsprites(lambda latents: arrays.dsprites_bin(latents[:, 3], 40)), _DSPRITES),
    "smallnorb_azi": Task(arrays.smallnorb(arrays.smallnorb_azimuth), _SMALLNORB),
    "smallnorb_ele": Task(arrays.smallnorb(arrays.smallnorb_elevation), _SMALLNORB),
}


def prepare(task: str, source: str | Path, root: str | Path, allow_partial: bool = False) -> Path:
    """Turns an original into the folder ``<root>/<task>/``: images without loss, lists, and classes.json.

    Image files are copied as they are, arrays become PNG; only retinopathy is preprocessed, as VTAB demands. What is
    killed half-way is no finished task: ``test.txt`` is written last, and the next call with the same original goes on
    where it stopped. The source is laid out as the card's ``layout`` shows; `allow_partial` accepts too few images,
    whose split is another. An UnknownNameError where there is no such task, and a DataError where the original is
    missing, damaged or incomplete, the task is there already, or the disk is full.
    """
    if task not in TASKS:
        raise UnknownNameError("VTAB task", task, TASKS)
    folder = home_path(root) / task
    if (folder / LAST).exists():
        raise DataError(f"{folder} is there already, it has {LAST}; remove the folder to prepare it anew.")
    card = find_card(task)
    try:
        parts = TASKS[task].read(home_path(source), card)
    except MissingOriginalError as error:
        raise DataError(f"{error}; the original of {task} is laid out as\n{card.layout}\n{card.obtain}") from error
    sizes = {name: len(part.names) for name, part in parts.items()}
    official = TASKS[task].split.sizes
    if sizes != official and not allow_partial:
        raise DataError(
            f"{source} has {_counts(sizes)} images, and {task} has {_counts(official)}; complete it, or allow a "
            "partial original, whose numbers compare with no other."
        )
    lists = choose(TASKS[task].split, sizes)
    _check(source, parts, lists, card.num_classes)
    write_task(folder, parts, lists, card.class_names or [str(label) for label in range(card.num_classes)])
    return folder


def _counts(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {part}" for part, count in sizes.items())


def _check(source: str | Path, parts: Mapping[str, Part], lists: Mapping[str, Chosen], classes: int) -> None:
    """Refuses an empty list, a label outside the classes, a name twice or a name that leads out of the folder."""
    for part in parts.values():
        for name, label in zip(part.names, part.labels.tolist(), strict=True):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not name.isprintable():
                raise DataError(f"{source} lists the image {name!r}, which is no path below its folder.")
            if not 0 <= label < classes:
                raise DataError(f"{source} gives {name!r} the label {label}, which is outside 0..{classes - 1}.")
    names = [name for part in parts.values() for name in part.names]
    if (twice := first_repeated(names, Path())) is not None:
        raise DataError(f"{source} lists the image {names[twice[0]]!r} twice.")
    for name, chosen in lists.items():
        if not len(chosen.positions):
            raise DataError(f"{source} has too few images: none is left for {name}.")


def write_task(folder: Path, parts: Mapping[str, Part], lists: Mapping[str, Chosen], classes: Sequence[str]) -> None:
    """Writes images, then classes.json and the lists, ``test.txt`` last.

    Images that are there already are kept, if ``.source`` says that they are of the same original.
    """
    wanted = {
        part: sorted({number for each in lists.values() if each.part == part for number in each.positions.tolist()})
        for part in parts
    }
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
            f"{folder} cannot be written ({error.__cause__ or error}); the images written so far are kept, run the "
            "command again when that is mended."
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
        Image.fromarray(np.ascontiguousarray(picture)).save(file, "PNG")
