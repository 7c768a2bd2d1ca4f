"""Which blocks a delta is in, and a matrix for each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import cast

import torch
from torch import Tensor, nn

from vpt.errors import ConfigError

Shape = tuple[int, int]


def stack(shapes: Sequence[Shape], like: Tensor, draw: Callable[[Tensor], Tensor]) -> nn.Parameter | nn.ParameterList:
    """Makes a matrix for each layer; those of successive layers of one shape lie in one tensor.

    Args:
        shapes: (n, dim) of each layer.
        like: Gives dtype and device.
        draw: Fills a tensor.

    Returns:
        One parameter (layers, n, dim) where all shapes are equal, else a list of them.
    """
    runs = [nn.Parameter(draw(like.new_empty(len(list(run)), *shape))) for shape, run in groupby(shapes)]
    return runs[0] if len(runs) == 1 else nn.ParameterList(runs)


def pick(stacked: nn.Parameter | nn.ParameterList, layer: int) -> Tensor:
    """Takes the matrix of a layer.

    Args:
        stacked: What `stack` made.
        layer: Counted from 0.

    Returns:
        (n, dim).
    """
    if isinstance(stacked, nn.Parameter):
        return stacked[layer]
    for run in stacked:
        if layer < len(run):
            return cast("Tensor", run[layer])
        layer -= len(run)
    raise IndexError(layer)


def named_stack(name: str, matrices: Sequence[Tensor]) -> dict[str, Tensor]:
    """Lays matrices out as `stack` does, under the names that its parameters have.

    Args:
        name: Of the attribute that holds them.
        matrices: (n, dim) of each layer.

    Returns:
        One tensor (layers, n, dim) where all shapes are equal, else one for each run of equal shapes.
    """
    runs = [torch.stack(list(run)) for _, run in groupby(matrices, key=lambda matrix: matrix.shape)]
    return {name: runs[0]} if len(runs) == 1 else {f"{name}.{index}": run for index, run in enumerate(runs)}


def chosen_blocks(depth: int, layers: Sequence[int] | None) -> list[int]:
    """Reads a range of layers.

    Args:
        depth: Number of blocks.
        layers: ``[first, last + 1]``, counted from 0; None for all.

    Returns:
        The positions of the blocks.

    Raises:
        ConfigError: There are no such blocks.
    """
    if layers is None:
        return list(range(depth))
    if len(layers) != 2 or not 0 <= layers[0] < layers[1] <= depth:
        raise ConfigError(f"layers is [first, last + 1] of {depth} blocks, counted from 0, got {list(layers)}.")
    return list(range(layers[0], layers[1]))


def numbers_by_layer(num_tokens: int | Sequence[int], layers: int) -> list[int]:
    """Reads a number of keys for each layer.

    Args:
        num_tokens: One number for all, or a list.
        layers: How many layers have keys.

    Returns:
        The number of each.

    Raises:
        ConfigError: The list has another length, or a number is below 1.
    """
    numbers = [num_tokens] * layers if isinstance(num_tokens, int) else list(num_tokens)
    if len(numbers) != layers:
        raise ConfigError(f"num_tokens lists {len(numbers)} numbers for {layers} layers with prompts.")
    if min(numbers) < 1:
        raise ConfigError(f"num_tokens must be at least 1, got {min(numbers)}; for no prompts use a linear probe.")
    return numbers
