"""What every delta is made of: a module of trained tensors that can be put on a backbone and taken off again."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from vpt.errors import ConfigError

READOUT = sys.maxsize
"""The place behind all blocks, as an answer of `DeltaPart.first_block`."""


class DeltaPart(nn.Module, ABC):
    """One kind of change to a frozen backbone.

    Its parameters belong to it, never to the backbone; the constructor takes the backbone only to read sizes from it.

    Attributes:
        taxonomy: Its class in Delta Tuning (Ding et al., Nature Machine Intelligence 2023): new parts, chosen
            parameters, or parameters written in another form.
    """

    taxonomy: ClassVar[Literal["addition", "specification", "reparameterisation"]]

    def __init__(self) -> None:
        """Starts at full strength, attached to nothing."""
        super().__init__()
        self._strength = 1.0

    @abstractmethod
    def attach(self) -> None:
        """Puts the change on the backbone."""

    @abstractmethod
    def detach(self) -> None:
        """Takes the change off; the backbone is bit for bit what it was."""

    @abstractmethod
    def expected_parameters(self) -> int:
        """The number of trained parameters by the method's formula."""

    def first_block(self) -> int:
        """How many blocks lie before everything that it changes: 0 unless it says more, `READOUT` for all of them."""
        return 0

    def folded(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a delta file keeps: a form without what only training needs.

        Returns:
            The arguments that change in that form, and its tensors by name.
        """
        return {}, dict(self.named_parameters())

    def _strengthened(self) -> None:
        """Called after the strength has changed."""

    @property
    def strength(self) -> float:
        """α in [0, 1]: 1 is the tuned model exactly, 0 the bare backbone exactly."""
        return self._strength

    @strength.setter
    def strength(self, alpha: float) -> None:
        if not 0.0 <= alpha <= 1.0:
            raise ConfigError(f"The strength of a delta lies between 0 (backbone) and 1 (tuned), got {alpha}.")
        self._strength = float(alpha)
        self._strengthened()
