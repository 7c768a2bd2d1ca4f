"""Images of none of the known classes: how strange an evaluated model finds them, beside the clean test images.

For each strength a file keeps what every image scored, high where it looks unknown, so that a report needs no image:
by the classifier's own answers, and by how far its features lie from those of training images.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from vpt.atomic_write import atomic_write
from vpt.data import ImageDataModule, ImageDataset
from vpt.data.images import ImageList, LeftOut, find_images
from vpt.data.splits import Split, listed_split
from vpt.errors import ConfigError, DataError
from vpt.metrics import ood_detection as ood
from vpt.metrics.logits import check_finite, group_max
from vpt.models import TunedModel
from vpt.models.prediction import batch_answers
from vpt.robustness.evaluation_sets import groups, subset
from vpt.robustness.wise_ft import Swept
from vpt.run_record import identity

FORMAT = "vpt-unknown/1"
SCORES = ("max softmax", "energy", "Mahalanobis", "nearest neighbour")
"""One minus the largest probability, the free energy, and both feature scores of `vpt.metrics.ood_detection`."""
FITTED, NEIGHBOURS, K = 20_000, 2_000, 1
"""How many training images the feature scores are fitted to, at most, drawn by class; among how many of them the
nearest neighbours are looked for, and which of them counts: as `vpt calibrate` has them."""
_KEY = b"vpt"


@dataclass(frozen=True)
class UnknownRow:
    """What was scored: a set of unknown images at one strength, and the file name of its record.

    `known` and `unknown` count the images.
    """

    set: str
    alpha: float
    known: int
    unknown: int
    record: str


@dataclass(frozen=True)
class UnknownRecord:
    """`SCORES` of N known and M unknown images, by name and whether the images are known, and their protocol."""

    known: Mapping[str, NDArray[np.float64]]
    unknown: Mapping[str, NDArray[np.float64]]
    protocol: Mapping[str, Any]


def unknown_splits(data: ImageDataModule, folders: Sequence[Path]) -> dict[str, Split]:
    """The images in and below some folders, by the name of the folder.

    A DataError where a folder is missing or holds no image; a ConfigError where two have one name, or an image is one
    of the data's own, whose class is known.
    """
    found: dict[str, Split] = {}
    for folder in folders:
        name, left = folder.resolve().name or "images", LeftOut()
        if not folder.is_dir():
            raise DataError(f"There is no folder {folder} of unknown images.")
        if name in found:
            raise ConfigError(f"Two folders of unknown images are called {name}: rename one.")
        files = find_images(folder, left, data.preset.channels is not None)
        paths = [Path(file).relative_to(folder).as_posix() for file in files]
        if not paths:
            raise DataError(f"{folder} holds no image.")
        left.warn(folder)
        images = ImageList(folder, folder, paths, np.zeros(len(paths), np.int64), (), channels=data.preset.channels)
        found[name] = listed_split(name, images, data.preset, data.image_size)
        _check_unknown(data, name, found[name])
    return found


def _check_unknown(data: ImageDataModule, name: str, split: Split) -> None:
    ours = {row.tobytes() for row in split.hashes if row.any()}  # zeros are of files that cannot be read
    for own in ("train", "val", "test"):
        if shared := sum(row.tobytes() in ours for row in data.hashes(own)):
            raise ConfigError(
                f"{shared} of the {own} images of {data.name} are in the folder {name} of unknown images, but their "
                "classes are known: take them out."
            )


def measure(
    swept: Swept,
    data: ImageDataModule,
    splits: Mapping[str, Split],
    alphas: Sequence[float],
    protocol: Mapping[str, Any],
    out: Path,
    batch_size: int,
    max_images: int | None,
    seed: int,
) -> list[UnknownRow]:
    """Scores the clean test images and those of `splits` at each α; what was scored before is taken up.

    Records are written to `out`, under names that end in the hash of all that they depend on: `protocol`, which all
    records of the evaluation share, and which images they are of and are fitted to. `max_images` and `seed` are of the
    clean set.

    Raises:
        ConfigError: The training images of each class have equal features.
        DataError: There are no training images, an image cannot be read, or logits are not finite.
    """
    test, train = data.split("test"), data.split("train")
    rows, fitted = subset(test.labels, max_images, seed), subset(train.labels, FITTED, 0)
    own = {
        "list": data.describe()["lists"]["test"],
        "groups": groups(data, "test"),
        "n": len(rows),
        "seed": None if len(rows) == len(test) else seed,
        "fitted": {"images": len(fitted), "neighbours": min(NEIGHBOURS, len(fitted)), "k": K},
    }
    found = []
    for alpha in alphas:
        told = {
            name: {**protocol, **own, "set": name, "alpha": float(alpha), "unknown": split.fingerprint}
            for name, split in splits.items()
        }
        files = {name: _file(out, each) for name, each in told.items()}
        missing = [name for name in splits if resume(files[name], told[name]) is None]
        if missing:
            swept.set_alpha(alpha)
            score = _scorer(swept.model, train, fitted, own["groups"], batch_size)
            known = score(test, rows)
            for name in missing:
                strange = ImageDataset(splits[name])
                record = UnknownRecord(known, score(strange, np.arange(len(strange))), told[name])
                write(files[name], record)
        found += [
            UnknownRow(name, float(alpha), len(rows), len(split), files[name].name) for name, split in splits.items()
        ]
    return sorted(found, key=lambda row: list(splits).index(row.set))


def _file(out: Path, protocol: Mapping[str, Any]) -> Path:
    return out / f"unknown-{protocol['set']}-alpha-{protocol['alpha']}-{identity(protocol)[:12]}.parquet"


Score = Callable[[ImageDataset, NDArray[np.int64]], dict[str, NDArray[np.float64]]]


def _scorer(
    model: TunedModel,
    train: ImageDataset,
    fitted: NDArray[np.int64],
    groups: Sequence[Sequence[int]] | None,
    batch_size: int,
) -> Score:
    """The scores of a model at its present strength, of images of a list at some positions."""
    _, features = batch_answers(model, train, fitted.tolist(), batch_size)
    means, whitening = ood.fit_mahalanobis(features, train.labels[fitted])
    neighbours = features[subset(train.labels[fitted], NEIGHBOURS, 0)]

    def score(dataset: ImageDataset, rows: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        logits, features = batch_answers(model, dataset, rows.tolist(), batch_size)
        check_finite(logits)
        if groups is not None:
            logits = group_max(torch.from_numpy(logits), groups).numpy()
        found = [ood.msp(logits), ood.energy(logits), ood.mahalanobis(features, means, whitening)]
        found.append(ood.nearest_neighbours(features, neighbours, K))
        return dict(zip(SCORES, found, strict=True))

    return score


def write(path: Path, record: UnknownRecord) -> None:
    """Writes a record as Parquet: a row an image, known ones first; never half."""
    known, unknown = (len(next(iter(each.values()))) for each in (record.known, record.unknown))
    columns = {name: np.concatenate([record.known[name], record.unknown[name]]) for name in SCORES}
    table = pa.table({"known": pa.array([True] * known + [False] * unknown), **columns})
    header = json.dumps({"format": FORMAT, "protocol": record.protocol}, sort_keys=True)
    with atomic_write(path) as partial:
        pq.write_table(table.replace_schema_metadata({_KEY: header}), partial)


def read(path: Path) -> UnknownRecord:
    """Reads a record; a DataError where it is missing, damaged, or of another format."""
    try:
        table = pq.read_table(path)
        header = json.loads((table.schema.metadata or {})[_KEY])
        is_known = table["known"].to_numpy().astype(bool)
        scores = {name: table[name].to_numpy().astype(np.float64) for name in SCORES}
        fine = header["format"] == FORMAT and isinstance(header["protocol"], dict)
        if not fine or not all(np.isfinite(each).all() for each in scores.values()):
            raise ValueError("not what was written")
    except (OSError, AttributeError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"{path} is no record of unknown images: `vpt robustness run --unknown` writes them."
        ) from error
    known, unknown = ({name: each[rows] for name, each in scores.items()} for rows in (is_known, ~is_known))
    return UnknownRecord(known, unknown, header["protocol"])


def resume(path: Path, protocol: Mapping[str, Any]) -> UnknownRecord | None:
    """What an earlier evaluation left; None if it is damaged or of another protocol."""
    try:
        record = read(path)
    except DataError:
        return None
    return record if record.protocol == json.loads(json.dumps(protocol)) else None
