"""Which precision a training step is faster in on a device, by a measurement of about a second."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vpt.experiments.profile import Run, interleaved, wait
from vpt.models.classifier import AdaptedModel

SECONDS = 1.0
"""What it takes about, in all."""
ROUNDS = 3
LEAST = 1.1
"""How many times as fast a step has to be in bfloat16: what is less may be noise, and its rounding is not free."""

Chosen = Literal["bf16-mixed", "32-true"]


@dataclass(frozen=True)
class Speed:
    """What was measured: seconds of a step in 32-true over those in bf16-mixed, with so many images."""

    speed_up: float
    images: int

    @property
    def precision(self) -> Chosen:
        """The one to train in."""
        return "bf16-mixed" if self.speed_up >= LEAST else "32-true"


def measure(model: AdaptedModel, batch: int, device: torch.device) -> Speed:
    """Measures forward and backward passes of a model, which goes to the device; nothing else of it changes.

    Of noise, in both precisions in turn, medians. Of as many images as a step of `batch` ≥ 1 has; of fewer, 1, 2, 4
    ..., where these would take much longer than `SECONDS`.
    """
    share, number, training = SECONDS / (2 * (ROUNDS + 1)), 1, model.training
    model.to(device).eval()  # no dropout, no statistics of batches
    with torch.random.fork_rng():
        try:
            while number < batch:
                if interleaved([_step(model, number, False)], 1)[0] > share:
                    break
                number = min(2 * number, batch)
            single, half = interleaved([_step(model, number, False), _step(model, number, True)], ROUNDS)
        finally:
            model.zero_grad(set_to_none=True)
            model.train(training)
    return Speed(single / half, number)


def _step(model: AdaptedModel, number: int, half: bool) -> Run:
    images: Tensor = model.backbone.random_images(number).to(model.backbone.mean.device)

    def run() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            outputs = model(images)
        outputs.float().square().mean().backward()
        wait(images)

    return run
