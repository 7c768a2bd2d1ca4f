"""Where backbone weights come from: the timm hub, a local file, a package that ships them, or nowhere (random)."""

from __future__ import annotations

import hashlib
import re
import warnings
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models import get_deprecated_models, load_state_dict
from torch import nn

from vpt.backbones.bundled import default_cfgs as SHIPPED  # importing it registers it with timm
from vpt.errors import UnknownNameError, UnsupportedBackboneError, VPTWarning, WeightsError

_MISFITS = {
    r"size mismatch for (\S+): .*?\[([\d, ]*)\].*?\[([\d, ]*)\]": "{} has shape ({}) in the file and ({}) in the model",
    r"Missing key\(s\) in state_dict: \"(\S+)\"": "the file lacks {} and perhaps others",
    r"Unexpected key\(s\) in state_dict: \"(\S+)\"": "the model has no {}, which is in the file",
}
"""From what PyTorch writes about a state dict, which names every tensor, to a sentence about the first one."""

# Old names that gave the original ImageNet-21k weights until timm 0.4.12 and give AugReg's since.
_MEANT_ORIGINAL = ("vit_base_patch16_224", "vit_base_patch32_224", "vit_large_patch16_224")


def check_name(name: str) -> None:
    """Checks that timm knows a backbone.

    Args:
        name: `architecture` or `architecture.tag`, as in timm.

    Raises:
        UnknownNameError: It does not exist; the nearest name is suggested.
    """
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise UnknownNameError("backbone", name, timm.list_models())
    if tag and name not in timm.list_models(f"{architecture}.*", pretrained=True):
        raise UnknownNameError("backbone", name, timm.list_models(f"{architecture}.*", pretrained=True))


def current_name(name: str, warn: bool = False) -> str:
    """Follows timm's renamings.

    Args:
        name: `architecture` or `architecture.tag`, perhaps an old one such as ``vit_base_patch16_224_in21k``.
        warn: Say what an old name stands for today.

    Returns:
        Today's name.
    """
    current = get_deprecated_models().get(name)
    if current is None:
        return name
    if warn:
        today = f"{name} is an old name, for which timm gives {current} today"
        architecture = name.removesuffix("_in21k")
        meant = architecture in _MEANT_ORIGINAL and name != architecture
        advice = f"the papers on visual prompts used {architecture}.orig_in21k" if meant else "write that name"
        warnings.warn(f"{today}: {advice}.", VPTWarning, stacklevel=3)
    return str(current)


def config(name: str) -> dict[str, Any]:
    """Reads timm's record of a backbone's weights: input size, mean, standard deviation and so on.

    Args:
        name: `architecture` or `architecture.tag`.

    Returns:
        The record as a dict.

    Raises:
        UnknownNameError: timm does not know the name.
    """
    check_name(name)
    record = timm.get_pretrained_cfg(current_name(name))
    return cast("dict[str, Any]", record.to_dict())


def build(name: str, weights: str, image_size: int | None) -> tuple[nn.Module, str]:
    """Builds a timm model without classifier and fills it.

    Args:
        name: `architecture` or `architecture.tag`, as in timm.
        weights: ``"pretrained"``, ``"random"`` or a path to a local file.
        image_size: Pixels; None for the weights' own. Position embeddings are resampled by timm.

    Returns:
        The model and the weights' id: ``timm/<name>``, ``vpt/<name>``, ``file:<file name>`` or ``random``.

    Raises:
        UnknownNameError: timm does not know the name.
        UnsupportedBackboneError: The architecture cannot take this image size.
        WeightsError: The weights cannot be found, fetched or loaded.
    """
    check_name(name)
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    if weights == "random":
        return _create(name, options | {"num_classes": 0}), "random"
    if weights == "pretrained":
        return _from_timm(name, options)
    return _from_file(name, Path(weights).expanduser(), options), f"file:{Path(weights).name}"


def fingerprint(model: nn.Module) -> str:
    """Hashes everything that determines a model's function: names, shapes and values of its parameters and buffers.

    Args:
        model: Any module.

    Returns:
        A SHA-256 as 64 hexadecimal digits. The device does not enter; the precision does.
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _create(name: str, options: dict[str, Any], pretrained: bool = False) -> nn.Module:
    try:
        return cast("nn.Module", timm.create_model(name, pretrained=pretrained, **options))
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        raise UnsupportedBackboneError(
            f"{name} has no fixed image size to set: leave image_size out, or choose a ViT or Swin."
        ) from error


def _from_timm(name: str, options: dict[str, Any]) -> tuple[nn.Module, str]:
    record = timm.get_pretrained_cfg(name)
    if not record.has_weights:
        raise WeightsError(f"timm has no weights for {name!r}: give a local file, or weights='random'.")
    architecture = name.partition(".")[0]
    full_name = f"{architecture}.{record.tag}" if record.tag else architecture
    try:
        model = _create(name, options, pretrained=True)
    except (UnsupportedBackboneError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "state_dict" in str(error):
            raise WeightsError(f"The weights of {full_name} do not fit it: {_misfit(error)}.") from error
        if isinstance(error, UnsupportedBackboneError):
            raise
        raise _unreachable(full_name, error) from error
    except Exception as error:  # the hub client raises what its HTTP library does, of whatever class
        raise _unreachable(full_name, error) from error
    cast("Any", model).reset_classifier(0)
    return model, ("vpt/" if architecture in SHIPPED else "timm/") + full_name


def _unreachable(name: str, error: Exception) -> WeightsError:
    return WeightsError(
        f"The hub could not be reached for the weights of {name} ({type(error).__name__}): name a local file "
        f"(weights=FILE, --model.weights FILE) or use the backbone that ships with vpt, vit_nano_patch8_64."
    )


def _from_file(name: str, path: Path, options: dict[str, Any]) -> nn.Module:
    """Loads strictly: only a classifier may be missing from the file, since none is kept."""
    state, classifier = _read(path, ", 'pretrained' or 'random'"), f"{_classifier(name)}.weight"
    num_classes = state[classifier].shape[0] if classifier in state else 0
    overlay = {"file": str(path), "num_classes": num_classes, "custom_load": False}
    try:
        model = _create(name, options | {"num_classes": num_classes, "pretrained_cfg_overlay": overlay}, True)
    except (RuntimeError, KeyError) as error:
        raise WeightsError(f"The weights in {path} do not fit {name}: {_misfit(error)}.") from error
    cast("Any", model).reset_classifier(0)
    return model


def _read(path: Path, instead: str) -> dict[str, torch.Tensor]:
    """A file's tensors by name; `instead` ends the sentence about a file that is not there."""
    if not path.is_file():
        raise WeightsError(f"No weights file {path}: give an existing file{instead}.")
    try:
        return cast("dict[str, torch.Tensor]", load_state_dict(str(path), weights_only=True))
    except Exception as error:  # whatever the bytes provoke, the file is not one of weights
        raise WeightsError(f"{path} is not a readable weights file: {_first_line(error)}") from error


def _misfit(error: Exception) -> str:
    for pattern, sentence in _MISFITS.items():
        if found := re.search(pattern, str(error)):
            return sentence.format(*found.groups())
    return _first_line(error)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__


def pretrained_head(name: str, weights: str = "pretrained") -> nn.Linear:
    """Reads the classifier that belongs to a backbone's weights and that `create_backbone` leaves out.

    Args:
        name: timm's `architecture` or `architecture.tag`.
        weights: ``"pretrained"`` or a path to a local file, as for `create_backbone`.

    Returns:
        A frozen layer from pooled features to logits, (classes, features).

    Raises:
        UnknownNameError: timm does not know the name.
        WeightsError: The weights cannot be found or read, or have no linear classifier.
    """
    check_name(name)
    if weights == "random":
        raise WeightsError("Random weights have no pretrained classifier: give 'pretrained' or a file.")
    key = _classifier(name)
    if weights == "pretrained":
        weight, bias = _head_from_hub(name)
    else:
        state = _read(Path(weights).expanduser(), " or 'pretrained'")
        weight, bias = state.get(f"{key}.weight"), state.get(f"{key}.bias")
    if weight is None or weight.ndim != 2:
        raise WeightsError(f"The weights {weights!r} of {name} have no linear classifier {key!r}: use tuned ones.")
    head = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.zero_() if bias is None else head.bias.copy_(bias)
    return head.requires_grad_(False).eval()


def _classifier(name: str) -> str:
    key = timm.get_pretrained_cfg(name).classifier or "head"
    return key if isinstance(key, str) else str(key[0])


def _head_from_hub(name: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    record = timm.get_pretrained_cfg(name)
    if not record.has_weights or not record.num_classes:
        return None, None
    try:
        layer: Any = timm.create_model(name, pretrained=True).get_classifier()
    except Exception as error:  # the hub client raises what its HTTP library does, of whatever class
        raise WeightsError(f"The hub could not be reached for {name} ({type(error).__name__}): name a file.") from error
    return getattr(layer, "weight", None), getattr(layer, "bias", None)
