"""Where the tokens of an attention module lie in the image: windows are stitched back, their shift undone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

Pair = tuple[int, int]


@dataclass(frozen=True)
class Places:
    """A map of patches, cut into windows as timm's Swin cuts it; or whole, as one window.

    Attributes:
        grid: Patches (rows, columns) of the map.
        window: Of a window; windows at the right and lower edge may hold padding.
        shift: By how many (rows, columns) the map is rolled up and left before it is cut.
    """

    grid: Pair
    window: Pair
    shift: Pair = (0, 0)

    @property
    def area(self) -> int:
        """Patches of a window, padding included."""
        return math.prod(self.window)

    @property
    def across(self) -> Pair:
        """Windows (down, across)."""
        return math.ceil(self.grid[0] / self.window[0]), math.ceil(self.grid[1] / self.window[1])

    @property
    def windows(self) -> int:
        """Windows of a map."""
        return math.prod(self.across)

    def stitch(self, values: Tensor) -> Tensor:
        """Puts the patches of windows into their places.

        Args:
            values: (B · windows, ..., area).

        Returns:
            (B, ..., rows, columns), without padding.
        """
        (down, across), (height, width) = self.across, self.window
        images = len(values) // self.windows
        split = values.reshape(images, down, across, *values.shape[1:-1], height, width)
        maps = split.movedim((1, 2), (-4, -2)).flatten(-4, -3).flatten(-2, -1)
        return maps[..., : self.grid[0], : self.grid[1]].roll(self.shift, dims=(-2, -1))

    def cut(self, maps: Tensor) -> Tensor:
        """Undoes `stitch`; padding gets 0.

        Args:
            maps: (B, ..., rows, columns).

        Returns:
            (B · windows, ..., area).
        """
        (down, across), (height, width) = self.across, self.window
        missing = (0, across * width - self.grid[1], 0, down * height - self.grid[0])
        rolled = pad(maps.roll((-self.shift[0], -self.shift[1]), dims=(-2, -1)), missing)
        split = rolled.unflatten(-1, (across, width)).unflatten(-3, (down, height))  # type: ignore[no-untyped-call]
        windows: Tensor = split.movedim((-4, -2), (1, 2)).flatten(-2).flatten(0, 2)
        return windows


def window_places(block: Any) -> Places:
    """Reads how a Swin block cuts its map.

    Args:
        block: timm's block of Swin or Swin V2.

    Returns:
        The places of its tokens.
    """
    return Places(tuple(block.input_resolution), tuple(block.window_size), tuple(block.shift_size))
