"""Which values images may hold."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from vpt.errors import ConfigError


def check_values(images: Tensor) -> None:
    """Refuses what would be scaled wrongly without a word. Looks at no value where looking is impossible.

    Args:
        images: Of any shape and dtype; uint8 needs no check.

    Raises:
        ConfigError: Integers outside [0, 255], floats outside [0, 1], NaN, booleans or complex numbers.
    """
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
