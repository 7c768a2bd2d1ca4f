"""Files of weights: tensors under a model's own names, whatever training wrapped around them; nothing is unpickled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from timm.models import load_state_dict
from torch import Tensor

from vpt.errors import WeightsError

_AVERAGED = ("state_dict_ema.", "model_ema.", "teacher.")
"""Of several networks in one file, what a training averages is what its authors evaluate (DINO's teacher)."""


def read_weights(path: Path, names: Collection[str], instead: str) -> dict[str, Any]:
    """Reads tensors by the `names` that a model gives them from safetensors, or a PyTorch state dict, perhaps nested.

    A training keeps its network within others: ``teacher`` of DINO's, ``backbone.`` or ``model.`` of a LightningModule,
    ``module.`` of a parallel one. The file's names that end in the model's show where it lies, and what lies outside,
    such as the heads of the training, is left out; nothing is where the names are not known to be wrapped.
    """
    if not path.is_file():
        folder = ", which is a folder" if path.is_dir() else ""
        raise WeightsError(f"No weights file {path}{folder}: give an existing file{instead}.")
    try:
        state = cast("dict[str, Any]", load_state_dict(str(path), weights_only=True))
        tensors = dict(_tensors(state))
    except Exception as error:  # whatever the bytes provoke, the file is not one of weights
        raise WeightsError(f"{path} is not a readable weights file: {first_line(error)}") from error
    if not tensors:
        raise WeightsError(f"{path} holds no tensors: give a file of weights.")
    prefix = _prefix(path, tensors, names)
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)} if prefix else state


def _tensors(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in tree.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{key}.")


def _prefix(path: Path, tensors: Collection[str], names: Collection[str]) -> str:
    """Before most of the model's names; none where they stand for themselves, or are a converter's to translate."""
    found: Counter[str] = Counter()
    for key in tensors:
        starts = [0, *(place + 1 for place, letter in enumerate(key) if letter == ".")]
        found.update(key[:start] for start in starts if key[start:] in names)
    most = max(found.values(), default=0)
    best = [prefix for prefix, count in found.items() if count == most]
    if 2 * most <= len(names) or "" in best:
        return ""
    best = next((own for start in _AVERAGED if (own := [p for p in best if p.startswith(start)])), best)
    if len(best) > 1:
        raise WeightsError(f"{path} holds several networks ({', '.join(best)}): write one of them to a file.")
    return best[0]


def first_line(error: Exception) -> str:
    """The beginning of an error's message in one line; the error's kind where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__
