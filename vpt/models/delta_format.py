"""The form of a delta file: tensors as safetensors, and a JSON header that says whose they are, for others too.

Files are read here and nowhere else, and checked whole: they may come from anybody.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vpt.atomic_write import atomic_write
from vpt.backbones.factory import input_size
from vpt.backbones.normalization import is_normalization
from vpt.data.targets import Targets
from vpt.deltas.registry import DeltaSpec, read_specs
from vpt.errors import DeltaFileError, VPTError
from vpt.image_size import is_size, plain_size
from vpt.models.activations import Activations, check_activations
from vpt.models.calibration import KINDS, HeldOut, check_calibration
from vpt.models.classifier import AdaptedModel, TunedModel
from vpt.models.segmenter import HEADS, DenseModel
from vpt.run_record import misfit

FORMAT, DENSE = TunedModel.format, DenseModel.format
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
"""The precisions of a model by the name that a header has for them."""

IDENTITY: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "weights": str,
    "weights_id": str,
    "fingerprint": str,
    "image_size": (int, list),
    "normalization": (str, dict),
}
"""What makes a backbone the one that a delta was trained on, and the types of the values."""

CALIBRATION, ACTIVATIONS = "calibration", "activations"
"""Of a header, and of the names of the tensors that belong to it: what is kept beside the model."""

_PLACE = re.compile(r"(file://)?(~|\.{1,2}|[A-Za-z]:)?[/\\]")
_INSIDE = re.compile(r"""(?<=[\s=,:;"'(\[])(?:~|\.{1,2}|[A-Za-z]:)?[/\\][^\s/\\"',;)\]][^\s"',;)\]]*""")
_DEEPEST = 32  # levels of lists and dicts within a header
_HOLDS = {FORMAT: "a classifier", DENSE: "a segmentation model"}
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
    """Reads what a delta file of one of some formats says about itself, and none of its tensors.

    Gives ``format``, ``backbone`` (name, weights, weights_id, fingerprint, image_size, normalization),
    ``backbone_tuned``, ``dtype``, canonical ``specs``, ``class_names``, ``preset``, ``info``, ``tensors`` (their
    names), and of a segmentation model ``head``. A DeltaFileError where it is missing, no such file, or contradicts
    itself.
    """
    with _opened(path, formats) as (header, _):
        return header


def read_delta(path: str | Path, formats: Collection[str] = (FORMAT,)) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads what `read_header` does, and the tensors of the model by name."""
    with _opened(path, formats) as (header, file):
        return header, {key: file.get_tensor(key) for key in header["tensors"]}


def read_calibration(path: str | Path) -> HeldOut | None:
    """Reads what a delta file knows of held-out images; None where it knows nothing.

    A DeltaFileError where it is damaged, or of another model than the file's.
    """
    if (read := _read_beside(path, CALIBRATION)) is None:
        return None
    header, digest, *kept = read
    found = KINDS[targets_of(header)](*kept)
    check_calibration(str(path), found, len(header["class_names"]), digest)
    return found


def read_activations(path: str | Path) -> Activations | None:
    """Reads what a delta file knows of activations on training images; None and errors as of `read_calibration`."""
    if (read := _read_beside(path, ACTIVATIONS)) is None:
        return None
    found = Activations(*read[2:])
    check_activations(str(path), found, read[1])
    return found


def _read_beside(path: str | Path, room: str) -> tuple[dict[str, Any], str, dict[str, Any], dict[str, Tensor]] | None:
    """Header and digest of a model, and what a room of its file tells and holds; None where there is no such room."""
    with _opened(path, (FORMAT, DENSE)) as (header, file):
        if (about := header.get(room)) is None:
            return None
        tensors = {key: file.get_tensor(key) for key in header["tensors"]}
        kept = {key: file.get_tensor(f"{room}.{key}") for key in about["tensors"]}
    told = {key: value for key, value in about.items() if key != "tensors"}
    return header, model_digest(header, tensors), told, kept


def targets_of(header: Mapping[str, Any]) -> Targets:
    """What the outputs of the model of a file are."""
    found: Targets = header.get("targets", "multiclass")
    return found


def model_digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """sha256 of what a model's answers depend on: backbone, classes, preprocessing, deltas and all of its tensors."""
    backbone = {key: value for key, value in header["backbone"].items() if key != "weights"}  # a place
    told = {key: header[key] for key in ("class_names", "preset", "dtype", "targets") if key in header}
    if _of_neighbours(header):
        told["head"] = header["head"]
    # Without defaults, so that it is the same where a later version has more options.
    told |= {"backbone": backbone, "specs": [DeltaSpec.read(spec).brief() for spec in header["specs"]]}
    digest = hashlib.sha256(json.dumps(without_places(told), sort_keys=True).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_delta(
    path: str | Path,
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    calibration: HeldOut | None = None,
    activations: Activations | None = None,
) -> Path:
    """Writes a delta file from its parts, whole or not at all.

    The inverse of `read_delta`, `read_calibration` and `read_activations`. Numbers in the header that are not finite
    become null. A DeltaFileError where it holds other than plain values, or calibration or activations are of another
    model.
    """
    path = Path(path)
    header = {**header, "tensors": sorted(tensors)}
    digest = "" if calibration is None and activations is None else model_digest(header, tensors)
    if calibration is not None:
        check_calibration(str(path), calibration, len(header["class_names"]), digest)
    if activations is not None:
        check_activations(str(path), activations, digest)
    for room, beside in ((CALIBRATION, calibration), (ACTIVATIONS, activations)):
        header.pop(room, None)
        if beside is not None:
            header[room] = {**beside.about, "tensors": sorted(beside.tensors)}
            tensors = {**tensors, **{f"{room}.{key}": tensor for key, tensor in beside.tensors.items()}}
    kept, places = dict[str, Tensor](), set[int]()
    for key, tensor in tensors.items():
        whole = tensor.detach().cpu().contiguous()
        kept[key] = whole.clone() if whole.data_ptr() in places else whole  # tied ones are written once for each name
        places.add(whole.data_ptr())
    try:
        text = json.dumps(_finite(header), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DeltaFileError(f"A delta file keeps plain JSON values in info and preset: {error}.") from error
    with atomic_write(path) as partial:
        save_file(kept, partial, metadata={"vpt": text})
    return path


def check_readable(path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """A DeltaFileError for what would not be read again.

    That is a header of other than plain values or that contradicts itself or the tensors, or NaN or infinity in these.
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
    if path.is_dir():
        raise DeltaFileError(f"{path} is a folder: name the delta.safetensors of a run in it.")
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
    rooms = (CALIBRATION, ACTIVATIONS)
    beside = {f"{room}.{key}" for room in rooms for key in header.get(room, {}).get("tensors", ())}
    if absent := sorted({*header["tensors"], *beside} - tensors.keys()):
        raise DeltaFileError(f"{path} is incomplete: {', '.join(absent)} missing.")
    tensors = {key: shape for key, shape in tensors.items() if key not in beside}
    own = ("delta.", "head.", "backbone.") if header["backbone_tuned"] else ("delta.", "head.")
    for key in tensors:
        if key not in header["tensors"] or not key.startswith(own):
            raise DeltaFileError(f"{path} holds {key!r:.200}, which its header does not tell of.")
    heads = [shape for key, shape in tensors.items() if key.startswith("head.")]
    classes = len(header["class_names"])
    if not heads or not (_of_neighbours(header) or any(shape[:1] == (classes,) for shape in heads)):
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
    dense = isinstance(head, dict) and head.get("kind") in HEADS and type(head.get("width")) is int and len(head) == 2
    valid = {
        "backbone image_size": is_size(backbone["image_size"]),
        "backbone pool": isinstance(backbone.get("pool"), str | None),
        "backbone frozen_dtype": backbone.get("frozen_dtype") in (None, "bfloat16"),
        "backbone normalization": is_normalization(backbone["normalization"]),
        "dtype": header["dtype"] in DTYPES,
        "specs": all(isinstance(spec, dict) for spec in header["specs"]),
        "class_names": bool(header["class_names"]) and all(isinstance(name, str) for name in header["class_names"]),
        "tensors": all(isinstance(name, str) for name in header["tensors"]),
        "head": dense if header["format"] == DENSE else "head" not in header or _votes(head),
        "targets": targets_of(header) in (get_args(Targets) if header["format"] == FORMAT else ("multiclass",))
        and targets_of(header) == _trained_on(header["info"], targets_of(header)),
        **{room: _names_tensors(header.get(room, {"tensors": []})) for room in (CALIBRATION, ACTIVATIONS)},
    }
    odd = misfit(known(header["info"]))
    return [key for key, fine in valid.items() if not fine] + ([f"info ({odd})"] if odd else [])


def _of_neighbours(header: Mapping[str, Any]) -> bool:
    return header["format"] == FORMAT and "head" in header


def _votes(head: Any) -> bool:
    """Whether that is the head of nearest neighbours."""
    if not isinstance(head, dict) or head.keys() != {"kind", "images", "k", "temperature"} or head["kind"] != "knn":
        return False
    whole = all(type(head[key]) is int and head[key] >= least for key, least in (("images", 0), ("k", 1)))
    return whole and type(head["temperature"]) is float and 0.001 <= head["temperature"] <= 100


def _trained_on(info: Mapping[str, Any], unknown: str) -> Any:
    """The targets that a run says it was trained on; what is not of a run says nothing."""
    data = info.get("data")
    return data.get("targets", "multiclass") if "hyperparameters" in info and isinstance(data, dict) else unknown


def _names_tensors(beside: Any) -> bool:
    names = beside.get("tensors") if isinstance(beside, dict) else None
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def known(info: dict[str, Any]) -> dict[str, Any]:
    """What is told of a run without what is null, which numbers that are not finite became."""
    told = {key: value for key, value in info.items() if value is not None}
    metrics = told.get("metrics")
    known = (
        {key: value for key, value in metrics.items() if value is not None} if isinstance(metrics, dict) else metrics
    )
    return told if metrics is None else told | {"metrics": known}


def identity(model: AdaptedModel) -> dict[str, Any]:
    """What makes a backbone a delta's own, in plain values: `IDENTITY`, pool and frozen_dtype if there are."""
    told = {key: getattr(model.backbone, key) for key in IDENTITY} | {
        "image_size": plain_size(model.backbone.image_size)
    }
    options = {"pool": model.backbone.pool, "frozen_dtype": "bfloat16" if model.backbone.narrow else None}
    return told | {key: value for key, value in options.items() if value is not None}


def without_places(value: Any) -> Any:
    """Leaves only the file names of paths that lead anywhere on this machine, in nested plain JSON values.

    A string that is or holds an absolute path, or one that starts at ``.``, ``..`` or ``~``, keeps the last part of it.
    """
    if isinstance(value, dict):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(item) for item in value]
    if not isinstance(value, str):
        return value
    return _last(value) if _PLACE.match(value) else _INSIDE.sub(lambda found: _last(found[0]), value)


def _last(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def public_identity(recorded: dict[str, Any]) -> dict[str, Any]:
    """A backbone's identity as others can use it: with the file name in place of a path to the weights."""
    return recorded | {"weights": _last(str(recorded["weights"]))}


def about(model: TunedModel) -> dict[str, Any]:
    """What a user of a model must know, in plain values: classes, preset, backbone, deltas, protocol of training."""
    told = identity(model)
    specs = [] if model.delta is None else [DeltaSpec.read(spec).brief() for spec in model.delta.specs]
    size = told.pop("image_size")
    del told["weights"]
    calibration = model.calibration if model.strength == 1.0 else None  # it is of the tuned model
    return {
        "class_names": model.class_names,
        **model.file_header(),
        "image_size": size,
        "preset": without_places(model.preset),
        "backbone": told,
        "specs": without_places(specs),
        "provenance": without_places(model.info),
        **({} if calibration is None else {CALIBRATION: _told(calibration)}),
    }


def _told(calibration: HeldOut) -> dict[str, Any]:
    """What a program that has nothing but a model's outputs can do with a calibration."""
    return calibration.told() | {"data": without_places(calibration.about.get("data"))}
