"""How strongly a change of a backbone acts: one α for the whole model, or one for each of its layers.

One α is WiSE-FT (Wortsman et al., CVPR 2022, equation 1); a line over the layers is LiNeS (Wang et al., "LiNeS:
Post-training layer scaling prevents forgetting and enhances model merging", ICLR 2025, equation 3).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from numbers import Real
from typing import TypeVar

import numpy as np
from torch import Tensor, nn

from vpt.argument_types import shown
from vpt.backbones.factory import Backbone
from vpt.backbones.target_modules import layer_numbers
from vpt.errors import ConfigError

Strength = float | tuple[float, ...]
"""One α in [0, 1] of all layers; or, where they differ, that of each, the embeddings first, the head last."""

K = TypeVar("K", bound=Hashable)
Place = nn.Module | str | int
"""Where in a backbone something lies: in a module, in a parameter or module by name, or in a layer by number."""


def checked_strength(alpha: object, backbone: Backbone) -> Strength:
    """Reads a strength: a number, one for each layer, or two, those of the first and the last, with a line between.

    The layers are timm's (`vpt.backbones.target_modules.layer_numbers`): on a vision transformer the embeddings, each
    block, the last one with the norm behind it, and the head with what the pool adds, depth + 2 of them. Equal ones are
    one number. A ConfigError where they are no numbers in [0, 1], or not so many; an UnsupportedBackboneError where
    timm tells no layers.
    """
    if isinstance(alpha, Real):
        return _checked(alpha)
    if isinstance(alpha, np.ndarray | Tensor):
        alpha = alpha.tolist()
    if not isinstance(alpha, Sequence) or isinstance(alpha, str):
        return _checked(alpha)
    number = layer_numbers(backbone)[1] + 1
    found = tuple(_checked(each) for each in alpha)
    if len(found) == 2:
        found = tuple(np.linspace(*found, number).tolist())
    if len(found) != number:
        raise ConfigError(
            f"The strengths are one for each of the {number} layers of {backbone.name}, the embeddings first and the "
            f"head last, or two, of the first and the last of them; got {len(found)}."
        )
    return found[0] if len(set(found)) == 1 else found


def _checked(alpha: object) -> float:
    if not isinstance(alpha, Real) or not 0.0 <= float(alpha) <= 1.0:
        raise ConfigError(f"The strength is a number between 0 (backbone) and 1 (tuned), got {shown(alpha)}.")
    return float(alpha)


def times(alpha: float, strength: Strength) -> Strength:
    """All strengths, multiplied by α in [0, 1]; at α = 1 they are the same bit for bit, at 0 all are 0."""
    if isinstance(strength, float):
        return alpha * strength
    return 0.0 if alpha == 0.0 else tuple(alpha * each for each in strength)


def by_place(strength: Strength, places: Mapping[K, Place], backbone: Backbone) -> dict[K, float]:
    """The strength of each place; nothing where all are one."""
    if isinstance(strength, float):
        return {}
    numbers, last = layer_numbers(backbone)
    modules = {id(module): name for name, module in backbone.model.named_modules()}
    found: dict[K, float] = {}
    for key, place in places.items():
        if isinstance(place, nn.Module):
            place = modules[id(place)]
        found[key] = strength[place if isinstance(place, int) else _layer(place, numbers, last)]
    return found


def _layer(name: str, numbers: Mapping[str, int], last: int) -> int:
    """The layer of a parameter, a module or a buffer: of what has no parameters, that of the module around it."""
    while name:
        if name in numbers:
            return numbers[name]
        if own := [number for each, number in numbers.items() if each.startswith(f"{name}.")]:
            return min(own)
        name = name.rpartition(".")[0]
    return last
