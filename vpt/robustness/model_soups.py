"""Model soups: the mean of the weights of several runs (Wortsman et al., ICML 2022), and Model Stock.

The runs must lie in one basin, which is to say: start from the same weights. `vpt.robustness.averaging` says what a
mean of deltas is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor

from vpt.atomic_write import check_unused
from vpt.data import ImageDataModule, ImageDataset
from vpt.data.targets import check_multiclass
from vpt.errors import ConfigError
from vpt.models.classifier import TunedModel
from vpt.models.delta_file import fill, read_head, rebuild, unfilled
from vpt.models.delta_format import read_delta, write_delta
from vpt.robustness.averaging import Tensors, averaged, low_rank_changes, stacked
from vpt.robustness.evaluate import check_data
from vpt.robustness.evaluation_result import why_val_cannot_choose
from vpt.robustness.evaluation_sets import VAL
from vpt.robustness.wise_ft import check_alike
from vpt.run_record import file_identity


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
    specs, tensors = averaged(headers[0]["specs"], ingredients)
    return write_delta(
        out, headers[0] | {"specs": specs, "info": _info("uniform", deltas, deltas, headers, [])}, tensors
    )


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
    backbone, device = model.backbone, "cuda" if torch.cuda.is_available() else "cpu"
    held_out = data.split(VAL)
    total = len(held_out)

    def hits(members: Sequence[int], needed: int) -> tuple[int, int]:
        nonlocal model
        specs, tensors = averaged(headers[0]["specs"], [ingredients[member] for member in members])
        if model.delta is not None and model.delta.specs != specs:  # a soup of LoRA has a larger rank
            model.delta.detach()
            model = cast("TunedModel", rebuild(str(out), headers[0] | {"specs": specs}, tensors, backbone))
        fill(model, tensors, str(out))
        return count_hits(model.to(device), held_out, batch_size, needed)

    alone = [hits([run], 0)[0] for run in range(len(deltas))]
    order = sorted(range(len(deltas)), key=lambda run: -alone[run])
    soup, best, trace = [order[0]], alone[order[0]], []
    for run in order:
        if run == order[0]:
            step = Step(_name(deltas[run]), best / total, best / total, total, kept=True)
        else:
            found, seen = hits([*soup, run], best)
            kept = found >= best and seen == total
            if kept:
                soup, best = [*soup, run], found
            accuracy = found / total if seen == total else None
            step = Step(_name(deltas[run]), alone[run] / total, accuracy, seen, kept)
        trace.append(step)
        report(step)
    kept_files = [deltas[run] for run in soup]
    info = _info("greedy", deltas, kept_files, headers, trace)
    specs, tensors = averaged(headers[0]["specs"], [ingredients[run] for run in soup])
    return write_delta(out, headers[0] | {"specs": specs, "info": info}, tensors)


def stock(deltas: Sequence[Path], out: Path, anchor: Path | None = None, weights: str | None = None) -> Path:
    """Averages runs and pulls the mean towards what they started from, by how little they agree (Model Stock).

    Each trained copy, matrix or vector of the backbone gets the share t = N·c / (1 + (N − 1)·c) of N runs whose changes
    have the cosine c with each other, the mean of all pairs and at least 0 (Jang et al., "Model Stock", ECCV 2024,
    section 4.2); of LoRA the merged change, of the head the change from an `anchor`'s, a linear probe's delta file.
    What starts nowhere, such as prompts and a head without an anchor, is averaged as by `uniform`; `weights` and errors
    are as of `greedy`.
    """
    check_unused(out)
    headers, ingredients = _read(deltas)
    model, _ = unfilled(deltas[0], weights)
    starts = _starts(headers[0]["specs"], model, ingredients[0])
    if anchor is not None:
        head = read_head(anchor, model, "anchor")
        starts |= {"head.weight": head.weight.detach(), "head.bias": head.bias.detach()}
    specs, tensors = averaged(headers[0]["specs"], ingredients)
    shares: dict[str, float] = {}
    for key, start in starts.items():
        changes = [each[key].double() - start.double() for each in ingredients]
        shares[key] = share(changes)
        pulled = start.double() + shares[key] * torch.stack(changes).mean(dim=0)
        tensors[key] = pulled.to(tensors[key].dtype)
    for index, spec in enumerate(headers[0]["specs"]):
        if spec["name"] == "lora":
            room = f"delta.parts.{index}."
            merged = [low_rank_changes(room, each) for each in ingredients]
            own = {target: share([each[target] for each in merged]) for target in merged[0]}
            tensors |= stacked(room, ingredients, {target: value / len(deltas) for target, value in own.items()})
            shares |= {room + target: value for target, value in own.items()}
    if not shares:
        raise ConfigError("Nothing in these files starts from the backbone, so that Model Stock is a uniform soup.")
    info = _info("model stock", deltas, deltas, headers, [])
    info["soup"] |= {"shares": {key: round(value, 4) for key, value in shares.items()}}
    info["soup"] |= {"anchor": None if anchor is None else file_identity(anchor)}
    return write_delta(out, headers[0] | {"specs": specs, "info": info}, tensors)


def share(changes: Sequence[Tensor]) -> float:
    """How much of the mean of N changes stays, in [0, 1]: N·c / (1 + (N − 1)·c) of their mean cosine c ≥ 0."""
    flat = [change.flatten() / change.norm().clamp_min(torch.finfo(change.dtype).tiny) for change in changes]
    cosine = fmean(float(one @ other) for one, other in combinations(flat, 2))
    number, cosine = len(changes), min(max(cosine, 0.0), 1.0)
    return number * cosine / (1 + (number - 1) * cosine)


def _starts(specs: Sequence[Mapping[str, Any]], model: TunedModel, tensors: Tensors) -> dict[str, Tensor]:
    """What floating tensors of a delta file were before training, where that is known, by their names."""
    own = model.backbone.model.state_dict()
    found = {key: own[key.removeprefix("backbone.model.")] for key in tensors if key.startswith("backbone.model.")}
    for index, spec in enumerate(specs):
        room = f"delta.parts.{index}."
        for key in (key for key in tensors if key.startswith(room)):
            kind, _, name = key.removeprefix(room).partition(".")
            if kind == "values" and spec["name"] in ("bias", "norm", "full", "partial"):
                found[key] = own[name.replace("/", ".")]
            elif spec["name"] == "ssf":
                found[key] = torch.full_like(tensors[key], float(kind == "scale"))
    return {key: start.cpu() for key, start in found.items() if start.is_floating_point()}


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
