"""`keep_statistics`: a delta file that adapts at test time where training images are not at hand."""

from __future__ import annotations

from pathlib import Path

import torch

from vpt.argument_types import checked
from vpt.atomic_write import check_unused
from vpt.data import ImageDataModule
from vpt.data.targets import check_multiclass
from vpt.errors import check_number
from vpt.models.activations import Activations
from vpt.models.delta_file import fill, unfilled
from vpt.models.delta_format import model_digest, read_calibration, read_delta, write_delta
from vpt.robustness.evaluate import check_data
from vpt.robustness.test_time import LARGEST_SEED, SOURCE_IMAGES, source_statistics


@checked
def keep_statistics(delta: Path, data: ImageDataModule, out: Path, seed: int = 0, weights: str | None = None) -> Path:
    """Writes a delta file with what FOA and FOZO need to know of training images, and returns its path.

    Args:
        delta: A delta file of a classifier; a calibration that it has is kept.
        data: The task that it was trained on.
        out: The delta file to write, a new one.
        seed: Of the draw of `SOURCE_IMAGES` training images.
        weights: Where the backbone's weights are; None for where they were at training time.

    Raises:
        ConfigError: Delta and data do not belong together, FOA has no place in the backbone, or `out` exists.
        DeltaFileError: The file is not a delta file of a classifier.
        DataError: There are no training images, or one cannot be read.
    """
    check_unused(out)
    check_number("seed", seed, 0, LARGEST_SEED, whole=True)
    header, tensors = read_delta(delta)
    model, _ = unfilled(delta, weights)
    check_data(delta, model, data)
    check_multiclass(model.targets, "vpt robustness is")
    fill(model, tensors, str(delta))
    found = source_statistics(model.to("cuda" if torch.cuda.is_available() else "cpu"), data, seed)
    about = {
        "images": min(SOURCE_IMAGES, len(data.split("train"))),
        "seed": seed,
        "data": {"name": data.name, "fingerprint": data.fingerprint("train")},
        "model": model_digest(header, tensors),
    }
    kept = Activations(about, {name: tensor.float().cpu() for name, tensor in found.items()})
    return write_delta(out, header, tensors, read_calibration(delta), kept)
