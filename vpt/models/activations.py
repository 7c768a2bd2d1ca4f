"""What a delta file keeps of training images' activations, so that adapting at test time needs no training image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vpt.errors import DeltaFileError

_NAMES = {"mean", "std", "pooled"}


@dataclass(frozen=True, eq=False)
class Activations:
    """Statistics over N training images of the features that a tuned model has of them.

    Attributes:
        about: Plain values: ``images`` (N), ``seed`` (of their draw), ``data`` (which images), ``model``
            (`vpt.models.delta_format.model_digest` of what was measured).
        tensors: float32 ``mean`` and ``std`` of the features of each block, (blocks, dim), and ``pooled``, the mean of
            those that the head reads, (features,).
    """

    about: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def check_activations(what: str, kept: Activations, digest: str) -> None:
    """Refuses, by a DeltaFileError, what are no statistics of a model of such a digest; `what` names the file."""
    fault = "" if set(kept.tensors) == _NAMES and type(kept.about.get("images")) is int else "cannot be read"
    if not fault:
        mean, std, pooled = (kept.tensors[name] for name in ("mean", "std", "pooled"))
        whole = (
            mean.ndim == 2 and mean.shape == std.shape and pooled.ndim == 1 and 0 not in (*mean.shape, *pooled.shape)
        )
        fault = "" if whole and bool((std >= 0).all()) else "contradict themselves"
    if not all(each.dtype == torch.float32 and bool(each.isfinite().all()) for each in kept.tensors.values()):
        fault = fault or "hold what is no finite number"
    if not fault and kept.about.get("model") != digest:
        fault = "are of another backbone, other deltas or preprocessing"
    if fault:
        raise DeltaFileError(f"{what} has statistics of activations that {fault}: `vpt robustness statistics` anew.")
