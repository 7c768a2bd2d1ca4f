"""Parts of a delta file for another model: its delta, from which training may start, or its head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from vpt.errors import ConfigError, DeltaFileError
from vpt.models.classifier import AdaptedModel, TunedModel
from vpt.models.delta_file import check_fingerprint, check_tensors, fill
from vpt.models.delta_format import DENSE, FORMAT, read_delta


def start_from(path: str | Path, model: AdaptedModel) -> None:
    """Copies what a delta file holds into a model of the same deltas, and leaves the model's own head as it is.

    Prompts behind a projection and prefixes from a network start from their own files too: the file holds what these
    give, of which `DeltaPart.unfolded` finds the parameters.

    Args:
        path: A delta file, of any task.
        model: On the same backbone, with the same deltas.

    Raises:
        DeltaFileError: The file is not a delta file, belongs to another backbone or other deltas, or holds nothing but
            a head.
    """
    header, tensors = read_delta(path, (FORMAT, DENSE))
    check_fingerprint(str(path), header["backbone"], model.backbone)
    taken = {key: tensor for key, tensor in tensors.items() if not key.startswith("head.")}
    if not taken:
        raise DeltaFileError(f"{path} holds nothing but a head, which init_delta leaves behind: give a delta's file.")
    own, tuned = model.folded()[0], model.backbone.tuned
    if header["specs"] != own:
        raise DeltaFileError(f"{path} holds the deltas {header['specs']}, but {own} are to be trained: give the same.")
    if header["backbone_tuned"] != tuned:
        ours, theirs = ("the whole backbone", "a frozen one") if tuned else ("a frozen backbone", "a tuned one")
        raise DeltaFileError(f"{path} is of {theirs}, but {ours} is to be trained on: give a file of the same kind.")
    if model.delta is not None:
        kept = {f"delta.{key}": tensor for key, tensor in model.delta.folded()[1].items()}
        given = {key: tensor for key, tensor in taken.items() if key.startswith("delta.")}
        check_tensors(str(path), kept, given)
        try:
            found = model.delta.unfolded({key.removeprefix("delta."): tensor for key, tensor in given.items()})
        except ConfigError as error:
            raise DeltaFileError(f"{path} cannot be where this delta starts: {error}") from error
        taken = {key: t for key, t in taken.items() if key not in given} | {f"delta.{k}": t for k, t in found.items()}
    heads = {f"head.{key}": tensor for key, tensor in model.head.state_dict().items()}
    fill(model, taken | heads, str(path))


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
    check_tensors(str(path), {f"head.{key}": tensor for key, tensor in model.head.state_dict().items()}, tensors)
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
