"""Model soups: the mean of the weights of several runs (Wortsman et al., ICML 2022), and Model Stock.

The runs must lie in one basin, which is to say: start from the same weights (`vpt.robustness.soups.starts`).
`vpt.robustness.soups.averaging` says what a mean of deltas is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
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
from vpt.robustness.evaluate import check_data
from vpt.robustness.evaluation_result import why_val_cannot_choose
from vpt.robustness.evaluation_sets import VAL
from vpt.robustness.soups.averaging import LOW_RANK, Tensors, averaged, low_rank_changes, stacked
from vpt.robustness.soups.layers import Layers, layers_of, shares
from vpt.robustness.soups.starts import Start, common_start
from vpt.robustness.wise_ft import check_alike
from vpt.run_record import file_identity

_ALIKE = {"specs": "delta", "class_names": "classes", "preset": "preset", "targets": "targets", "head": "head"}
"""What the headers of all files say alike, and what it is called."""


@dataclass(frozen=True)
class Step:
    """What the greedy rule did with a run: its delta file, and validation accuracies in [0, 1].

    They are its own, `alone`, and that of the soup with it; None if it was dropped before all images were seen.
    `images` says how many were; `layer` where it was added or not, None for everywhere.
    """

    file: str
    alone: float
    soup: float | None
    images: int
    kept: bool
    layer: int | None = None


def uniform(deltas: Sequence[Path], out: Path) -> Path:
    """Averages at least two delta files of one configuration into a new one, and returns its path.

    Raises a ConfigError if they do not belong together or the file to write exists, a DeltaFileError if one is none.
    """
    check_unused(out)
    headers, ingredients, start = _read(deltas)
    specs, tensors = averaged(headers[0]["specs"], ingredients)
    info = _info("uniform", start, deltas, deltas, headers)
    return write_delta(out, headers[0] | {"specs": specs, "info": info}, tensors)


def greedy(
    deltas: Sequence[Path],
    out: Path,
    data: ImageDataModule,
    batch_size: int = 64,
    weights: str | None = None,
    report: Callable[[Step], None] = lambda step: None,
    by_layer: bool = False,
) -> Path:
    """Averages the runs that do not harm: from the best on, each stays if the soup with it is no worse on validation.

    A candidate is dropped as soon as the images that are left cannot lift it to the soup so far; the outcome is the
    same as without. The validation split of `data`, the task they were trained on, decides; `weights` says where the
    backbone's weights are, None for where they were at training time; `report` is called after each step. Errors are
    those of `uniform`, a ConfigError if validation images were trained on, and a DataError or WeightsError if an image
    or the weights cannot be read.

    With `by_layer` the rule is asked for each layer by itself, the embeddings first and the head last
    (`vpt.robustness.soups.layers`): all begin as the best run's, and a run is added to one layer after the other.
    These are at most N + (N − 1) · L evaluations of N runs with L layers in which they differ, N + N − 1 without.
    """
    check_unused(out)
    headers, ingredients, start = _read(deltas)
    if reason := why_val_cannot_choose([header["info"] for header in headers], data):
        raise ConfigError(f"A greedy soup is chosen on validation images: {reason}")
    model, _ = unfilled(deltas[0], weights)
    check_data(deltas[0], model, data)
    check_multiclass(model.targets, "vpt robustness is")
    search = _Search(out, headers[0], ingredients, model, data.split(VAL), batch_size)
    every = _layers(search.layers, ingredients) if by_layer else [None]
    total, alone = len(search.held_out), [search.hits({None: [run]}, 0)[0] for run in range(len(deltas))]
    order = sorted(range(len(deltas)), key=lambda run: -alone[run])
    best = alone[order[0]]
    members: Members = dict.fromkeys((None, *every), order[:1])
    trace = [Step(_name(deltas[order[0]]), best / total, best / total, total, kept=True)]
    report(trace[0])
    for layer in every:
        for run in order[1:]:
            tried = members | {layer: [*members[layer], run]}
            found, seen = search.hits(tried, best)
            kept = found >= best and seen == total
            if kept:
                members, best = tried, found
            accuracy = found / total if seen == total else None
            trace.append(Step(_name(deltas[run]), alone[run] / total, accuracy, seen, kept, layer))
            report(trace[-1])
    specs, tensors = search.soup(members)
    used = {run for each in members.values() for run in each}
    rule = "greedy by layer" if by_layer else "greedy"
    info = _info(rule, start, deltas, [deltas[run] for run in used], headers, trace)
    info["soup"] |= {"evaluations": len(deltas) + len(trace) - 1, "images": total}
    if by_layer:
        named = {layer: runs for layer, runs in members.items() if layer is not None}
        info["soup"]["layers"] = {str(layer): [_name(deltas[run]) for run in runs] for layer, runs in named.items()}
    return write_delta(out, headers[0] | {"specs": specs, "info": info}, tensors)


Members = dict[int | None, list[int]]
"""The runs that each layer is the mean of; under None those of all layers that are not named."""


class _Search:
    """Soups of some runs, and how many validation images they classify correctly."""

    def __init__(
        self,
        out: Path,
        header: Mapping[str, Any],
        ingredients: Sequence[Tensors],
        model: TunedModel,
        held_out: ImageDataset,
        batch_size: int,
    ) -> None:
        self.held_out = held_out
        self._out, self._header, self._ingredients = out, header, ingredients
        self._model, self._backbone, self._batch_size = model, model.backbone, batch_size
        self._device = "cuda" if torch.cuda.is_available() else "cpu"

    @cached_property
    def layers(self) -> Layers:
        """See `layers_of`."""
        return layers_of(self._model, self._ingredients[0])

    def soup(self, members: Members) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """The specs and tensors of a soup."""
        named = [each for layer, each in members.items() if layer is not None] or [members[None]]
        runs = list(dict.fromkeys(run for each in named for run in each))
        own = None
        if any(len(each) < len(runs) for each in named):
            numbers = {layer for each in self.layers.values() for layer in each}
            own = shares(self.layers, {layer: members.get(layer, members[None]) for layer in numbers}, runs)
        return averaged(self._header["specs"], [self._ingredients[run] for run in runs], own)

    def hits(self, members: Members, needed: int) -> tuple[int, int]:
        """See `count_hits`."""
        specs, tensors = self.soup(members)
        model = self._model
        if model.delta is not None and model.delta.specs != specs:  # a soup of LoRA has a larger rank
            model.delta.detach()
            header = {**self._header, "specs": specs}
            model = self._model = cast("TunedModel", rebuild(str(self._out), header, tensors, self._backbone))
        fill(model, tensors, str(self._out))
        return count_hits(model.to(self._device), self.held_out, self._batch_size, needed)


def _layers(layers: Layers, ingredients: Sequence[Tensors]) -> list[int | None]:
    """Those in which runs differ, ascending."""
    first, *others = ingredients
    differ = [key for key, tensor in first.items() if not all(torch.equal(tensor, each[key]) for each in others)]
    return [*sorted({layer for key in differ for layer in layers[key]})]


def stock(deltas: Sequence[Path], out: Path, anchor: Path | None = None, weights: str | None = None) -> Path:
    """Averages runs and pulls the mean towards what they started from, by how little they agree (Model Stock).

    Each trained copy, matrix or vector of the backbone gets the share t = N·c / (1 + (N − 1)·c) of N runs whose changes
    have the cosine c with each other, the mean of all pairs and at least 0 (Jang et al., "Model Stock", ECCV 2024,
    section 4.2); of LoRA the merged change, of DoRA that of the directions, of the head the change from an `anchor`'s,
    a linear probe's delta file. What starts nowhere, such as prompts and a head without an anchor, is averaged as by
    `uniform`; `weights` and errors are as of `greedy`.
    """
    check_unused(out)
    headers, ingredients, start = _read(deltas)
    model, _ = unfilled(deltas[0], weights)
    starts = _starts(headers[0]["specs"], model, ingredients[0])
    if anchor is not None:
        head = read_head(anchor, model, "anchor")
        starts |= {"head.weight": head.weight.detach(), "head.bias": head.bias.detach()}
    specs, tensors = averaged(headers[0]["specs"], ingredients)
    shares: dict[str, float] = {}
    for key, begun in starts.items():
        changes = [each[key].double() - begun.double() for each in ingredients]
        shares[key] = share(changes)
        pulled = begun.double() + shares[key] * torch.stack(changes).mean(dim=0)
        tensors[key] = pulled.to(tensors[key].dtype)
    for index, spec in enumerate(headers[0]["specs"]):
        if spec["name"] in LOW_RANK:
            room = f"delta.parts.{index}."
            merged = [low_rank_changes(room, each) for each in ingredients]
            own = {target: share([each[target] for each in merged]) for target in merged[0]}
            equal = {target: [value / len(deltas)] * len(deltas) for target, value in own.items()}
            tensors |= stacked(room, ingredients, equal)
            shares |= {room + target: value for target, value in own.items()}
    if not shares:
        raise ConfigError("Nothing in these files starts from the backbone, so that Model Stock is a uniform soup.")
    info = _info("model stock", start, deltas, deltas, headers)
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
            if kind == "values" and spec["name"] in ("norm", "full", "partial", "gps"):
                found[key] = own[name.replace("/", ".")]
                if (places := tensors.get(f"{room}places_{name}")) is not None:  # of the weights that gps selected
                    found[key] = found[key].flatten(1).gather(1, places.to(found[key].device).long())
            elif (spec["name"], kind) in (("dora", "magnitude"), ("bias", "values")):
                found[key] = model.owned()[key].detach().clone()  # which are not yet those of a file
            elif spec["name"] == "ssf":
                found[key] = torch.full_like(tensors[key], float(kind == "scale"))
    return {key: start.cpu() for key, start in found.items() if start.is_floating_point()}


@torch.inference_mode()
def count_hits(model: TunedModel, dataset: ImageDataset, batch_size: int, needed: int = 0) -> tuple[int, int]:
    """Counts images that are classified correctly, and those seen, until `needed` hits are out of reach."""
    device, hits, seen = model.backbone.mean.device, 0, 0
    while seen < len(dataset) and hits + len(dataset) - seen >= needed:
        rows = range(seen, min(seen + batch_size, len(dataset)))
        images = torch.stack([dataset[row]["image"] for row in rows]).to(device)
        labels = torch.from_numpy(dataset.labels[rows.start : rows.stop]).to(device)
        hits += int((model(images).argmax(dim=1) == labels).sum())
        seen = rows.stop
    return hits, seen


def _read(deltas: Sequence[Path]) -> tuple[list[dict[str, Any]], list[dict[str, Tensor]], Start | None]:
    if len(deltas) < 2:
        raise ConfigError(f"A soup is made of at least two delta files, got {len(deltas)}.")
    headers, ingredients = zip(*(read_delta(path) for path in deltas), strict=True)
    for path, header, tensors in zip(deltas[1:], headers[1:], ingredients[1:], strict=True):
        for what in ("fingerprint", "image_size", "normalization"):
            if header["backbone"][what] != headers[0]["backbone"][what]:
                names = " and ".join(str(each["backbone"]["weights_id"]) for each in (header, headers[0]))
                raise ConfigError(
                    f"{path} and {deltas[0]} differ in the backbone's {what} ({names}): a soup needs one backbone."
                )
        for key, what in _ALIKE.items():
            if header.get(key) != headers[0].get(key):
                raise ConfigError(f"{path} and {deltas[0]} differ in their {what}: a soup needs one configuration.")
        try:
            check_alike(ingredients[0], tensors)
        except ConfigError as error:
            raise ConfigError(f"{path} and {deltas[0]} cannot be averaged: {error}") from error
    return list(headers), list(ingredients), common_start(deltas, headers)


def _info(
    rule: str,
    start: Start | None,
    deltas: Sequence[Path],
    kept: Sequence[Path],
    headers: Sequence[Mapping[str, Any]],
    trace: Sequence[Step] = (),
) -> dict[str, Any]:
    """What the file says about itself; its data are those of the run that saw most validation images."""
    known = [header["info"].get("data") or {} for header in headers]
    return {
        "starts": start,
        "soup": {
            "rule": rule,
            "files": [{"name": _name(path), "sha256": file_identity(path), "kept": path in kept} for path in deltas],
            "trace": [asdict(step) for step in trace],
        },
        "data": max(known, key=lambda data: data.get("shared_with_train", {}).get(VAL, 0)) or None,
    }


def _name(path: Path) -> str:
    return "/".join(path.parts[-2:])
