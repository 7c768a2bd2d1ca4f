"""What images may hold, and the statistics by which a backbone normalises them."""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from torch import Tensor

from vpt.backbones.checkpoints import config
from vpt.errors import ConfigError

STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "inception": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


def statistics(name: str, normalization: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of pixels in [0, 1]: those of some weights, or those of a name."""
    if normalization != "weights":
        return STATISTICS[normalization]
    record = config(name)
    return tuple(record["mean"]), tuple(record["std"])


def check_values(images: Tensor) -> None:
    """Refuses what would be scaled wrongly without a word. Looks at no value where looking is impossible."""
    if images.dtype == torch.bool or images.is_complex():
        raise ConfigError(f"Images are integers in [0, 255] or floats in [0, 1], got {images.dtype}: convert them.")
    if torch.compiler.is_compiling() or cast("Any", torch.jit).is_tracing():
        return
    if images.is_cuda and torch.cuda.is_current_stream_capturing():
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
