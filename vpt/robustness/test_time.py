"""Adapting to unlabelled test images while they are answered; never mixed with numbers that saw no test image.

Images come in batches, in an order that follows from a seed; each test set begins with the model as it was trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vpt.data import ImageDataModule, ImageDataset
from vpt.deltas.base import DeltaPart
from vpt.deltas.composition import Delta
from vpt.errors import ConfigError, UnknownNameError, check_number
from vpt.export.onnx_torch import fold
from vpt.models import TunedModel
from vpt.models.activations import Activations
from vpt.robustness.evaluation_sets import EvaluationSet, subset

Adaptation = Literal["entropy", "foa", "fozo"]
LARGEST_SEED = 2**32 - 1  # of cmaes
SOURCE_IMAGES = 200
"""Training images that the activation statistics are of."""


class Adapter(Protocol):
    """A `model` that changes with what it answers."""

    model: TunedModel

    def reset(self) -> None:
        """Becomes what was trained."""

    def answer(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of a batch of images, after which, or before which, it adapts."""

    @property
    def protocol(self) -> dict[str, Any]:
        """Which method with which options."""


def adapter(
    method: str, model: TunedModel, data: ImageDataModule, seed: int, source: Activations | None = None
) -> Adapter:
    """The method by name, on a copy of a model in eval mode.

    What it needs to know of training images is what `source` says, or is measured where that is None. An
    UnknownNameError where it does not exist, a ConfigError or UnsupportedBackboneError where the model lacks what it
    changes.
    """
    check_number("seed", seed, 0, LARGEST_SEED, whole=True)
    if method not in METHODS:
        raise UnknownNameError("test-time adaptation", method, METHODS)
    return METHODS[method](model, data, seed, source)


def entropies(logits: Tensor) -> Tensor:
    """Entropy in nats of the softmax of each row, (N,)."""
    return -(logits.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1)


class Entropy:
    """Entropy minimisation (Wang et al., "Tent", ICLR 2021): a step of SGD on all norms' scales and shifts a batch.

    The answers are those before the step. Keys and values of prompts stay what they are.
    """

    rate: ClassVar[float] = 1e-3
    momentum: ClassVar[float] = 0.9

    def __init__(self, model: TunedModel, data: ImageDataModule, seed: int, source: Activations | None = None) -> None:
        """Finds the norms; a ConfigError where there are none."""
        self.model = fold(model)
        norms = nn.LayerNorm | nn.GroupNorm | nn.BatchNorm2d | nn.RMSNorm
        found = [module for module in self.model.backbone.model.modules() if isinstance(module, norms)]
        self._trained = [p for module in found for p in module.parameters(recurse=False)]
        if not self._trained:
            raise ConfigError(f"{model.backbone.name} has no norms with scales, which entropy minimisation adapts.")
        for parameter in self._trained:
            parameter.requires_grad_()
        self._start = [parameter.detach().clone() for parameter in self._trained]
        self.reset()

    @property
    def protocol(self) -> dict[str, Any]:
        """See `Adapter`."""
        return {"method": "entropy", "rate": self.rate, "momentum": self.momentum}

    def reset(self) -> None:
        """See `Adapter`."""
        with torch.no_grad():
            for parameter, start in zip(self._trained, self._start, strict=True):
                parameter.copy_(start)
        self._optimizer = torch.optim.SGD(self._trained, lr=self.rate, momentum=self.momentum)

    def answer(self, images: Tensor) -> Tensor:
        """See `Adapter`."""
        with torch.enable_grad():
            logits: Tensor = self.model(images).float()
            self._optimizer.zero_grad()
            entropies(logits).mean().backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
        return logits.detach()


@dataclass
class _Statistics:
    """Mean and standard deviation over images of the features of each block, (blocks, dim)."""

    mean: Tensor
    std: Tensor


class _Prompts:
    """What adapts prompts before the first block of a vision transformer by forward passes, as FOA does.

    The loss of a batch of B images is Σ entropy + 0.4 · B / 64 · Σ (squared distances of means and deviations of the
    blocks' class tokens to those of training images), as in both released codes.
    """

    prompts: ClassVar[int] = 3
    weight: ClassVar[float] = 0.4
    momentum: ClassVar[float] = 0.1

    def __init__(self, model: TunedModel, data: ImageDataModule, seed: int, source: Activations | None = None) -> None:
        """Measures training images, without prompts, unless their `source` is known."""
        self._seed = seed
        self.model = fold(model)
        backbone = self.model.backbone
        if backbone.layout.windowed or any(cast("DeltaPart", part).merged for part in backbone.attached):
            raise ConfigError(
                f"FOA and FOZO put prompts before the first block of a vision transformer, which {backbone.name} with "
                "this delta has no place for: adapt by entropy."
            )
        self._seen: list[Tensor] = []
        for block in backbone.layout.blocks:
            block.register_forward_hook(self._note)
        self._prefix = backbone.layout.num_prefix
        self._carried = source
        self.statistics = self._measure_source(data, seed) if source is None else source.tensors
        mean, std, self._pooled = (self.statistics[name].to(backbone.mean) for name in ("mean", "std", "pooled"))
        self._source = _Statistics(mean, std)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._delta = Delta(backbone, [{"name": "prompt", "num_tokens": self.prompts, "deep": False}])
        self._delta.attach()
        self._tokens = next(self._delta.parameters()).requires_grad_(False)
        self._start = self._tokens.clone()
        self._running: Tensor | None = None
        self.reset()

    @torch.no_grad()
    def _measure_source(self, data: ImageDataModule, seed: int) -> Mapping[str, Tensor]:
        """Statistics of `SOURCE_IMAGES` training images, drawn by class, as `Activations` keeps them."""
        dataset = data.split("train")
        rows = subset(dataset.labels, SOURCE_IMAGES, seed)
        images = torch.stack([dataset[int(row)]["image"] for row in rows])
        device = self.model.backbone.mean.device
        passes = [self._features(batch.to(device)) for batch in torch.split(images, 50)]
        blocks = _measured(torch.cat([each[1] for each in passes], dim=1))
        pooled = torch.cat([each[0] for each in passes]).mean(dim=0)
        return {"mean": blocks.mean, "std": blocks.std, "pooled": pooled}

    @property
    def protocol(self) -> dict[str, Any]:
        """See `Adapter`."""
        own = {"prompts": self.prompts, "weight": self.weight, "source_images": SOURCE_IMAGES}
        if self._carried is None:
            return own
        about = {key: value for key, value in self._carried.about.items() if key != "model"}
        return own | {"source_images": about["images"], "source": about}

    def reset(self) -> None:
        """See `Adapter`."""
        self._running = None
        with torch.no_grad():
            self._tokens.copy_(self._start)

    def _note(self, block: nn.Module, args: Any, out: Tensor) -> None:
        patches = out[:, -math.prod(self.model.backbone.layout.grid) :]  # not the drawn prompts
        self._seen.append(out[:, 0] if self._prefix else patches.mean(dim=1))

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features (B, dim), and those of the blocks (blocks, B, dim)."""
        self._seen = []
        pooled = self.model.encode(images).float()
        return pooled, torch.stack([each.float() for each in self._seen])

    def _measure(self, images: Tensor, shift: Callable[[Tensor], Tensor]) -> tuple[float, Tensor, Tensor]:
        """Loss, logits and the mean of the pooled features of a batch with the present prompts."""
        pooled, blocks = self._features(images)
        own = pooled.mean(dim=0)
        logits = self.model.classify(pooled + shift(own)).float()
        found = _measured(blocks)
        apart = (found.mean - self._source.mean).square().sum() + (found.std - self._source.std).square().sum()
        loss = float(entropies(logits).sum() + self.weight * len(images) / 64 * apart)
        return loss, logits, own

    def _remembered(self, own: Tensor) -> Tensor:
        """The running mean of pooled features with that of one more batch."""
        return own if self._running is None else torch.lerp(self._running, own, self.momentum)


class Foa(_Prompts):
    """FOA, prompts by CMA-ES (Niu et al., "Test-time model adaptation with only forward passes", ICML 2024).

    For each batch CMA-ES draws prompts (equation 5), and the answers are those of the best; the pooled features are
    shifted by the distance of their running mean, this batch included, to that of training images (equation 8).
    """

    sigma: ClassVar[float] = 1.0

    def __init__(self, model: TunedModel, data: ImageDataModule, seed: int, source: Activations | None = None) -> None:
        """Measures training images; a ConfigError where cmaes is not installed."""
        try:
            import cmaes
        except ImportError as error:
            raise ConfigError("FOA needs cmaes: pip install 'vpt[strengths]'.") from error
        self._cma = cmaes.CMA
        super().__init__(model, data, seed, source)

    @property
    def protocol(self) -> dict[str, Any]:
        """See `Adapter`."""
        own = {"method": "foa", "population": self._search.population_size, "sigma": self.sigma}
        return own | super().protocol

    def reset(self) -> None:
        """See `Adapter`."""
        super().reset()
        self._search = self._cma(mean=np.zeros(self._tokens.numel()), sigma=self.sigma, seed=self._seed)

    @torch.no_grad()
    def answer(self, images: Tensor) -> Tensor:
        """See `Adapter`."""
        tried = []
        for _ in range(self._search.population_size):
            drawn = self._search.ask()
            self._tokens.copy_(torch.from_numpy(drawn).view_as(self._tokens))
            tried.append((drawn, *self._measure(images, lambda own: self._pooled - self._remembered(own))))
        self._search.tell([(drawn, loss) for drawn, loss, _, _ in tried])
        _, _, logits, own = min(tried, key=lambda each: each[1])
        self._running = self._remembered(own)
        return logits


class Fozo(_Prompts):
    """FOZO, prompts by a zeroth-order gradient of two forward passes (Wang and Wang, CVPR 2026, algorithm 1).

    Prompts P ± ε·Z, Z normal, give the losses l± (equation 5), and the answers are those of the smaller; P moves by
    −η · (l₊ − l₋) / (2ε) · Z (equation 7). ε falls by a tenth a batch, to 0.2 at least, and is 0.5 again where the loss
    is 5 % above its moving average (equation 12). η, and the shift of features by their running mean before this batch,
    are those of the released code, which adds the means of both passes where here their mean is taken.
    """

    epsilon: ClassVar[tuple[float, float]] = (0.2, 0.5)
    decay: ClassVar[float] = 0.9
    threshold: ClassVar[float] = 1.05
    rate: ClassVar[tuple[float, float]] = (0.1, 3.0)
    first_rate: ClassVar[float] = 0.08

    @property
    def protocol(self) -> dict[str, Any]:
        """See `Adapter`."""
        own = {"method": "fozo", "epsilon": list(self.epsilon), "rate": list(self.rate), "decay": self.decay}
        return own | super().protocol

    def reset(self) -> None:
        """See `Adapter`."""
        super().reset()
        self._scale, self._step, self._average = self.epsilon[1], self.first_rate, 0.0
        self._random = torch.Generator().manual_seed(self._seed)
        self._batches = 0

    @torch.no_grad()
    def answer(self, images: Tensor) -> Tensor:
        """See `Adapter`."""
        own = self._tokens.clone()
        drawn = torch.randn(own.shape, generator=self._random).to(own)
        shift = torch.zeros_like(self._pooled) if self._running is None else self._pooled - self._running
        both = []
        for sign in (1.0, -1.0):
            self._tokens.copy_(own + sign * self._scale * drawn)
            both.append(self._measure(images, lambda _: shift))
        slope = (both[0][0] - both[1][0]) / (2 * self._scale)
        loss, logits, _ = min(both, key=lambda each: each[0])
        self._pace(loss)
        self._tokens.copy_(own - self._step * slope * drawn)
        self._running = self._remembered((both[0][2] + both[1][2]) / 2)
        return logits

    def _pace(self, loss: float) -> None:
        """Sets ε of the next batch and η of this one."""
        self._average = loss if self._batches == 0 else 0.9 * self._average + 0.1 * loss
        self._batches += 1
        low, high = self.epsilon
        if loss > self.threshold * self._average:
            self._scale, self._step = high, self.rate[0]
        else:
            self._scale = max(low, self._scale * self.decay)
            self._step = min(self.rate[1], max(self.rate[0], 0.7 * self._step + 0.1))


def _measured(blocks: Tensor) -> _Statistics:
    std, mean = torch.std_mean(blocks, dim=1, correction=min(1, blocks.shape[1] - 1))
    return _Statistics(mean, std)


METHODS: dict[str, Callable[[TunedModel, ImageDataModule, int, Activations | None], Adapter]] = {
    "entropy": Entropy,
    "foa": Foa,
    "fozo": Fozo,
}


def source_statistics(model: TunedModel, data: ImageDataModule, seed: int) -> Mapping[str, Tensor]:
    """What FOA and FOZO need to know of training images, as `Activations` keeps it; errors as of `adapter`."""
    return _Prompts(model, data, seed).statistics


@dataclass
class Stream:
    """What answers images, and in which order; a part of the protocol."""

    own: Adapter
    batch_size: int
    seed: int
    order: str = "shuffled"
    reset: str = "each set"

    def __post_init__(self) -> None:
        """Refuses, by a ConfigError, batches that have no statistics."""
        if self.batch_size < 2:
            raise ConfigError("Adapting at test time needs batches of several images: raise --batch-size.")

    @property
    def protocol(self) -> dict[str, Any]:
        """What a record says of it."""
        told = {"batch_size": self.batch_size, "seed": self.seed, "order": self.order, "reset": self.reset}
        return told | self.own.protocol

    def answers(
        self,
        dataset: ImageDataset,
        index: NDArray[np.int64],
        item: EvaluationSet,
        advance: Callable[[int], None],
    ) -> Tensor:
        """The logits of a set's images, (N, classes), in the order of their positions `index`."""
        own = self.own
        own.reset()
        order = np.random.default_rng(self.seed).permutation(len(index))
        found: list[Tensor] = []
        device = own.model.backbone.mean.device
        for start in range(0, len(order), self.batch_size):
            rows = [int(index[at]) for at in order[start : start + self.batch_size]]
            images = torch.stack([dataset[row]["image"] for row in rows])
            images = item.variant(images, [dataset.paths[row] for row in rows])
            found.append(own.answer(images.to(device)).cpu())
            advance(len(rows))
        logits = torch.cat(found)
        if not bool(logits.isfinite().all()):
            raise ConfigError(f"The answers to {item.name} are not finite: the adaptation diverged.")
        return logits[torch.from_numpy(np.argsort(order))]
