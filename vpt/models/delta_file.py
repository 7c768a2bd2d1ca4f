"""Models into delta files and back: everything that belongs to a tuned model, on the backbone that it belongs to.

Saving and loading are inverse to each other. Another model may take a part of a file: its delta, or its head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from vpt.argument_types import checked
from vpt.backbones.checkpoints import fingerprint
from vpt.backbones.factory import Backbone, create_backbone
from vpt.errors import ConfigError, DeltaFileError, VPTError, WeightsError
from vpt.image_size import as_size
from vpt.models.classifier import AdaptedModel, TunedModel, ValueHead
from vpt.models.delta_format import (
    DENSE,
    DTYPES,
    FORMAT,
    IDENTITY,
    check_readable,
    identity,
    read_activations,
    read_calibration,
    read_delta,
    targets_of,
    write_delta,
)
from vpt.models.nearest_neighbours import NeighbourModel
from vpt.models.segmenter import DenseModel

_KINDS: dict[str, type[TunedModel] | type[DenseModel]] = {FORMAT: TunedModel, DENSE: DenseModel}


@checked
def save_delta(path: str | Path, model: AdaptedModel) -> Path:
    """Writes the tensors that belong to a model, class names, preprocessing and the backbone's identity.

    Args:
        path: Ends in ``.safetensors``; parent folders are made. Written beside and renamed, never half.
        model: A model, trained or loaded.

    Returns:
        The path.

    Raises:
        DeltaFileError: The model is not all that acts, or its info or preset are no plain values.
        OutputError: The file cannot be written there.
    """
    own = set() if model.delta is None else {id(part) for part in model.delta.parts}
    if any(id(part) not in own for part in model.backbone.attached):
        raise DeltaFileError(
            "The backbone carries a delta that is not this model's, and a file of this one would miss it: build the "
            "model with both deltas in one list."
        )
    if model.backbone.folded:
        raise DeltaFileError("A folded model has no delta left to save: save the model that it was folded from.")
    if model.backbone.trains and not model.backbone.tuned:
        raise DeltaFileError(
            "Parameters of the backbone require a gradient, and a file of the delta would miss what they have become: "
            "call model.backbone.unfreeze() before training the backbone, or freeze() if it does not train."
        )
    backbone, dtype = model.backbone, model.backbone.mean.dtype
    if any(tensor.dtype != dtype for tensor in model.owned().values() if tensor.is_floating_point()):
        raise DeltaFileError(f"The model has several precisions, and a file keeps one: call model.to({dtype}).")
    if not backbone.tuned and dtype == torch.float32 and fingerprint(backbone.model) != backbone.kept_fingerprint:
        raise DeltaFileError(
            "The backbone's weights are no longer those it was made with, and a file of the delta would miss the "
            "change: make the backbone from a file of them, or model.backbone.unfreeze() to keep it beside the delta."
        )
    specs, kept = model.folded()
    header = {
        "format": model.format,
        "backbone": identity(model),
        "backbone_tuned": model.backbone.tuned,
        "dtype": str(model.backbone.mean.dtype).removeprefix("torch."),
        "specs": specs,
        "class_names": model.class_names,
        "preset": model.preset,
        "info": model.info,
        **model.file_header(),
    }
    check_readable(path, header, kept)
    return write_delta(
        path, header, kept, model.calibration if isinstance(model, TunedModel) else None, model.activations
    )


def load_model(path: str | Path, weights: str | Path | None = None) -> TunedModel | DenseModel:
    """Rebuilds a model of whatever kind from a delta file: as saved, at strength 1, in eval mode, all frozen.

    `weights` is where the backbone's are on this machine, None for where they were at training time; not read where the
    file holds the whole backbone. A DeltaFileError where the file is not a delta file, contradicts itself, or belongs
    to other backbone weights, and a WeightsError where those cannot be found.
    """
    return cast("TunedModel | DenseModel", _loaded(path, weights, (FORMAT, DENSE)))


@checked
def load_classifier(path: str | Path, weights: str | Path | None = None) -> TunedModel:
    """`load_model` where nothing but a classifier is taken."""
    return cast("TunedModel", _loaded(path, weights, (FORMAT,)))


@checked
def load_segmentation(path: str | Path, weights: str | Path | None = None) -> DenseModel:
    """`load_model` where nothing but a segmentation model is taken."""
    return cast("DenseModel", _loaded(path, weights, (DENSE,)))


def unfilled(path: str | Path, weights: str | None = None) -> tuple[TunedModel, dict[str, Tensor]]:
    """Does what `load_classifier` does up to the model's own tensors, which it gives by name and `fill` puts in.

    The model stands on the pretrained backbone in float32, its head drawn at random.
    """
    header, tensors = read_delta(path)
    with torch.random.fork_rng(devices=[]):
        backbone = recorded_backbone(str(path), header["backbone"], weights)
        return cast("TunedModel", rebuild(str(path), header, tensors, backbone)), tensors


def _loaded(path: str | Path, weights: str | Path | None, formats: tuple[str, ...]) -> AdaptedModel:
    header, tensors = read_delta(path, formats)
    recorded = header["backbone"]
    with torch.random.fork_rng(devices=[]):
        if header["backbone_tuned"]:  # complete by itself: nothing of what it started from is needed
            backbone = _built(str(path), recorded, "random")
        else:
            backbone = recorded_backbone(str(path), recorded, weights)
        model = rebuild(str(path), header, tensors, backbone.to(DTYPES[header["dtype"]]))
        fill(model, tensors, str(path))
    if isinstance(model.head, ValueHead) and not bool((model.head.scale > 0).all()):
        raise DeltaFileError(f"{path} gives numbers in units that are not positive: its head.scale is damaged.")
    if header["backbone_tuned"]:
        for key in IDENTITY:
            setattr(backbone, key, as_size(recorded[key]) if key == "image_size" else recorded[key])
    if isinstance(model, TunedModel):
        model.calibration, model.activations = read_calibration(path), read_activations(path)
    return model.eval()


def rebuild(what: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor], backbone: Backbone) -> AdaptedModel:
    """Builds the model that a file tells of, once its tensors are known to be those of such a model.

    These are not yet put in. The model is in eval mode, all parameters frozen; `what` names the file in messages. A
    DeltaFileError where there can be no such model, or its tensors have other names, shapes or kinds.
    """

    def build(backbone: Backbone) -> AdaptedModel:
        names = header["class_names"]
        neighbours = header["format"] == FORMAT and "head" in header
        kind = NeighbourModel if neighbours else _KINDS[header["format"]]
        options = header["head"] if "head" in header else {"targets": targets_of(header)}
        return kind(backbone, len(names), header["specs"], names, header["preset"], **options)

    try:
        with torch.device("meta"), _at_most(16 + 4 * len(tensors)):  # takes no memory, whatever the file says
            sketch = build(_without_values(backbone))
    except (VPTError, RuntimeError, OverflowError, ValueError, TypeError) as error:
        raise DeltaFileError(f"{what} tells of a model that cannot be: {error}") from error
    sketch.backbone.tuned = header["backbone_tuned"]
    check_tensors(what, sketch.owned(), tensors)
    if (labels := tensors.get("head.labels")) is not None:
        known = (labels >= 0) & (labels < len(header["class_names"]))
        if labels.dtype != torch.int64 or not bool(known.all()):
            raise DeltaFileError(f"{what} keeps images of classes that it does not name: its head.labels is damaged.")
    model = build(backbone)
    model.info = header["info"]
    return model.requires_grad_(False).eval()


def _without_values(backbone: Backbone) -> Backbone:
    """A copy whose tensors have shapes and nothing else, without what is attached."""
    memo: dict[int, Any] = {id(backbone.attached): []}
    for parameter in backbone.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in backbone.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(backbone, memo)


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Refuses to build modules of more parameters than so many, so that no file makes this process build for ever."""
    left, thread = [count], get_ident()

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        left[0] -= get_ident() == thread
        if left[0] < 0:
            raise ValueError(f"it would have more than the {count} tensors that the file can fill")

    hook = register_module_parameter_registration_hook(cast("Callable[..., None]", registered))
    try:
        yield
    finally:
        hook.remove()


def _built(what: str, recorded: Mapping[str, Any], weights: str | Path) -> Backbone:
    size, pool, frozen = recorded["image_size"], recorded.get("pool"), recorded.get("frozen_dtype")
    try:
        return create_backbone(recorded["name"], weights, size, recorded["normalization"], pool, frozen)
    except WeightsError:
        raise
    except (VPTError, RuntimeError, AssertionError, ValueError, ArithmeticError) as error:  # of timm, at strange sizes
        raise DeltaFileError(f"{what} tells of a backbone that cannot be built: {error}") from error


def recorded_backbone(what: str, recorded: Mapping[str, Any], weights: str | Path | None = None) -> Backbone:
    """Builds the backbone that trained tensors belong to, from weights given or where they were at training time.

    A DeltaFileError for other weights or no such backbone, a WeightsError where they cannot be found.
    """
    backbone = _built(what, recorded, weights or recorded["weights"])
    check_fingerprint(what, recorded, backbone)
    return backbone


def check_fingerprint(what: str, recorded: Mapping[str, Any], backbone: Backbone) -> None:
    """Refuses tensors of another backbone than recorded: a DeltaFileError by weights, architecture or pool."""
    if not backbone.is_recorded_as(recorded):
        if recorded["weights_id"] == backbone.weights_id:
            raise DeltaFileError(
                f"{what} was trained on a backbone of the same name and other weights or another pool, image size or "
                f"frozen_dtype (fingerprint {recorded['fingerprint'][:12]}, not {backbone.fingerprint[:12]}): give the "
                "weights it was trained on, with its pool, image size and frozen_dtype."
            )
        raise DeltaFileError(
            f"{what} was trained on {recorded['weights_id']} (fingerprint {recorded['fingerprint'][:12]}), but the "
            f"weights given are {backbone.weights_id} (fingerprint {backbone.fingerprint[:12]}): give the weights it "
            "was trained on."
        )


def fill(model: AdaptedModel, tensors: Mapping[str, Tensor], what: str) -> None:
    """Copies all tensors that a model owns into it, by name and shape, in the model's precision.

    A whole backbone that is filled, as after full fine-tuning, counts as tuned from now on. A DeltaFileError, with the
    source `what`, where a tensor is missing, unknown, of another shape, or none that a delta can have
    (`DeltaPart.misfit`); the model is then unchanged.
    """
    tuned = model.backbone.tuned
    model.backbone.tuned = tuned or any(key.startswith("backbone.") for key in tensors)
    owned = model.owned()
    try:
        check_tensors(what, owned, tensors)
        _check_parts(what, model, tensors)
    except DeltaFileError:
        model.backbone.tuned = tuned
        raise
    with torch.no_grad():
        for key, tensor in tensors.items():
            owned[key].copy_(tensor)
    for part in model.parts():
        part.started = True


def _check_parts(what: str, model: AdaptedModel, tensors: Mapping[str, Tensor]) -> None:
    for index, part in enumerate(model.parts()):
        room = f"delta.parts.{index}."
        own = {key.removeprefix(room): tensor for key, tensor in tensors.items() if key.startswith(room)}
        if odd := part.misfit(own):
            raise DeltaFileError(f"{what} is damaged: {odd}.")


def check_tensors(what: str, owned: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Refuses tensors that are not those that a model owns.

    A DeltaFileError where a tensor is missing, unknown, of another shape, not finite, or whole instead of floating.
    """
    if missing := sorted(owned.keys() - tensors.keys()):
        raise DeltaFileError(f"{what} is incomplete: {_some(missing)} missing.")
    for key, tensor in tensors.items():
        if key not in owned:
            raise DeltaFileError(f"{what} holds {key!r}, which this model does not have.")
        if owned[key].shape != tensor.shape:
            raise DeltaFileError(f"{what} holds {key!r} of {tuple(tensor.shape)}, expected {tuple(owned[key].shape)}.")
        if tensor.is_floating_point() and not bool(tensor.to(owned[key].dtype).isfinite().all()):
            raise DeltaFileError(f"{what} holds NaN or infinity in {key!r}: its training diverged, or it is damaged.")
        if owned[key].is_floating_point() != tensor.is_floating_point():
            raise DeltaFileError(f"{what} holds {key!r} as {tensor.dtype}, expected {owned[key].dtype}.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _begun(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a delta without what it began with, which what it starts from takes the place of."""
    return {key: value for key, value in spec.items() if key != "std"}


def start_from(path: str | Path, model: AdaptedModel) -> None:
    """Copies what a delta file holds into a model of the same deltas, and leaves the model's own head as it is.

    Prompts behind a projection and prefixes from a network start from their own files too: the file holds what these
    give, of which `DeltaPart.unfolded` finds the parameters. The file may be of any task. A DeltaFileError where the
    file is not a delta file, belongs to another backbone or other deltas, or holds nothing but a head.
    """
    header, tensors = read_delta(path, (FORMAT, DENSE))
    check_fingerprint(str(path), header["backbone"], model.backbone)
    taken = {key: tensor for key, tensor in tensors.items() if not key.startswith("head.")}
    if not taken:
        raise DeltaFileError(f"{path} holds nothing but a head, which init_delta leaves behind: give a delta's file.")
    own, tuned = model.folded()[0], model.backbone.tuned
    if list(map(_begun, header["specs"])) != list(map(_begun, own)):
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
    """Reads a head that belongs to the frozen backbone of a model from a file that holds nothing else.

    It is one as the model's own, (classes, features); messages name its role, e.g. ``"anchor"``. A DeltaFileError where
    it is not a delta file, a ConfigError where it holds more, or is of another backbone, preprocessing or other
    classes.
    """
    header, tensors = read_delta(path)
    if any(not key.startswith("head.") for key in tensors):
        raise ConfigError(f"The {role} {path} is not a linear probe: it holds more than a head.")
    if "head" in header or isinstance(model, NeighbourModel):
        one = f"The {role} {path}" if "head" in header else "The model"
        raise ConfigError(f"{one} is of nearest neighbours, which have no weights: leave out the {role}.")
    backbone = model.backbone
    for what, theirs, ours in (
        ("backbone weights", True, backbone.is_recorded_as(header["backbone"])),
        ("image size", as_size(header["backbone"]["image_size"]), backbone.image_size),
        ("normalization", header["backbone"]["normalization"], backbone.normalization),
        ("preset", header["preset"], model.preset),
        ("classes", header["class_names"], model.class_names),
        ("targets", targets_of(header), model.targets),
    ):
        if theirs != ours:
            raise ConfigError(
                f"The {role} {path} was trained with other {what} than the delta: train the linear probe on the same "
                "task and backbone."
            )
    check_tensors(str(path), {f"head.{key}": tensor for key, tensor in model.head.state_dict().items()}, tensors)
    head = copy.deepcopy(model.head)
    head.load_state_dict({key.removeprefix("head."): tensor for key, tensor in tensors.items()})
    return head.requires_grad_(False)
