"""Model soups: the mean of the weights of several runs (Wortsman et al., ICML 2022).

The runs must lie in one basin, which is to say: start from the same weights. Prompts have no order, so prompts of runs
with different seeds do not correspond, and their mean means little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpt.atomic_write import check_unused
from vpt.data import ImageDataModule, ImageDataset
from vpt.data.targets import check_multiclass
from vpt.errors import ConfigError
from vpt.models.classifier import TunedModel
from vpt.models.delta_file import fill, unfilled
from vpt.models.delta_format import read_delta, write_delta
from vpt.robustness.evaluate import check_data
from vpt.robustness.evaluation_result import why_val_cannot_choose
from vpt.robustness.evaluation_sets import VAL
from vpt.robustness.wise_ft import check_alike
from vpt.run_record import file_identity

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Step:
    """What the greedy rule did with a run: its delta file, and validation accuracies in [0, 1].

    They are its own, `alone`, and that of the soup with it; None if it was dropped before all images were seen.
    `images` says how many were.
    """

    file: str
    alone: float
    soup: float | None
    images: int
    kept: bool


def uniform(deltas: Sequence[Path], out: Path) -> Path:
    """Averages at least two delta files of one configuration into a new one, and returns its path.

    Raises a ConfigError if they do not belong together or the file to write exists, a DeltaFileError if one is none.
    """
    check_unused(out)
    headers, ingredients = _read(deltas)
    return write_delta(out, headers[0] | {"info": _info("uniform", deltas, deltas, headers, [])}, mean(ingredients))


def greedy(
    deltas: Sequence[Path],
    out: Path,
    data: ImageDataModule,
    batch_size: int = 64,
    weights: str | None = None,
    report: Callable[[Step], None] = lambda step: None,
) -> Path:
    """Averages the runs that do not harm: from the best on, each stays if the soup with it is no worse on validation.

    A candidate is dropped as soon as the images that are left cannot lift it to the soup so far; the outcome is the
    same as without. The validation split of `data`, the task they were trained on, decides; `weights` says where the
    backbone's weights are, None for where they were at training time; `report` is called after each step. Errors are
    those of `uniform`, a ConfigError if validation images were trained on, and a DataError or WeightsError if an image
    or the weights cannot be read.
    """
    check_unused(out)
    headers, ingredients = _read(deltas)
    if reason := why_val_cannot_choose([header["info"] for header in headers], data):
        raise ConfigError(f"A greedy soup is chosen on validation images: {reason}")
    model, _ = unfilled(deltas[0], weights)
    check_data(deltas[0], model, data)
    check_multiclass(model.targets, "vpt robustness is")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    held_out = data.split(VAL)
    total = len(held_out)

    def hits(tensors: Tensors, needed: int) -> tuple[int, int]:
        fill(model, tensors, str(out))
        return count_hits(model, held_out, batch_size, needed)

    alone = [hits(tensors, 0)[0] for tensors in ingredients]
    order = sorted(range(len(deltas)), key=lambda run: -alone[run])
    soup, best, trace = [order[0]], alone[order[0]], []
    for run in order:
        if run == order[0]:
            step = Step(_name(deltas[run]), best / total, best / total, total, kept=True)
        else:
            found, seen = hits(mean([ingredients[member] for member in [*soup, run]]), best)
            kept = found >= best and seen == total
            if kept:
                soup, best = [*soup, run], found
            accuracy = found / total if seen == total else None
            step = Step(_name(deltas[run]), alone[run] / total, accuracy, seen, kept)
        trace.append(step)
        report(step)
    kept_files = [deltas[run] for run in soup]
    info = _info("greedy", deltas, kept_files, headers, trace)
    return write_delta(out, headers[0] | {"info": info}, mean([ingredients[run] for run in soup]))


def mean(ingredients: Sequence[Tensors]) -> dict[str, Tensor]:
    """The mean of floating tensors, summed in double precision; others are equal and stay, or are the first's.

    The latter are batch norm's counters of batches; its means and variances are averaged.
    """
    first = ingredients[0]
    if len(ingredients) == 1:
        return dict(first)
    return {
        key: torch.stack([each[key].double() for each in ingredients]).mean(dim=0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for key, tensor in first.items()
    }


@torch.inference_mode()
def count_hits(model: TunedModel, dataset: ImageDataset, batch_size: int, needed: int = 0) -> tuple[int, int]:
    """Counts images that are classified correctly, and those seen, until `needed` hits are out of reach."""
    device, hits, seen = model.head.weight.device, 0, 0
    while seen < len(dataset) and hits + len(dataset) - seen >= needed:
        rows = range(seen, min(seen + batch_size, len(dataset)))
        images = torch.stack([dataset[row]["image"] for row in rows]).to(device)
        labels = torch.from_numpy(dataset.labels[rows.start : rows.stop]).to(device)
        hits += int((model(images).argmax(dim=1) == labels).sum())
        seen = rows.stop
    return hits, seen


def _read(deltas: Sequence[Path]) -> tuple[list[dict[str, Any]], list[dict[str, Tensor]]]:
    if len(deltas) < 2:
        raise ConfigError(f"A soup is made of at least two delta files, got {len(deltas)}.")
    headers, ingredients = zip(*(read_delta(path) for path in deltas), strict=True)
    for path, header, tensors in zip(deltas[1:], headers[1:], ingredients[1:], strict=True):
        for what in ("fingerprint", "image_size", "normalization"):
            if header["backbone"][what] != headers[0]["backbone"][what]:
                raise ConfigError(f"{path} and {deltas[0]} differ in the backbone's {what}: a soup needs one backbone.")
        for key, what in (("specs", "delta"), ("class_names", "classes"), ("preset", "preset"), ("targets", "targets")):
            if header.get(key) != headers[0].get(key):
                raise ConfigError(f"{path} and {deltas[0]} differ in their {what}: a soup needs one configuration.")
        try:
            check_alike(ingredients[0], tensors)
        except ConfigError as error:
            raise ConfigError(f"{path} and {deltas[0]} cannot be averaged: {error}") from error
    return list(headers), list(ingredients)


def _info(
    rule: str, deltas: Sequence[Path], kept: Sequence[Path], headers: Sequence[Mapping[str, Any]], trace: Sequence[Step]
) -> dict[str, Any]:
    """What the file says about itself; its data are those of the run that saw most validation images."""
    known = [header["info"].get("data") or {} for header in headers]
    return {
        "soup": {
            "rule": rule,
            "files": [{"name": _name(path), "sha256": file_identity(path), "kept": path in kept} for path in deltas],
            "trace": [asdict(step) for step in trace],
        },
        "data": max(known, key=lambda data: data.get("shared_with_train", {}).get(VAL, 0)) or None,
    }


def _name(path: Path) -> str:
    return "/".join(path.parts[-2:])
