"""What images may hold, and the statistics by which a backbone normalises them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from torch import Tensor

from vpt.backbones.checkpoints import config
from vpt.errors import ConfigError, UnknownNameError

STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "inception": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


Normalization = str | Mapping[str, Sequence[float]]
"""``weights``, a name of `STATISTICS`, or ``mean`` and ``std`` of each channel of images in their own unit."""

_MOST = 4096


def is_normalization(given: Any) -> bool:
    """Whether this is a `Normalization`: of its names, or finite numbers, as many of both, the deviations positive."""
    if isinstance(given, str):
        return given in ("weights", *STATISTICS)
    if not isinstance(given, Mapping) or set(given) != {"mean", "std"}:
        return False
    if not all(isinstance(values, list | tuple) and 1 <= len(values) <= _MOST for values in given.values()):
        return False
    numbers = [*given["mean"], *given["std"]]
    plain = all(isinstance(each, int | float) and not isinstance(each, bool) and abs(each) < 1e30 for each in numbers)
    return plain and len(given["mean"]) == len(given["std"]) and all(each > 1e-30 for each in given["std"])


def check_normalization(given: Any) -> None:
    """Refuses what is no `Normalization`: an UnknownNameError for a name, else a ConfigError."""
    if isinstance(given, str) and not is_normalization(given):
        raise UnknownNameError("normalization", given, ["weights", *STATISTICS])
    if not is_normalization(given):
        raise ConfigError(
            "normalization is a name, or {mean: [...], std: [...]} with a finite number for each channel, the "
            f"deviations positive, got {given!r:.200}."
        )


def plain(normalization: Normalization) -> str | dict[str, list[float]]:
    """In values of JSON."""
    return (
        normalization if isinstance(normalization, str) else {key: list(normalization[key]) for key in ("mean", "std")}
    )


def statistics(name: str, normalization: Normalization) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel: of pixels in [0, 1], of some weights or of a name; or those given."""
    if not isinstance(normalization, str):
        return tuple(map(float, normalization["mean"])), tuple(map(float, normalization["std"]))
    if normalization != "weights":
        return STATISTICS[normalization]
    record = config(name)
    return tuple(record["mean"]), tuple(record["std"])


def check_values(images: Tensor, raw: bool = False) -> None:
    """Refuses what would be scaled wrongly without a word; of `raw` images, in their own unit, what is not finite.

    Looks at no value where looking is impossible.
    """
    if raw:
        _check_finite(images)
        return
    if images.dtype == torch.bool or images.is_complex():
        raise ConfigError(f"Images are integers in [0, 255] or floats in [0, 1], got {images.dtype}: convert them.")
    if _unseen(images):
        return
    whole = not images.is_floating_point()
    most = min(255, torch.iinfo(images.dtype).max) if whole else 1  # 255 is -1 in int8
    values = images.to(torch.int64) if whole else images.float()  # PyTorch compares no uint16, no float8
    try:
        legal = bool(((values >= 0) & (values <= most)).all())
    except RuntimeError:  # within vmap, or of shapes alone
        return
    if legal:
        return
    if bool(values.isnan().any()):
        raise ConfigError("Images hold NaN: mend what prepares them.")
    found = f"got {images.dtype} from {values.min().item():.4g} to {values.max().item():.4g}"
    raise ConfigError(
        f"Images of integers lie in [0, 255], {found}: clamp them."
        if whole
        else f"Images of floats lie in [0, 1], {found}: divide them by 255 if that is their range, else clamp them."
    )


def _unseen(images: Tensor) -> bool:
    """Whether values cannot be looked at here."""
    if torch.compiler.is_compiling() or cast("Any", torch.jit).is_tracing():
        return True
    return images.is_cuda and torch.cuda.is_current_stream_capturing()


def _check_finite(images: Tensor) -> None:
    if images.dtype == torch.bool or images.is_complex():
        raise ConfigError(f"Images of channels are numbers, got {images.dtype}: convert them.")
    if _unseen(images) or not images.is_floating_point():
        return
    try:
        finite = math.isfinite(float(images.float().sum())) or bool(images.isfinite().all())
    except RuntimeError:  # within vmap, or of shapes alone
        return
    if not finite:
        raise ConfigError("Images hold NaN or infinity: mend what prepares them.")
