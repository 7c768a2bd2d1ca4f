"""What keeps a trained model near the pretrained one: decay towards the start, or answers kept under corruption.

L2-SP: Li et al., "Explicit inductive bias for transfer learning with convolutional networks", ICML 2018, section 3,
here decoupled from the gradient as AdamW's weight decay is. SPD: Tian et al., "Rethinking weight decay for robust
fine-tuning of foundation models", NeurIPS 2024, algorithm 1. Answers that are kept on perturbed images are a
regularisation in function space (arXiv 2509.05328).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast
from zlib import crc32

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from vpt.argument_types import Options
from vpt.data.corruptions import BASIC, SMALLEST, can_corrupt, corrupt
from vpt.errors import ConfigError, UnknownNameError, check_number
from vpt.models.classifier import TunedModel


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
        return {"start": self._start}

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
            self._start[name] = kept.to(parameter.device)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Notes which tensors are to decay, and how far they are from their start; clipping changes no sign."""
        self._before = {}
        rates = {id(p): group["lr"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
        for name, parameter in self._tensors(pl_module):
            if parameter.grad is None:
                continue
            change = parameter - self._start[name]
            if self.decay.rule == "l2" or bool((parameter.grad * change).sum() > 0):
                self._before[name] = change.norm(), rates[id(parameter)]

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Moves them towards their start."""
        for name, parameter in self._tensors(pl_module):
            if name not in self._before:
                continue
            (before, rate), change = self._before[name], parameter - self._start[name]
            share: float | Tensor = min(1.0, rate * self.decay.rate)
            if self.decay.rule == "spd":
                grown = 1 - before / change.norm().clamp_min(torch.finfo(change.dtype).tiny)
                share = self.decay.rate * grown.clamp(0, 1)
            parameter.sub_(share * change)
        self._before = {}


@dataclass(frozen=True)
class KeepAnswers(Options):
    """A second loss: rate · KL(p₀ ‖ p) of the untuned model's answers p₀ and the present ones on corrupted copies.

    The untuned model is the backbone at strength 0 with the head that training starts from. Each image of a batch is
    copied under one of five common corruptions.

    Attributes:
        rate: Positive.
        severity: Of the corruptions, from 1 to 5.
    """

    rate: float = 1.0
    severity: int = 3

    def __post_init__(self) -> None:
        """Refuses what is out of range."""
        check_number("rate of keep_answers", self.rate, 0, 1e6)
        check_number("severity of keep_answers", self.severity, 1, 5, whole=True)
        if self.rate == 0:
            raise ConfigError("rate of keep_answers must be positive: 0 would keep nothing, leave keep_answers out.")

    def check(self, options: Mapping[str, Any], model: TunedModel, data: Any) -> None:
        """Refuses, by a ConfigError, tasks and images that it has no meaning for."""
        if options["init_head"] is None or model.delta is None:
            raise ConfigError(
                "keep_answers keeps those of an untuned model, which needs init_head (`probe`, or a file) and a delta: "
                "instead of FineTuning take DeltaTuning with the delta `full`."
            )
        if options["init_delta"] is not None:
            raise ConfigError(
                "keep_answers keeps those of the frozen backbone: drop it, or init_delta, which leaves it."
            )
        if others := [name for name in ("micro_batch", "mixup", "cutmix") if options[name]]:
            raise ConfigError(f"keep_answers looks at whole batches of plain images: leave {others[0]} out.")
        if not hasattr(data, "preset") or not can_corrupt(data):
            raise ConfigError(f"keep_answers corrupts 8-bit colours of at least {SMALLEST} pixels: leave it out.")

    def loss(self, model: TunedModel, start: tuple[Tensor, Tensor], batch: Mapping[str, Tensor], place: str) -> Tensor:
        """The second loss, a scalar, of a batch of ``image`` uint8 (B, 3, H, W) and ``index`` (B,).

        `start` are weight and bias of the head that training starts from; indices and the `place` seed corruptions.
        """
        names = [f"{place}/{int(index)}" for index in batch["index"]]
        images = batch["image"].permute(0, 2, 3, 1).cpu().numpy()
        copies = [
            corrupt(image, BASIC[crc32(name.encode()) % len(BASIC)], self.severity, name)
            for image, name in zip(images, names, strict=True)
        ]
        seen = torch.from_numpy(np.stack(copies)).permute(0, 3, 1, 2).contiguous().to(batch["image"].device)
        strength = model.strength
        try:
            model.set_strength(0.0)
            with torch.no_grad():
                weight, bias = (part.to(model.head.weight) for part in start)
                before = nn.functional.linear(model.encode(seen), weight, bias).float().log_softmax(dim=1)
        finally:
            model.set_strength(strength)
        now = model(seen).float().log_softmax(dim=1)
        return self.rate * nn.functional.kl_div(now, before, reduction="batchmean", log_target=True)
