"""Which weights of a model are kept in bfloat16 where its frozen part is: as autocast casts them, bit for bit."""

from __future__ import annotations

from torch import nn


def plain_convolution(layer: nn.Module) -> bool:
    """Whether a layer convolves with its weight as it is: it does not standardise it."""
    return type(layer).__name__ in ("Conv2d", "Conv2dSame")


def wide_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of linear layers and plain convolutions, by name: all but a few of a model's numbers."""
    layers = {
        name: each for name, each in model.named_modules() if isinstance(each, nn.Linear) or plain_convolution(each)
    }
    own = {f"{name}.weight": layer._parameters.get("weight") for name, layer in layers.items()}
    return {name: weight for name, weight in own.items() if weight is not None}
