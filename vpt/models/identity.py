"""What may be said about a model elsewhere: plain values without the places of this machine."""

from __future__ import annotations

import re
from typing import Any

from vpt.models.classifier import TunedModel

_PLACE = re.compile(r"(file://)?(~|\.{1,2}|[A-Za-z]:)?[/\\]")
_INSIDE = re.compile(r"""(?<=[\s=,:;"'(\[])(?:~|\.{1,2}|[A-Za-z]:)?[/\\][^\s/\\"',;)\]][^\s"',;)\]]*""")


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
        recorded: As `vpt.models.delta_file.identity` gives it.

    Returns:
        The same, with the file name in place of a path to the weights.
    """
    weights = recorded["weights"]
    known = weights in ("pretrained", "random")
    return recorded | {"weights": weights if known else _last(str(weights))}


def about(model: TunedModel) -> dict[str, Any]:
    """All that a user of a model must know to feed it and to trust it.

    Args:
        model: A trained model.

    Returns:
        Plain values: class names, preset, backbone, deltas, and the protocol of its training.
    """
    backbone = model.backbone
    identity = {key: getattr(backbone, key) for key in ("name", "weights_id", "fingerprint", "normalization")}
    return {
        "class_names": model.class_names,
        "image_size": backbone.image_size,
        "preset": without_places(model.preset),
        "backbone": identity,
        "specs": without_places([] if model.delta is None else model.delta.specs),
        "provenance": without_places(model.info),
    }
