"""Delta files: everything that training changed, complete, in one safetensors file that refuses the wrong backbone."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vpt.atomic_write import atomic_write
from vpt.backbones.factory import Backbone, create_backbone
from vpt.errors import ConfigError, DeltaFileError
from vpt.models.classifier import AdaptedModel, TunedModel
from vpt.models.provenance import IDENTITY, identity
from vpt.models.segmenter import DenseModel

Model = TypeVar("Model", bound=AdaptedModel)
FORMAT, DENSE = TunedModel.format, DenseModel.format
_HOLDS = {
    FORMAT: "a classifier: load it with `vpt.load`",
    DENSE: "a segmentation model: load it with `vpt.load_segmentation`",
}
_HEADER = {"backbone": dict, "specs": list, "class_names": list, "preset": dict, "info": dict, "tensors": list}


def save_delta(path: str | Path, model: AdaptedModel) -> Path:
    """Writes trained tensors, head, class names, preprocessing and the backbone's identity.

    Args:
        path: Ends in ``.safetensors``; parent folders are made. Written beside and renamed, never half.
        model: A trained model.

    Returns:
        The path.
    """
    own = set() if model.delta is None else {id(part) for part in model.delta.parts}
    if any(id(part) not in own for part in model.backbone.attached):
        raise DeltaFileError(
            "The backbone carries a delta that is not this model's, and a file of this one would miss it: build the "
            "model with both deltas in one list."
        )
    specs, kept = model.folded()
    header = {
        "format": model.format,
        "backbone": identity(model),
        "specs": specs,
        "class_names": model.class_names,
        "preset": model.preset,
        "info": model.info,
        **model.file_header(),
    }
    return write_delta(path, header, kept)


def write_delta(path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Writes a delta file from its two halves; the inverse of `read_delta`.

    Args:
        path: Ends in ``.safetensors``; parent folders are made. Written beside and renamed, never half.
        header: As `read_delta` returns it.
        tensors: The trained tensors by name.

    Returns:
        The path.
    """
    path = Path(path)
    kept = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with atomic_write(path) as partial:
        save_file(kept, partial, metadata={"vpt": json.dumps({**header, "tensors": sorted(kept)}, sort_keys=True)})
    return path


def read_delta(path: str | Path, formats: Collection[str] = (FORMAT,)) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads a delta file.

    Args:
        path: A delta file.
        formats: Of which formats: a classifier's, unless said otherwise.

    Returns:
        What the file says about itself, and its tensors by name. The former are ``format``, ``backbone`` (name,
        weights, weights_id, fingerprint, image_size, normalization), ``specs``, ``class_names``, ``preset``, ``info``,
        and for a segmentation model ``head``.

    Raises:
        DeltaFileError: The file is missing, not safetensors, not a delta file, incomplete, or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise DeltaFileError(f"No delta file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
        header: dict[str, Any] = dict(json.loads(metadata["vpt"]))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise DeltaFileError(f"{path} is not a delta file: `vpt fit` writes one as delta.safetensors.") from error
    if (found := str(header.get("format"))) not in formats:
        if found in _HOLDS:
            raise DeltaFileError(f"{path} holds {_HOLDS[found]}.")
        raise DeltaFileError(f"{path} has format {found!r}; this version reads {', '.join(map(repr, formats))}.")
    if lacking := _lacking(header):
        raise DeltaFileError(f"{path} is incomplete: its header has no valid {', '.join(lacking)}.")
    if absent := sorted(set(header["tensors"]) - tensors.keys()):
        raise DeltaFileError(f"{path} is incomplete: {', '.join(absent)} missing.")
    return header, tensors


def _lacking(header: Mapping[str, Any]) -> list[str]:
    """What a header has not, or has of another type: the file may come from anybody."""
    if absent := [key for key, kind in _HEADER.items() if not isinstance(header.get(key), kind)]:
        return absent
    backbone = header["backbone"]
    absent = [f"backbone {key}" for key, kind in IDENTITY.items() if not isinstance(backbone.get(key), kind)]
    return absent if all(isinstance(spec, dict) for spec in header["specs"]) else [*absent, "specs"]


def load_classifier(path: str | Path, weights: str | None = None) -> TunedModel:
    """Rebuilds a classifier from a delta file.

    Args:
        path: A delta file.
        weights: Where the backbone's weights are on this machine; None for where they were at training time.

    Returns:
        The model in eval mode, all parameters frozen.

    Raises:
        DeltaFileError: The file is not a classifier's, is incomplete, or belongs to other backbone weights.
        WeightsError: The backbone's weights cannot be found.
    """
    model, tensors = unfilled(path, weights)
    fill(model, tensors, str(path))
    return model


def load_segmentation(path: str | Path, weights: str | None = None) -> DenseModel:
    """Rebuilds a segmentation model from a delta file.

    Args:
        path: A delta file of a `SegmentationTask`.
        weights: Where the backbone's weights are on this machine; None for where they were at training time.

    Returns:
        The model in eval mode, all parameters frozen.

    Raises:
        DeltaFileError: The file is not one of a segmentation model, is incomplete, or belongs to other backbone
            weights.
        WeightsError: The backbone's weights cannot be found.
    """
    model, tensors = _unfilled(path, weights, DenseModel)
    fill(model, tensors, str(path))
    return model


def unfilled(path: str | Path, weights: str | None = None) -> tuple[TunedModel, dict[str, Tensor]]:
    """Rebuilds a classifier from a delta file up to its trained tensors, which `fill` puts in.

    Args:
        path: A delta file.
        weights: Where the backbone's weights are on this machine; None for where they were at training time.

    Returns:
        The model on the pretrained backbone, its head drawn at random, in eval mode, all parameters frozen; and the
        trained tensors by name.

    Raises:
        DeltaFileError: The file is not a classifier's, is incomplete, or belongs to other backbone weights.
        WeightsError: The backbone's weights cannot be found.
    """
    return _unfilled(path, weights, TunedModel)


def _unfilled(path: str | Path, weights: str | None, kind: type[Model]) -> tuple[Model, dict[str, Tensor]]:
    header, tensors = read_delta(path, (kind.format,))
    if kind is DenseModel and "head" not in header:
        raise DeltaFileError(f"{path} is incomplete: its header has no head.")
    backbone, names = recorded_backbone(str(path), header["backbone"], weights), header["class_names"]
    model = kind(backbone, len(names), header["specs"], names, header["preset"], **header.get("head", {}))
    model.info = header["info"]
    return model.requires_grad_(False).eval(), tensors


def recorded_backbone(what: str, recorded: Mapping[str, Any], weights: str | None = None) -> Backbone:
    """Builds the backbone that trained tensors belong to.

    Args:
        what: The file, for the message.
        recorded: The identity of the backbone, as the file has it.
        weights: Where the weights are on this machine; None for where they were at training time.

    Returns:
        The backbone.

    Raises:
        DeltaFileError: The weights are others.
        WeightsError: The weights cannot be found.
    """
    place, size, pool = weights or recorded["weights"], recorded["image_size"], recorded.get("pool")
    backbone = create_backbone(recorded["name"], place, size, recorded["normalization"], pool)
    check_fingerprint(what, recorded, backbone)
    return backbone


def check_fingerprint(what: str, recorded: Mapping[str, Any], backbone: Backbone) -> None:
    """Refuses trained tensors on another backbone than they were trained on.

    Args:
        what: The file, for the message.
        recorded: Its backbone's identity.
        backbone: The backbone at hand.

    Raises:
        DeltaFileError: Weights, architecture or pool differ.
    """
    if not backbone.is_recorded_as(recorded):
        raise DeltaFileError(
            f"{what} was trained on {recorded['weights_id']} (fingerprint {recorded['fingerprint'][:12]}), but the "
            f"weights given are {backbone.weights_id} (fingerprint {backbone.fingerprint[:12]}): give the weights it "
            "was trained on."
        )


def fill(model: AdaptedModel, tensors: Mapping[str, Tensor], what: str) -> None:
    """Copies trained tensors into a model, by name and shape.

    Args:
        model: The model to fill.
        tensors: Delta and head at least; or the whole model after full fine-tuning.
        what: Where the tensors come from, for the message.

    Raises:
        DeltaFileError: A tensor is missing, unknown, or of another shape; the model is then unchanged.
    """
    state = model.state_dict()
    needed = {key for key in state if key.startswith(("delta.", "head."))}
    if missing := sorted(needed - tensors.keys()):
        raise DeltaFileError(f"{what} is incomplete: {', '.join(missing)} missing.")
    for key, tensor in tensors.items():
        if key not in state:
            raise DeltaFileError(f"{what} holds {key!r}, which this model does not have.")
        if state[key].shape != tensor.shape:
            raise DeltaFileError(f"{what} holds {key!r} of {tuple(tensor.shape)}, expected {tuple(state[key].shape)}.")
    with torch.no_grad():
        for key, tensor in tensors.items():
            state[key].copy_(tensor)


def start_from(path: str | Path, model: AdaptedModel) -> None:
    """Copies what a delta file holds into a model of the same deltas, and leaves the model's own head as it is.

    Args:
        path: A delta file, of any task.
        model: On the same backbone, with the same deltas.

    Raises:
        DeltaFileError: The file is not a delta file, or belongs to another backbone or other deltas.
    """
    header, tensors = read_delta(path, (FORMAT, DENSE))
    check_fingerprint(str(path), header["backbone"], model.backbone)
    own = [] if model.delta is None else model.delta.specs
    if header["specs"] != own:
        raise DeltaFileError(f"{path} holds the deltas {header['specs']}, but {own} are to be trained: give the same.")
    heads = {f"head.{key}": tensor for key, tensor in model.head.state_dict().items()}
    fill(model, {key: t for key, t in tensors.items() if not key.startswith("head.")} | heads, str(path))


def read_head(path: str | Path, model: TunedModel, role: str) -> nn.Linear:
    """Reads a head that belongs to the bare backbone of a model.

    Args:
        path: A delta file that holds a head only, e.g. a linear probe's.
        model: The model, on the same backbone and classes.
        role: What the head is for, e.g. ``"anchor"``; the messages begin with it.

    Returns:
        The (classes, features) head, on the CPU.

    Raises:
        DeltaFileError: The file is not a delta file.
        ConfigError: It holds more than a head, or was made for another backbone, preprocessing or other classes.
    """
    header, tensors = read_delta(path)
    if set(tensors) != {"head.weight", "head.bias"}:
        raise ConfigError(f"The {role} {path} is not a linear probe: it holds more than a head.")
    backbone = model.backbone
    for what, theirs, ours in (
        ("backbone weights", True, backbone.is_recorded_as(header["backbone"])),
        ("image size", header["backbone"]["image_size"], backbone.image_size),
        ("normalization", header["backbone"]["normalization"], backbone.normalization),
        ("preset", header["preset"], model.preset),
        ("classes", header["class_names"], model.class_names),
    ):
        if theirs != ours:
            raise ConfigError(
                f"The {role} {path} was trained with other {what} than the delta: train the linear probe on the same "
                "task and backbone."
            )
    return linear_head(tensors).requires_grad_(False)


def linear_head(tensors: Mapping[str, Tensor]) -> nn.Linear:
    """The linear head of a classifier.

    Args:
        tensors: Of its delta file, by name.

    Returns:
        The (classes, features) head, on the CPU.
    """
    weight = tensors["head.weight"]
    head = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    head.load_state_dict({"weight": weight, "bias": tensors["head.bias"]})
    return head
