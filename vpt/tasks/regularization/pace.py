"""PACE: the same answers under two draws of noise on what a delta adds (Ni et al., NeurIPS 2024, arXiv 2409.17137)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vpt.backbones.strength import by_place
from vpt.backbones.target_modules import layer_numbers
from vpt.errors import ConfigError, check_number
from vpt.models.classifier import TunedModel
from vpt.tasks.regularization.second_loss import SecondLoss, Seen, State


@dataclass(frozen=True)
class Pace(SecondLoss):
    """A second loss: rate · mean over images of ‖f₁(x) - f₂(x)‖², f₁ and f₂ the logits of two passes under noise.

    Where a layer gives h₀ and a delta adds Δh to that, both passes compute h₀ + z ⊙ Δh, with z ~ N(1, σ²) of their own
    for each image and channel, the same for all its tokens. The logits have noise as well, with h₀ = 0. The loss of the
    labels is that of f₁. Section 3 and figure 2 of the paper; shapes, the head and σ by layer are those of its released
    code, where on a Swin, too, what attention computes by windows has noise for each window.

    Attributes:
        rate: λ of the paper, positive.
        sigma: σ of the first layer with noise, positive; it falls linearly to that of the head, the last, by the same
            step with which it would be 0 behind the head.
        spare_first: Whether the first block is without noise, as in the code for ViT-B and not for Swin-B.
    """

    rate: float = 1.0
    sigma: float = 1.0
    spare_first: bool = True

    def __post_init__(self) -> None:
        """Refuses what is out of range."""
        for name, value in (("rate", self.rate), ("sigma", self.sigma)):
            check_number(f"{name} of pace", value, 0, 1e6)
            if value == 0:
                raise ConfigError(f"{name} of pace must be positive: 0 would change nothing, leave pace out.")

    def check(self, options: Mapping[str, Any], model: TunedModel, data: Any) -> None:
        """Refuses, by a ConfigError, deltas that it has no meaning for, and split batches.

        An UnsupportedBackboneError where timm tells no layers.
        """
        specs = [] if model.delta is None else model.delta.specs
        others = [spec["name"] for spec, part in zip(specs, model.parts(), strict=True) if not part.adds_to()]
        if others or not specs:
            raise ConfigError(
                "pace puts noise on what a delta adds to the outputs of layers, as adapters and LoRA of linear layers "
                f"do and {others[0] if others else 'a model without a delta'} does not: leave one of them out."
            )
        if options["micro_batch"]:
            raise ConfigError("pace compares two passes of a whole batch: leave micro_batch out.")
        if options["compile"]:
            raise ConfigError("pace changes layers in each step, which would be compiled again: leave compile out.")
        self.sigmas(model)

    def sigmas(self, model: TunedModel) -> dict[nn.Module, float]:
        """σ of each layer that deltas add to, and of the head."""
        last = layer_numbers(model.backbone)[1]
        first = 2 if self.spare_first else 1
        numbers = [max(layer, 1) for layer in range(last + 1)]  # the embeddings have that of the first block
        falling = [0.0 if layer < first else self.sigma * (last + 1 - layer) / (last + 1 - first) for layer in numbers]
        layers = {layer: layer for part in model.parts() for layer in part.adds_to()}
        return {**by_place(tuple(falling), layers, model.backbone), model.head: falling[-1]}

    @contextmanager
    def around(self, model: TunedModel) -> Iterator[Seen]:
        """Noise on what is computed meanwhile, drawn anew in each pass."""
        with ExitStack() as hooked:
            for layer, sigma in self.sigmas(model).items():
                if sigma == 0.0:
                    continue
                plain: list[Tensor] = []
                if layer is not model.head:  # before the hooks of deltas
                    keep = layer.register_forward_hook(partial(_keep, plain), prepend=True)
                    hooked.callback(keep.remove)
                hooked.callback(layer.register_forward_hook(partial(_perturb, plain, sigma)).remove)
            yield {}

    def loss(
        self, model: TunedModel, state: State, batch: Mapping[str, Tensor], logits: Tensor, place: str, seen: Seen
    ) -> Tensor:
        """See `SecondLoss`; the logits are those of the first pass."""
        with self.around(model):
            again = model(batch["image"])
        return self.rate * nn.functional.mse_loss(logits, again, reduction="sum") / len(logits)


def _keep(plain: list[Tensor], layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
    plain.append(out)


def _perturb(plain: list[Tensor], sigma: float, layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """From what the layer gives, kept in `plain` if it gives anything, to h₀ + z ⊙ (h - h₀)."""
    channels = 1 if isinstance(layer, nn.Conv2d) else out.ndim - 1
    shape = [size if dim in (0, channels) else 1 for dim, size in enumerate(out.shape)]
    noise = 1 + sigma * torch.randn(shape, dtype=out.dtype, device=out.device)
    return torch.lerp(plain.pop(), out, noise) if plain else out * noise
