"""What a model is, in plain values: as a file needs it, and as others may read it, without places of this machine."""

from __future__ import annotations

import re
from typing import Any

from vpt.deltas.registry import DeltaSpec
from vpt.models.classifier import AdaptedModel, TunedModel

IDENTITY = {
    "name": str,
    "weights": str,
    "weights_id": str,
    "fingerprint": str,
    "image_size": int,
    "normalization": str,
}
"""What makes a backbone the one that a delta was trained on, and the types of the values."""

_PLACE = re.compile(r"(file://)?(~|\.{1,2}|[A-Za-z]:)?[/\\]")
_INSIDE = re.compile(r"""(?<=[\s=,:;"'(\[])(?:~|\.{1,2}|[A-Za-z]:)?[/\\][^\s/\\"',;)\]][^\s"',;)\]]*""")


def identity(model: AdaptedModel) -> dict[str, Any]:
    """What makes a backbone the one that a delta was trained on.

    Args:
        model: A model.

    Returns:
        Plain values: name, weights, weights_id, fingerprint, image_size, normalization; and pool, unless it is the
        weights' own, as that of every file of version 0.1.0.
    """
    told = {key: getattr(model.backbone, key) for key in IDENTITY}
    return told if model.backbone.pool is None else told | {"pool": model.backbone.pool}


def without_places(value: Any) -> Any:
    """Leaves only the file names of paths that lead anywhere on this machine.

    Args:
        value: Plain JSON values, nested.

    Returns:
        The same, where a string that is or holds an absolute path, or one that starts at ``.``, ``..`` or ``~``, keeps
        the last part of it.
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
    """A backbone's identity as others can use it.

    Args:
        recorded: As `identity` gives it.

    Returns:
        The same, with the file name in place of a path to the weights.
    """
    return recorded | {"weights": _last(str(recorded["weights"]))}


def about(model: TunedModel) -> dict[str, Any]:
    """All that a user of a model must know to feed it and to trust it.

    Args:
        model: A trained model.

    Returns:
        Plain values: class names, preset, backbone, deltas, and the protocol of its training.
    """
    told = identity(model)
    specs = [] if model.delta is None else [DeltaSpec.read(spec).brief() for spec in model.delta.specs]
    return {
        "class_names": model.class_names,
        "image_size": told["image_size"],
        "preset": without_places(model.preset),
        "backbone": {
            key: told[key] for key in ("name", "weights_id", "fingerprint", "normalization", "pool") if key in told
        },
        "specs": without_places(specs),
        "provenance": without_places(model.info),
    }
