"""Optimiser and schedule of every task, and what of Lightning's would change them unseen."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from vpt.backbones.target_modules import layer_numbers
from vpt.errors import ConfigError, UnknownNameError, check_number
from vpt.models.classifier import AdaptedModel
from vpt.run_record import global_seed
from vpt.tasks.parallel import check_strategy, gathered, joint, shared_as

# They change model, batch or rate and tell nobody, so that the files and numbers of a run are not of one model.
_REFUSED: dict[type[L.Callback], str] = {
    callbacks.EMAWeightAveraging: "set model.ema_decay",
    callbacks.WeightAveraging: "average delta files instead (`vpt robustness soup`)",
    callbacks.StochasticWeightAveraging: "average delta files instead (`vpt robustness soup`)",
    callbacks.BatchSizeFinder: "set data.batch_size, and model.micro_batch where memory is short",
    callbacks.LearningRateFinder: "set model.base_lr, or search it (`vpt sweep`)",
    callbacks.GradientAccumulationScheduler: "set data.batch_size, and model.micro_batch where memory is short",
    callbacks.BaseFinetuning: "say what trains by the method (`--model` and configs/method)",
    callbacks.ModelPruning: "leave it out",
}


_RATES = ("base_lr", "weight_decay", "momentum", "warmup", "head_lr_scale", "layer_decay", "ema_decay")


def check_rates(options: Mapping[str, Any]) -> None:
    """Refuses, by a ConfigError, rates of a `TuningTask` that are out of range, and an optimiser that is none."""
    if options["optimizer"] not in ("sgd", "adamw"):
        raise UnknownNameError("optimizer", options["optimizer"], ("sgd", "adamw"))
    if options["micro_batch"] is not None:
        check_number("micro_batch", options["micro_batch"], 1, whole=True)
    for name in _RATES:
        check_number(name, options[name], 0, 1e38)  # of single precision
    base, warmup, momentum = (options[name] for name in ("base_lr", "warmup", "momentum"))
    if not warmup < 1 or not momentum < 1 or not base > 0:
        raise ConfigError(
            f"warmup and momentum lie in [0, 1) and base_lr is positive, got {warmup}, {momentum} and {base}."
        )
    head, decay, ema = (options[name] for name in ("head_lr_scale", "layer_decay", "ema_decay"))
    if not head > 0 or not 0 < decay <= 1 or not ema < 1:
        raise ConfigError(
            "head_lr_scale is positive, layer_decay lies in (0, 1] and ema_decay in [0, 1), got "
            f"{head}, {decay} and {ema}."
        )


def scheduled_optimizer(
    parameters: Sequence[nn.Parameter],
    options: Mapping[str, Any],
    trainer: L.Trainer,
    scales: Mapping[nn.Parameter, float] | None = None,
) -> OptimizerLRScheduler:
    """Builds an optimiser that decays tensors of two or more dimensions only, and its schedule per step.

    Args:
        parameters: What is trained.
        options: ``optimizer``, ``base_lr``, ``weight_decay``, ``momentum`` and ``warmup``, as of a `TuningTask`.
        trainer: Says how many steps there are, and the `global_batch`: the learning rate is base_lr · images / 256.
        scales: Multiples of the learning rate, by parameter; 1 for those that it lacks.

    Returns:
        What Lightning expects; the optimiser has two groups of each rate: decayed (prompts and weights) and not
        (biases, norms).

    Raises:
        ConfigError: Nothing says how many steps there are.
    """
    batch, steps = global_batch(trainer), trainer.estimated_stepping_batches
    if steps == math.inf:
        raise ConfigError(
            "The schedule of the learning rate needs an end: give trainer.max_epochs or trainer.max_steps "
            "(trainer.max_time may stop it earlier)."
        )
    steps = max(1, int(steps))
    rate = options["base_lr"] * batch / 256
    found: dict[tuple[bool, float], list[nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}
    for each in parameters:
        found.setdefault((each.ndim >= 2, (scales or {}).get(each, 1.0)), []).append(each)
    groups = [
        {"params": own, "weight_decay": options["weight_decay"] if decayed else 0.0, "lr": scale * rate}
        for (decayed, scale), own in found.items()
    ]
    optimizer: torch.optim.Optimizer
    if options["optimizer"] == "sgd":
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=options["momentum"])
    else:
        optimizer = torch.optim.AdamW(groups, lr=rate)
    schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, steps, options["warmup"]))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def rate_scales(model: AdaptedModel, options: Mapping[str, Any]) -> dict[nn.Parameter, float]:
    """Multiples of the learning rate by parameter, where they are not 1.

    ``head_lr_scale``, ``layer_decay`` and the deltas (`DeltaPart.rate_scales`) say so.

    A ConfigError where one of them has no effect: `base_lr` is the rate of a head alone, a frozen backbone has none.
    """
    head, decay, backbone = options["head_lr_scale"], options["layer_decay"], model.backbone
    own = set(model.head.parameters())
    scales = {each: scale for part in model.parts() for each, scale in part.rate_scales().items()}
    if head != 1 and not any(each.requires_grad for each in model.parameters() if each not in own):
        raise ConfigError(f"head_lr_scale is {head}, but nothing trains besides the head: set base_lr.")
    if decay == 1:
        return scales | (dict.fromkeys(own, head) if head != 1 else {})
    if not backbone.tuned:
        raise ConfigError(
            f"layer_decay is {decay}, but the layers of the backbone are not fine-tuned: it goes with FineTuning, and "
            "with SegmentationTask where `full` is true."
        )
    numbers, last = layer_numbers(backbone)
    scales |= {each: decay ** (last - numbers[name]) for name, each in backbone.model.named_parameters()}
    return scales | dict.fromkeys(own, head)


class WeightAverage(L.Callback):
    """Keeps an exponential moving average of what is trained, and has it in the model outside the training steps.

    So validation, checkpoints, delta file and all other callbacks see the average; its own state are the weights that
    the optimiser moves. After step n the average is a · average + (1 - a) · weights with a = min(decay, (1 + n) / (10 +
    n)), as TensorFlow's ExponentialMovingAverage: a short training is not an average of its start.
    """

    def __init__(self, decay: float) -> None:
        """Starts with the weights that the model has; decay in (0, 1)."""
        self.decay = decay
        self._weights: dict[str, Tensor] = {}
        self._average: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """The weights that the optimiser moves."""
        return {"weights": gathered(self._weights)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from them."""
        self._weights = state_dict["weights"]

    @torch.no_grad()
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Puts the weights in place of the average."""
        for name, tensor in _averaged(pl_module):
            self._average[name] = tensor.clone()
            tensor.copy_(shared_as(self._weights.setdefault(name, self._average[name]), tensor))

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Moves the average, and puts it in place of the weights."""
        decay = min(self.decay, (1 + trainer.global_step) / (10 + trainer.global_step))
        for name, tensor in _averaged(pl_module):
            self._weights[name] = tensor.clone()
            tensor.copy_(self._average[name].lerp(tensor, 1 - decay))


class TrainingCurves(L.Callback):
    """Logs, as often as the loss, the norm of the gradient and the curves of the deltas (`DeltaPart.curves`).

    ``gradient/delta``, ``gradient/head`` and ``gradient/backbone`` are norms over all that trains of each, before it is
    clipped. Loggers get them alone: they are no metrics of a run.
    """

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Logs them where the loss of this step is logged."""
        if (trainer.global_step + 1) % max(1, cast("Any", trainer).log_every_n_steps) or not trainer.loggers:
            return
        model = cast("AdaptedModel", cast("Any", pl_module).model)
        gradients: dict[str, list[Tensor]] = {}
        for name, each in model.named_parameters():
            if each.grad is not None:
                gradients.setdefault(name.partition(".")[0], []).append(each.grad)
        curves = {f"gradient/{room}": nn.utils.get_total_norm(found) for room, found in gradients.items()}
        for index, part in enumerate(model.parts()):
            several = f"{index}/" if len(model.parts()) > 1 else ""
            curves |= {f"{several}{name}": value for name, value in part.curves().items()}
        values = {name: float(joint(value)) for name, value in curves.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)


def _averaged(task: Any) -> Iterator[tuple[str, Tensor]]:
    """What trains, and the statistics of batch norms that train."""
    for name, tensor in task.model.owned().items():
        if tensor.is_floating_point() and (tensor.requires_grad or not isinstance(tensor, nn.Parameter)):
            yield name, tensor


def global_batch(trainer: L.Trainer) -> int:
    """Images of a step of the optimiser, on all devices and over all batches that are accumulated.

    Of several loaders that give a batch each to every step, for losses of which the mean is taken, the largest batch
    counts. A ConfigError where no training loader has a batch_size.
    """
    trainer.fit_loop.setup_data()
    loaders: Any = trainer.train_dataloader
    several = list(loaders.values()) if isinstance(loaders, dict) else [loaders]
    found: list[Any] = [getattr(each, "batch_size", None) for each in several]
    if None in found or not found:
        raise ConfigError("There is no training loader with a batch_size, from which the learning rate is computed.")
    return int(max(found)) * trainer.world_size * trainer.accumulate_grad_batches


def warmup_cosine(step: int, steps: int, warmup: float) -> float:
    """The factor in (0, 1] on the learning rate: linear warm-up, then a cosine to zero.

    Args:
        step: Steps done so far, from 0; the first of a warm-up of w steps gets 1/w, not 0.
        steps: All steps, at least 1.
        warmup: Share of them that warm up, in [0, 1).
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, steps - rising))))


def check_trainer(trainer: L.Trainer) -> None:
    """Refuses what would train another model than the record says.

    A ConfigError where batches are accumulated, a model is spread over processes, or a callback of Lightning's changes
    model, batch or rate.
    """
    check_strategy(trainer)
    if (batches := trainer.accumulate_grad_batches) != 1:
        raise ConfigError(
            f"trainer.accumulate_grad_batches is {batches}: Lightning takes the mean of batches, not of their images, "
            "and at the end of an epoch a part of it. Set data.batch_size to the images of a whole step and "
            "model.micro_batch to those in memory at once, which is exact."
        )
    for callback in cast("Any", trainer).callbacks:
        for kind, remedy in _REFUSED.items():
            if isinstance(callback, kind):
                raise ConfigError(
                    f"{type(callback).__name__} changes what is trained, and no record says so: {remedy}."
                )
        if isinstance(callback, callbacks.Timer) and callback.time_remaining() == 0:
            raise ConfigError("trainer.max_time is over at once, so that nothing would be trained: give more.")
        watched = getattr(callback, "monitor", None)
        needs = isinstance(callback, callbacks.EarlyStopping) or watched is not None
        if needs and not str(watched).startswith(("train/", "val/", "trained/")):
            raise ConfigError(
                f"{type(callback).__name__} watches {watched}, which is not measured: its monitor may be val/acc, "
                "val/loss or train/loss."
            )


def check_monitors(trainer: L.Trainer, measured: Collection[str], why_none: str = "") -> None:
    """Refuses, by an UnknownNameError, a callback that watches what is not `measured` on validation images.

    By a ConfigError where nothing is, which says `why_none`.
    """
    for callback in cast("Any", trainer).callbacks:
        watched = str(getattr(callback, "monitor", None))
        if watched.startswith("val/") and watched not in measured:
            if why_none:
                raise ConfigError(f"{type(callback).__name__} watches {watched}, which is not measured, {why_none}.")
            raise UnknownNameError(f"metric that {type(callback).__name__} watches", watched, measured)


def seed_epoch(module: L.LightningModule) -> None:
    """Makes random numbers follow from the run's seed, if it has one, epoch and process.

    A resumed run thus draws what an undisturbed one does.
    """
    if (seed := global_seed()) is not None:
        own = np.random.SeedSequence([seed, module.current_epoch, module.global_rank])
        torch.manual_seed(int(own.generate_state(1)[0]))
