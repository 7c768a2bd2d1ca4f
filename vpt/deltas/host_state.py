"""Values of a delta that every step asks for: they stay in host memory, so that no step waits for a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class HostState(nn.Module):
    """Whole numbers that are part of a state dict, as a buffer is, but left where they are by ``.to()``.

    Attributes:
        values: The tensor (N,), in host memory; it is changed in place alone.
    """

    def __init__(self, values: Sequence[int], dtype: torch.dtype = torch.int64) -> None:
        """Begins with these."""
        super().__init__()
        self.values = torch.tensor(values, dtype=dtype, device="cpu")

    def get_extra_state(self) -> Tensor:
        """What a state dict has of it."""
        return self.values

    def set_extra_state(self, state: Tensor) -> None:
        """Takes what a state dict has."""
        self.values.copy_(state)
