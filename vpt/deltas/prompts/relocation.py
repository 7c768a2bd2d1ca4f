"""Prompts that move between layers while they train: where each stands, how idle it is, and how one moves.

PRO-VPT (Shang et al., "PRO-VPT: Distribution-Adaptive Visual Prompt Tuning via Prompt Relocation", ICCV 2025). Where a
prompt moves to is chosen in `vpt.deltas.prompts.allocation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vpt.argument_types import Options
from vpt.deltas.base import Shape
from vpt.deltas.host_state import HostState
from vpt.errors import ConfigError, check_number


@dataclass(frozen=True)
class Relocate(Options):
    """How prompts move: at the start of an epoch the most idle one, if any is, to the layer that a policy chooses.

    Attributes:
        warmup: Epochs before the first move, at least 0.
        scale: What a prompt that moves is multiplied by, above 0 and at most 1.
    """

    warmup: int = 1
    scale: float = 1e-3

    def __post_init__(self) -> None:
        """Refuses what is out of range."""
        check_number("warmup of relocate", self.warmup, 0, whole=True)
        check_number("scale of relocate", self.scale, 0, 1)
        if self.scale == 0:
            raise ConfigError("scale of relocate must be positive: a prompt of zeros has no direction to grow in.")


class Assignment(HostState):
    """In which layer each prompt stands: `layers`, int64 (N,), from 0, which is all of its state."""

    def __init__(self, numbers: Sequence[int], options: Relocate) -> None:
        """`numbers` are those of the prompts of each layer, of which the first ones stand in the first layer."""
        own = [layer for layer, number in enumerate(numbers) for _ in range(number)]
        super().__init__(own)
        self.options, self.depth = options, len(numbers)

    @property
    def layers(self) -> Tensor:
        """That of each prompt."""
        return self.values

    def numbers(self) -> list[int]:
        """How many prompts stand in each layer."""
        found: list[int] = torch.bincount(self.layers, minlength=self.depth).tolist()
        return found

    def rows(self, layer: int) -> Tensor:
        """Which prompts stand in a layer, int64 (n,)."""
        return (self.layers == layer).nonzero().flatten()

    def of(self, layer: int, tokens: Tensor) -> Tensor:
        """The prompts (n, dim) that stand in a layer, of all of them, (N, dim)."""
        return tokens.index_select(0, self.rows(layer).to(tokens.device, non_blocking=True))

    @torch.no_grad()
    def move(self, tokens: Tensor, row: int, layer: int) -> None:
        """Puts one of the prompts (N, dim) into another layer, scaled down; in its own one it stays as it is.

        Its row stays the same, so that an optimiser goes on with the moments that it has of it.
        """
        if int(self.layers[row]) != layer:
            tokens[row].mul_(self.options.scale)
            self.layers[row] = layer

    def misfit(self, tensors: Mapping[str, Tensor], room: str) -> str:
        """See `DeltaPart.misfit`; `room` is what their names begin with."""
        layers = tensors[f"{room}_extra_state"]
        return (
            "its prompts stand in layers that are none" if bool(((layers < 0) | (layers >= self.depth)).any()) else ""
        )


def check_relocation(shapes: Sequence[Shape], others: Mapping[str, bool]) -> None:
    """Refuses options that lose their meaning where prompts move, and layers between which none can.

    A ConfigError; `others` says which are given, `shapes` are (n, dim) of each layer.
    """
    if given := [name for name, there in others.items() if there]:
        raise ConfigError(f"relocate moves free prompts between layers: leave {' and '.join(given)} out.")
    if len(widths := dict.fromkeys(dim for _, dim in shapes)) > 1:
        raise ConfigError(
            f"relocate moves prompts between layers of one width, and these have {', '.join(map(str, widths))}: choose "
            "some of one stage by layers."
        )
    if len(shapes) < 2 or sum(number for number, _ in shapes) < 2:
        raise ConfigError("relocate needs two layers and two prompts, or nothing could move.")
