"""Decay towards the start instead of towards zero.

L2-SP: Li et al., "Explicit inductive bias for transfer learning with convolutional networks", ICML 2018, section 3,
here decoupled from the gradient as AdamW's weight decay is. SPD: Tian et al., "Rethinking weight decay for robust
fine-tuning of foundation models", NeurIPS 2024, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import lightning as L
import torch
from torch import Tensor, nn

from vpt.argument_types import Options
from vpt.errors import ConfigError, UnknownNameError, check_number
from vpt.tasks.parallel import gathered, joint, shared_as


@dataclass(frozen=True)
class StartDecay(Options):
    """How what is trained is kept near its start.

    Attributes:
        rule: ``l2``: after each step θ moves by η · rate · (θ₀ − θ), η the learning rate. ``spd``: only tensors whose
            gradient g and change disagree, g · (θ − θ₀) > 0, and only as far as the step has taken them away: by rate ·
            r · (θ₀ − θ) with r = 1 − ‖θ before − θ₀‖ / ‖θ − θ₀‖, at least 0.
        rate: Positive; at most 1 with ``spd``, where 1 undoes the step's growth.
        head: Whether the head has a start, too: with `init_head`.
    """

    rule: Literal["l2", "spd"] = "spd"
    rate: float = 1.0
    head: bool = False

    def __post_init__(self) -> None:
        """Refuses what is out of range."""
        if self.rule not in ("l2", "spd"):
            raise UnknownNameError("rule of start_decay", self.rule, ("l2", "spd"))
        check_number("rate of start_decay", self.rate, 0, 1 if self.rule == "spd" else 1e6)
        if self.rate == 0:
            raise ConfigError("rate of start_decay must be positive: 0 would keep nothing, leave start_decay out.")


class DecayToStart(L.Callback):
    """Does what `StartDecay` says behind each step of the optimiser; its state are the tensors at the start."""

    def __init__(self, decay: StartDecay) -> None:
        """Knows no start yet."""
        self.decay = decay
        self._start: dict[str, Tensor] = {}
        self._before: dict[str, tuple[Tensor, float]] = {}

    def state_dict(self) -> dict[str, Any]:
        """The start."""
        return {"start": gathered(self._start)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with that of the run, not with where it was stopped."""
        self._start = state_dict["start"]

    def _tensors(self, pl_module: L.LightningModule) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in cast("nn.Module", cast("Any", pl_module).model).named_parameters():
            if parameter.requires_grad and (self.decay.head or not name.startswith("head.")):
                yield name, parameter

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses, by a ConfigError, a training of nothing that has a start."""
        if stage == "fit" and next(self._tensors(pl_module), None) is None:
            raise ConfigError("start_decay keeps nothing near its start: nothing but the head trains. Leave it out.")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps the start, once deltas and head have their initial values."""
        for name, parameter in self._tensors(pl_module):
            kept = self._start.get(name, parameter.detach().clone())
            self._start[name] = shared_as(kept, parameter)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Notes which tensors are to decay, and how far they are from their start; clipping changes no sign."""
        self._before = {}
        rates = {id(p): group["lr"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
        for name, parameter in self._tensors(pl_module):
            if parameter.grad is None:
                continue
            change = parameter - self._start[name]
            if self.decay.rule == "l2" or bool(joint((parameter.grad * change).sum()) > 0):
                self._before[name] = joint(change.norm()), rates[id(parameter)]

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Moves them towards their start."""
        for name, parameter in self._tensors(pl_module):
            if name not in self._before:
                continue
            (before, rate), change = self._before[name], parameter - self._start[name]
            share: float | Tensor = min(1.0, rate * self.decay.rate)
            if self.decay.rule == "spd":
                grown = 1 - before / joint(change.norm()).clamp_min(torch.finfo(change.dtype).tiny)
                share = self.decay.rate * grown.clamp(0, 1)
            parameter.sub_(share * change)
        self._before = {}
