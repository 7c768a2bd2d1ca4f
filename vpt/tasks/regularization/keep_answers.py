"""Answers kept on perturbed images: a regularisation in function space (arXiv 2509.05328)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

from vpt.data.corruptions import BASIC, SMALLEST, can_corrupt, corrupt
from vpt.errors import ConfigError, check_number
from vpt.models.classifier import TunedModel
from vpt.tasks.regularization.second_loss import SecondLoss, Seen, State


@dataclass(frozen=True)
class KeepAnswers(SecondLoss):
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

    def start(self, model: TunedModel, data: Any) -> State:
        """The head that training starts from."""
        return {name: tensor.detach().clone() for name, tensor in model.head.state_dict().items()}

    def loss(
        self, model: TunedModel, state: State, batch: Mapping[str, Tensor], logits: Tensor, place: str, seen: Seen
    ) -> Tensor:
        """See `SecondLoss`; indices and the place seed corruptions."""
        names = [f"{place}/{int(index)}" for index in batch["index"]]
        images = batch["image"].permute(0, 2, 3, 1).cpu().numpy()
        copies = [
            corrupt(image, BASIC[crc32(name.encode()) % len(BASIC)], self.severity, name)
            for image, name in zip(images, names, strict=True)
        ]
        perturbed = torch.from_numpy(np.stack(copies)).permute(0, 3, 1, 2).contiguous().to(batch["image"].device)
        strength = model.strength
        try:
            model.set_strength(0.0)
            with torch.no_grad():
                weight, bias = (state[name].to(model.head.weight) for name in ("weight", "bias"))
                before = nn.functional.linear(model.encode(perturbed), weight, bias).float().log_softmax(dim=1)
        finally:
            model.set_strength(strength)
        now = model(perturbed).float().log_softmax(dim=1)
        return self.rate * nn.functional.kl_div(now, before, reduction="batchmean", log_target=True)
