"""Where backbone weights come from: the timm hub, a local file, a package that ships them, or nowhere (random).

Nothing is unpickled from a local file, and wrappers of a training are stripped.
"""

from __future__ import annotations

import hashlib
import re
import socket
import urllib.error
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import timm
import torch
from huggingface_hub import constants, get_session, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from timm.layers import SelectAdaptivePool2d
from timm.models import get_deprecated_models
from torch import Tensor, nn

from vpt.argument_types import checked
from vpt.backbones.bundled import default_cfgs as SHIPPED  # importing it registers it with timm
from vpt.backbones.weight_files import first_line, read_weights
from vpt.errors import ConfigError, UnknownNameError, UnsupportedBackboneError, VPTWarning, WeightsError
from vpt.image_size import ImageSize, sides, size_text

_MISFITS = {
    r"size mismatch for (\S+): .*?\[([\d, ]*)\].*?\[([\d, ]*)\]": "{} has shape ({}) in the file and ({}) in the model",
    r"Missing key\(s\) in state_dict: \"(\S+)\"": "the file lacks {} and perhaps others",
    r"Unexpected key\(s\) in state_dict: \"(\S+)\"": "the model has no {}, which is in the file",
}
"""From what PyTorch writes about a state dict, which names every tensor, to a sentence about the first one."""

# The hub's client raises what its HTTP library does, which is the other base of its own error and differs by version.
_NETWORK: tuple[type[Exception], ...] = (
    *(base for base in HfHubHTTPError.__mro__[1:] if issubclass(base, Exception) and base not in (Exception, OSError)),
    HfHubHTTPError,
    LocalEntryNotFoundError,
    ConnectionError,
    TimeoutError,
    socket.gaierror,
    urllib.error.URLError,
)

PATIENCE = 5.0
"""Seconds that the hub may take to answer at all."""

# Old names that gave the original ImageNet-21k weights until timm 0.4.12 and give AugReg's since.
_MEANT_ORIGINAL = ("vit_base_patch16_224", "vit_base_patch32_224", "vit_large_patch16_224")


def check_name(name: str) -> None:
    """Checks that timm knows `architecture` or `architecture.tag`; an UnknownNameError suggests the nearest."""
    architecture, dot, _ = name.partition(".")
    if not timm.is_model(architecture):
        raise UnknownNameError("backbone", name, timm.list_models())
    if dot and name not in timm.list_models(f"{architecture}.*", pretrained=True):
        raise UnknownNameError("backbone", name, timm.list_models(f"{architecture}.*", pretrained=True))


def current_name(name: str, warn: bool = False) -> str:
    """Gives today's name for an old one of timm's, e.g. ``vit_base_patch16_224_in21k``; with `warn` it says so."""
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
    """Reads timm's record of a backbone's weights: input size, mean, ...; an UnknownNameError if it has none."""
    check_name(name)
    record = timm.get_pretrained_cfg(current_name(name))
    return cast("dict[str, Any]", record.to_dict())


def random_seed(weights: str) -> int | None:
    """The seed that random weights are drawn with: 0 for ``random``, N for ``random:N``, None for weights that are not.

    A WeightsError where N is not a whole number from 0 on.
    """
    kind, colon, seed = weights.partition(":")
    if kind != "random":
        return None
    if colon and not (seed.isascii() and seed.isdecimal() and int(seed) < 2**63):
        raise WeightsError(
            f"Random weights are 'random', or 'random:N' with a whole number N as seed, got {weights!r}."
        )
    return int(seed or 0)


def build(
    name: str, weights: str, image_size: ImageSize | None, pool: str | None = None, channels: int = 3
) -> tuple[nn.Module, str, str | None]:
    """Builds a timm model without classifier and fills it; arguments and errors as of `create_backbone`.

    PyTorch's global random numbers are left where they were. Returns the model; the weights' id: ``timm/<name>``,
    ``vpt/<name>``, ``file:<file name>``, ``random`` or ``random:N``; and the pool, None if it is the weights' own.
    """
    check_name(name)
    if pool is not None and (not isinstance(pool, str) or not pool):
        raise ConfigError(f"pool is timm's name of a pool such as 'token' or 'avg', or None, got {pool!r}.")
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    options |= {} if channels == 3 else {"in_chans": channels}
    seed = random_seed(weights)
    with torch.random.fork_rng(devices=[]):
        _outline(name, image_size, pool, channels)
        if seed is None:
            _warn_of_another_function(name)
            model, weights_id = _filled(name, weights, options)
        else:
            torch.default_generator.manual_seed(seed)
            model, weights_id = _create(name, options | {"num_classes": 0}), weights
        if image_size is not None:
            _check_patches(model, name, image_size, channels)
        return model, weights_id, _without_classifier(model, name, pool)


def _warn_of_another_function(name: str) -> None:
    """Says so where timm notes that weights were trained with another activation than the architecture computes."""
    for note in timm.get_pretrained_cfg(name).notes or ():
        architecture, _, tag = name.partition(".")
        if "natively" in note and "quickgelu" not in architecture:
            meant = architecture.replace("_clip_", "_clip_quickgelu_")
            advice = f"take {meant}.{tag}" if timm.is_model(meant) else note
            warnings.warn(f"The weights of {name} are natively of another activation: {advice}.", VPTWarning, 4)


def _filled(name: str, weights: str, options: dict[str, Any]) -> tuple[nn.Module, str]:
    """With the classifier that belongs to the weights, if there is one."""
    model, weights_id = _from_timm(name, options) if weights == "pretrained" else _from_file(name, weights, options)
    for key, tensor in model.state_dict().items():
        if not bool(tensor.isfinite().all()):
            where = weights_id if weights == "pretrained" else weights
            raise WeightsError(f"The weights {where} hold NaN or infinity in {key}: take them from their source again.")
    return model, weights_id


def _without_classifier(model: Any, name: str, pool: str | None) -> str | None:
    """Takes the classifier off and sets the pool; gives the pool, or None if it is the model's own."""
    modules = [module.pool_type for module in model.modules() if isinstance(module, SelectAdaptivePool2d)]
    own = modules[-1] if modules else getattr(model, "global_pool", None)
    if pool is None or pool == own:
        model.reset_classifier(0)
        return None
    try:
        model.reset_classifier(0, global_pool=pool)
    except Exception as error:  # timm asserts, indexes or converts, as the class has it
        raise UnsupportedBackboneError(
            f"{name} cannot pool by {pool!r} ({first_line(error)}): leave pool out for its own, {own!r}."
        ) from error
    return pool


def _check_patches(model: nn.Module, name: str, size: ImageSize, channels: int) -> None:
    embed = getattr(model, "patch_embed", None)
    proj = getattr(embed, "proj", None)
    # A projection with padding reads every pixel, and so does one that timm pads the image for.
    if not isinstance(proj, nn.Conv2d) or proj.padding != (0, 0) or getattr(embed, "dynamic_img_pad", False):
        return
    if proj.in_channels != channels:  # it projects the map of a convolutional stem
        return
    for side, patch in zip(sides(size), proj.stride, strict=True):
        if left := side % patch:
            nearest = " or ".join(str(whole) for whole in (side - left, side - left + patch) if whole)
            of = "" if isinstance(size, int) else f" for {side}"
            raise ConfigError(
                f"image_size {size_text(size)} is no whole number of {name}'s patches of {patch} pixels: it would not "
                f"see the last {left} of each row and column. Take {nearest}{of}."
            )


@lru_cache(maxsize=256)
def _outline(name: str, image_size: ImageSize | None, pool: str | None, channels: int = 3) -> frozenset[str]:
    """Names of the tensors of a model that gives a vector for each image, found by passing shapes alone."""
    if pool is not None:  # what does not fit without it is not its fault
        _outline(name, image_size, None, channels)
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    options |= {} if channels == 3 else {"in_chans": channels}
    rows, columns = sides(image_size) if image_size else config(name)["input_size"][1:]
    with torch.device("meta"), torch.no_grad():
        model: Any = _create(name, options | {"num_classes": 0}).eval()
        try:
            _without_classifier(model, name, pool)
            features = model.forward_head(
                model.forward_features(torch.zeros(1, channels, rows, columns)), pre_logits=True
            )
            fits = tuple(features.shape) == (1, width(model))
            reason = f"its features have shape {tuple(features.shape)}"
        except UnsupportedBackboneError:
            raise
        except Exception as error:  # any operation may be the one that does not fit
            fits, reason = False, first_line(error)
    if fits:
        return frozenset(model.state_dict())
    if pool is not None:
        raise UnsupportedBackboneError(f"{name} cannot pool by {pool!r} ({reason}): leave pool out for its own.")
    if image_size is not None:
        raise ConfigError(_impossible(name, image_size, reason))
    raise UnsupportedBackboneError(f"{name} does not encode an image to one vector ({reason}): choose another model.")


def width(model: nn.Module) -> int:
    """The number of pooled features, also where a network widens once more behind the pool."""
    return int(getattr(model, "head_hidden_size", cast("Any", model).num_features))


def _impossible(name: str, image_size: ImageSize, reason: str) -> str:
    size = size_text(image_size)
    return f"{name} cannot take images of {size} pixels ({reason}): leave image_size out, or give another."


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers: names, shapes, values and precision, not the device."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def function_fingerprint(weights: str, name: str, pool: str | None, narrow: bool) -> str:
    """Hashes what makes a function: weights (their hash), name and pool; equal tensors may compute others."""
    record = config(name)
    parts = (weights, architecture_of(name), *record["mean"], *record["std"], pool or "", *["bfloat16"] * narrow)
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()


def architecture_of(name: str) -> str:
    """A name without the tag of its weights."""
    return current_name(name).partition(".")[0]


def _create(name: str, options: dict[str, Any]) -> nn.Module:
    """Builds a model that is not filled."""
    try:
        return cast("nn.Module", timm.create_model(name, **options))
    except Exception as error:  # timm asserts, divides and indexes while it builds
        if "img_size" not in options:
            raise UnsupportedBackboneError(f"timm cannot build {name}: {first_line(error)}") from error
        if isinstance(error, TypeError) and "img_size" in str(error):
            raise UnsupportedBackboneError(
                f"{name} has no fixed image size to set: leave image_size out, or choose a ViT or Swin."
            ) from error
        raise ConfigError(_impossible(name, options["img_size"], first_line(error))) from error


@contextmanager
def one_try(endpoint: str | None = None) -> Iterator[None]:
    """Asks the hub once whether it answers; where it does not, its client reads only what it has kept.

    By itself the client would ask for a minute before it says so. The endpoint is a URL, None for the usual one.
    """
    online = not constants.HF_HUB_OFFLINE
    if online:
        try:
            get_session().head(endpoint or constants.ENDPOINT, timeout=PATIENCE)
        except Exception:  # whatever its HTTP library raises
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = not online


def at_hand(name: str, weights: str) -> bool:
    """Whether weights, as `create_backbone` takes them, lie on this machine; those of the hub are looked for alone."""
    if random_seed(weights) is not None or (weights == "pretrained" and name.partition(".")[0] in SHIPPED):
        return True
    if weights != "pretrained":
        return Path(weights).expanduser().is_file()
    hub = timm.get_pretrained_cfg(current_name(name)).hf_hub_id or ""
    kept = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    return bool(hub) and any(isinstance(try_to_load_from_cache(hub, file), str) for file in kept)


def _from_timm(name: str, options: dict[str, Any]) -> tuple[nn.Module, str]:
    record = timm.get_pretrained_cfg(name)
    if not record.has_weights:
        raise WeightsError(f"timm has no weights for {name!r}: give a local file, or weights='random'.")
    architecture = name.partition(".")[0]
    full_name = f"{architecture}.{record.tag}" if record.tag else architecture
    try:
        with nullcontext() if architecture in SHIPPED else one_try():
            model = cast("nn.Module", timm.create_model(name, pretrained=True, **options))
    except _NETWORK as error:
        raise WeightsError(
            f"The hub could not be reached for the weights of {full_name} ({type(error).__name__}): name a local file "
            f"(weights=FILE, --model.weights FILE) or use the backbone that ships with vpt, vit_nano_patch8_64."
        ) from error
    except Exception as error:
        if "state_dict" in str(error):
            raise WeightsError(f"The weights of {full_name} do not fit it: {_misfit(error)}.") from error
        raise WeightsError(
            f"The weights of {full_name} cannot be loaded ({type(error).__name__}: {first_line(error)}): mend that, "
            "or name a local file (weights=FILE, --model.weights FILE)."
        ) from error
    return model, ("vpt/" if architecture in SHIPPED else "timm/") + full_name


def _from_file(name: str, weights: str, options: dict[str, Any]) -> tuple[nn.Module, str]:
    """Loads strictly: only a classifier may be missing from the file."""
    path = Path(weights).expanduser()
    channels = options.get("in_chans", 3)
    state = read_weights(path, _outline(name, options.get("img_size"), None, channels), ", 'pretrained' or 'random'")
    classifier = state.get(f"{_classifier(name)}.weight")
    num_classes = 0 if classifier is None or classifier.ndim == 0 else len(classifier)
    overlay = {"state_dict": state, "num_classes": num_classes, "custom_load": False}
    try:
        model: Any = timm.create_model(
            name, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay, **options
        )
    except Exception as error:  # of PyTorch's strict loading, or of timm's converters, which take names for granted
        raise WeightsError(f"The weights in {path} do not fit {name}: {_misfit(error)}.") from error
    model.pretrained_cfg["state_dict"] = None  # else it would hold all tensors twice
    for key, own in model.state_dict().items():
        found = state.get(key, own)
        if own.is_floating_point() and not found.is_floating_point():
            raise WeightsError(f"{path} holds {key} as {found.dtype}, as quantised weights are: give floating ones.")
        if key.endswith("patch_embed.proj.weight") and found.ndim == own.ndim and found.shape[2:] != own.shape[2:]:
            theirs, ours = (" × ".join(map(str, each.shape[2:])) for each in (found, own))
            raise WeightsError(f"The weights in {path} have patches of {theirs} pixels, but {name} has {ours}.")
    return model, f"file:{path.name}"


def _misfit(error: Exception) -> str:
    for pattern, sentence in _MISFITS.items():
        if found := re.search(pattern, str(error)):
            return sentence.format(*found.groups())
    return first_line(error).rstrip(".")


@checked
def pretrained_head(name: str, weights: str | Path = "pretrained") -> nn.Linear:
    """Reads the classifier that belongs to a backbone's weights and that `create_backbone` leaves out.

    A frozen layer from pooled features to logits, (classes, features): behind the backbone it gives the answers of
    timm's own model. `weights` are ``"pretrained"`` or a path to a local file, as for `create_backbone`.

    Raises:
        UnknownNameError: timm does not know the name.
        WeightsError: The weights cannot be found or read, have no linear classifier, or their answer is not that of one
            linear layer on the pooled features, as a distilled DeiT's, which is the mean of two on a token each.
    """
    check_name(name)
    weights = str(weights)
    if random_seed(weights) is not None:
        raise WeightsError("Random weights have no pretrained classifier: give 'pretrained' or a file.")
    otherwise = (
        f"The answer of {name} is not that of one linear layer on its pooled features, as where there are several "
        "(a distilled DeiT takes the mean of two, on a token each): train a linear probe."
    )
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            drawn: Any = _create(name, {"num_classes": 2})
        if not isinstance(drawn.get_classifier(), nn.Linear):  # known before anything is fetched
            raise WeightsError(otherwise)
        model: Any = _filled(name, weights, {})[0].eval()
    head = model.get_classifier()
    if not isinstance(head, nn.Linear):
        raise WeightsError(
            f"The weights {weights!r} of {name} have no linear classifier {_classifier(name)!r}: use tuned ones."
        )
    if not _answers(model, head, tuple(config(name)["input_size"])):
        raise WeightsError(otherwise)
    plain = nn.Linear(head.in_features, head.out_features)
    with torch.no_grad():
        plain.weight.copy_(head.weight)
        plain.bias.zero_() if head.bias is None else plain.bias.copy_(head.bias)
    return plain.requires_grad_(False).eval()


@torch.no_grad()
def _answers(model: Any, head: nn.Linear, size: tuple[int, ...]) -> bool:
    """Whether the head on the pooled features gives the model's answer, on an image of noise."""
    image = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    expected: Tensor = model(image)
    answer = head(model.forward_head(model.forward_features(image), pre_logits=True))
    return bool((answer - expected).norm() <= 1e-3 * expected.norm())


def _classifier(name: str) -> str:
    key = timm.get_pretrained_cfg(name).classifier or "head"
    return key if isinstance(key, str) else str(key[0])
