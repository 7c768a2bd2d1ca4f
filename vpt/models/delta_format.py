"""The form of a delta file: tensors as safetensors, and a JSON header that says whose they are.

Files are read here and nowhere else, and checked whole: they may come from anybody.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vpt.atomic_write import atomic_write
from vpt.backbones.factory import STATISTICS, input_size
from vpt.deltas.registry import read_specs
from vpt.errors import DeltaFileError, VPTError
from vpt.models.classifier import TunedModel
from vpt.models.provenance import IDENTITY
from vpt.models.segmenter import HEADS, DenseModel

FORMAT, DENSE = TunedModel.format, DenseModel.format
LARGEST_IMAGE = 8192
"""Height and width in pixels above which a file is taken for damaged, rather than memory for its positions."""

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
"""The precisions of a model by the name that a header has for them."""

_DEEPEST = 32  # levels of lists and dicts within a header
_HOLDS = {FORMAT: "a classifier", DENSE: "a segmentation model"}
_DICTS_IN_INFO = ("data", "metrics", "hyperparameters", "read", "versions", "parameters", "backbone", "soup")
_HEADER = {
    "backbone": dict,
    "backbone_tuned": bool,
    "dtype": str,
    "specs": list,
    "class_names": list,
    "preset": dict,
    "info": dict,
    "tensors": list,
}


def read_header(path: str | Path, formats: Collection[str] = (FORMAT,)) -> dict[str, Any]:
    """Reads what a delta file says about itself, and none of its tensors.

    Args:
        path: A delta file.
        formats: Of which formats: a classifier's, unless said otherwise.

    Returns:
        ``format``, ``backbone`` (name, weights, weights_id, fingerprint, image_size, normalization),
        ``backbone_tuned``, ``dtype``, ``specs`` in their canonical form, ``class_names``, ``preset``, ``info``,
        ``tensors`` (their names), and for a segmentation model ``head``.

    Raises:
        DeltaFileError: The file is missing, not a delta file, contradicts itself, or is of another format.
    """
    with _opened(path, formats) as (header, _):
        return header


def read_delta(path: str | Path, formats: Collection[str] = (FORMAT,)) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads a delta file.

    Args:
        path: A delta file.
        formats: Of which formats: a classifier's, unless said otherwise.

    Returns:
        What the file says about itself, as `read_header` gives it, and its tensors by name.

    Raises:
        DeltaFileError: The file is missing, not a delta file, contradicts itself, or is of another format.
    """
    with _opened(path, formats) as (header, file):
        return header, {key: file.get_tensor(key) for key in header["tensors"]}


def write_delta(path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Writes a delta file from its two halves; the inverse of `read_delta`.

    Args:
        path: Ends in ``.safetensors``; parent folders are made. Written beside and renamed, never half.
        header: As `read_delta` returns it; a number in it that is not finite is written as null.
        tensors: What the model owns, by name.

    Returns:
        The path.

    Raises:
        DeltaFileError: The header holds other than plain values.
    """
    path = Path(path)
    kept, places = dict[str, Tensor](), set[int]()
    for key, tensor in tensors.items():
        whole = tensor.detach().cpu().contiguous()
        kept[key] = whole.clone() if whole.data_ptr() in places else whole  # tied ones are written once for each name
        places.add(whole.data_ptr())
    try:
        text = json.dumps(_finite({**header, "tensors": sorted(kept)}), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DeltaFileError(f"A delta file keeps plain JSON values in info and preset: {error}.") from error
    with atomic_write(path) as partial:
        save_file(kept, partial, metadata={"vpt": text})
    return path


def check_readable(path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuses to write what would not be read again.

    Args:
        path: Where to, for the message.
        header: As for `write_delta`.
        tensors: Likewise.

    Raises:
        DeltaFileError: The header holds other than plain values, contradicts itself or the tensors, or a tensor holds
            NaN or infinity.
    """
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise DeltaFileError(f"{key!r} holds NaN or infinity, which no file keeps: the training diverged.")
    try:
        parsed = _parsed(json.dumps(_finite({**header, "tensors": sorted(tensors)}), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise DeltaFileError(f"A delta file keeps plain JSON values in info and preset: {error}.") from error
    _checked(Path(path), parsed, {key: tuple(tensor.shape) for key, tensor in tensors.items()}, _HOLDS)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _opened(path: str | Path, formats: Collection[str]) -> Iterator[tuple[dict[str, Any], Any]]:
    path = Path(path)
    if not path.is_file():
        raise DeltaFileError(f"No delta file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            header = _parsed((file.metadata() or {})["vpt"])
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
            tensors = {key: tuple(each.get_shape()) for key, each in slices.items()}
            yield _checked(path, header, tensors, formats), file
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise DeltaFileError(f"{path} is not a delta file: `vpt fit` writes one as delta.safetensors.") from error


def _parsed(text: str) -> dict[str, Any]:
    """A header's JSON: an object that says each thing once, in finite numbers and text that can be written again."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name is there twice")
        return found

    def number(digits: str) -> float:
        return float(digits) if math.isfinite(float(digits)) else never(digits)

    def never(word: str) -> NoReturn:
        raise ValueError(f"{word} is no number of JSON")

    header = json.loads(text, object_pairs_hook=once, parse_float=number, parse_constant=never)
    level = [header]
    for _ in range(_DEEPEST):
        lists = [list(each.values()) if isinstance(each, dict) else each for each in level]
        level = [entry for each in lists if isinstance(each, list) for entry in each]
    if level:
        raise ValueError("it is nested too deeply")
    json.dumps(header, ensure_ascii=False).encode()
    return dict(header)


def _checked(
    path: Path, header: dict[str, Any], tensors: Mapping[str, tuple[int, ...]], formats: Collection[str]
) -> dict[str, Any]:
    """The header with canonical specs, and with what files of version 0.1.0 leave out."""
    if (found := str(header.get("format"))) not in formats:
        if found in _HOLDS:
            wanted = " or ".join(_HOLDS[each] for each in formats)
            raise DeltaFileError(f"{path} holds {_HOLDS[found]}, and {wanted} is needed here: `vpt.load` loads either.")
        raise DeltaFileError(f"{path} has format {found!r:.80}; this version reads {', '.join(map(repr, formats))}.")
    tuned = any(key.startswith("backbone.") for key in tensors)
    defaults: dict[str, Any] = {"backbone_tuned": tuned, "dtype": "float32"}
    header = defaults | header
    if lacking := _lacking(header):
        raise DeltaFileError(f"{path} is incomplete: its header has no valid {', '.join(lacking)}.")
    if absent := sorted(set(header["tensors"]) - tensors.keys()):
        raise DeltaFileError(f"{path} is incomplete: {', '.join(absent)} missing.")
    rooms = ("delta.", "head.", "backbone.") if header["backbone_tuned"] else ("delta.", "head.")
    for key in tensors:
        if key not in header["tensors"] or not key.startswith(rooms):
            raise DeltaFileError(f"{path} holds {key!r:.200}, which its header does not tell of.")
    heads = [shape for key, shape in tensors.items() if key.startswith("head.")]
    classes = len(header["class_names"])
    if not heads or not any(shape[:1] == (classes,) for shape in heads):
        raise DeltaFileError(f"{path} has {classes} class names, but its head is not one of {classes} classes.")
    try:
        input_size(header["backbone"]["name"])  # which must be a name that timm knows
        return header | {"specs": [spec.plain() for spec in read_specs(header["specs"])]}
    except VPTError as error:
        raise DeltaFileError(f"{path} cannot be read here: {error}") from error


def _lacking(header: Mapping[str, Any]) -> list[str]:
    """What a header has not, or has of another type or out of range."""
    if absent := [key for key, kind in _HEADER.items() if not isinstance(header.get(key), kind)]:
        return absent
    backbone, head = header["backbone"], header.get("head", {})
    absent = [f"backbone {key}" for key, kind in IDENTITY.items() if not isinstance(backbone.get(key), kind)]
    if absent:
        return absent
    size = backbone["image_size"]
    dense = isinstance(head, dict) and head.get("kind") in HEADS and type(head.get("width")) is int and len(head) == 2
    valid = {
        "backbone image_size": not isinstance(size, bool) and 1 <= size <= LARGEST_IMAGE,
        "backbone pool": isinstance(backbone.get("pool"), str | None),
        "backbone normalization": backbone["normalization"] in ("weights", *STATISTICS),
        "dtype": header["dtype"] in DTYPES,
        "specs": all(isinstance(spec, dict) for spec in header["specs"]),
        "class_names": bool(header["class_names"]) and all(isinstance(name, str) for name in header["class_names"]),
        "tensors": all(isinstance(name, str) for name in header["tensors"]),
        "head": dense or header["format"] != DENSE,
    } | {f"info {key}": isinstance(header["info"].get(key), dict | None) for key in _DICTS_IN_INFO}
    return [key for key, fine in valid.items() if not fine]
