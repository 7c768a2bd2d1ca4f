"""In which layer of the backbone each tensor of a delta file lies, so that each layer may be averaged of other runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from vpt.backbones.factory import Backbone
from vpt.backbones.strength import by_place
from vpt.backbones.target_modules import layer_numbers
from vpt.deltas.base import DeltaPart
from vpt.models.classifier import AdaptedModel

Layers = dict[str, tuple[int, ...]]
"""By tensor: its layer, or that of each of its rows where there are several."""

_STACKED = ("tokens", "keys", "values")
"""Tensors of prompts and prefixes that have a row for each place."""


def layers_of(model: AdaptedModel, tensors: Mapping[str, Tensor]) -> Layers:
    """The layers of the tensors of a model's delta file, counted as strengths of layers are (`checked_strength`).

    What lies in no layer, or in several, counts to the last, as the head does. An UnsupportedBackboneError where timm
    tells no layers.
    """
    backbone = model.backbone
    last = layer_numbers(backbone)[1]
    found: Layers = dict.fromkeys(tensors, (last,))
    weights = {key: key.removeprefix("backbone.model.") for key in tensors if key.startswith("backbone.model.")}
    found |= {key: (layer,) for key, layer in _numbered(weights, backbone).items()}
    for index, part in enumerate(model.parts()):
        room = f"delta.parts.{index}."
        own = {key.removeprefix(room): tensor for key, tensor in tensors.items() if key.startswith(room)}
        found |= {room + key: layers for key, layers in _of_part(part, own, last).items()}
    return found


def _numbered(places: Mapping[str, object], backbone: Backbone) -> dict[str, int]:
    every = tuple(float(layer) for layer in range(layer_numbers(backbone)[1] + 1))
    return {key: round(layer) for key, layer in by_place(every, places, backbone).items()}  # type: ignore[arg-type]


def _of_part(part: DeltaPart, tensors: Mapping[str, Tensor], last: int) -> Layers:
    places = part.places()
    numbers = _numbered({str(key): place for key, place in places.items()}, part.backbone)
    if len(numbers) == 1:
        return dict.fromkeys(tensors, tuple(numbers.values()))
    if any(isinstance(key, str) for key in places):
        return {key: (next((numbers[word] for word in key.split(".") if word in numbers), last),) for key in tensors}
    found: Layers = {}
    for name in _STACKED:
        rows = [key for key in sorted(tensors, key=_position) if key.split(".")[0] == name]
        counts = [len(tensors[key]) for key in rows]
        if sum(counts) == len(numbers):
            each = iter(numbers[str(layer)] for layer in range(len(numbers)))
            found |= {key: tuple(next(each) for _ in range(count)) for key, count in zip(rows, counts, strict=True)}
    return {key: found.get(key, (last,)) for key in tensors}


def _position(key: str) -> int:
    """The place of a tensor in a list of them."""
    number = key.rpartition(".")[2]
    return int(number) if number.isdecimal() else 0


def shares(layers: Layers, members: Mapping[int, Sequence[int]], runs: Iterable[int]) -> dict[str, list[Tensor]]:
    """How much of each tensor comes from each of some runs, where a layer is the mean of its members.

    A number, or of tensors with a row for each layer (rows, 1, 1); in double precision.
    """

    def one(own: tuple[int, ...], run: int) -> Tensor:
        parts = [(run in members[layer]) / len(members[layer]) for layer in own]
        found = torch.tensor(parts, dtype=torch.float64)
        return found[0] if len(parts) == 1 else found[:, None, None]

    runs = list(runs)
    return {key: [one(own, run) for run in runs] for key, own in layers.items()}
