"""Moves prompts between layers at the start of epochs, as `vpt.deltas.prompts.relocation` says."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from vpt.deltas.prompts.allocation import Policy, state_of
from vpt.deltas.prompts.prompt import Prompt
from vpt.deltas.prompts.pruning import mask_gradients
from vpt.errors import ConfigError, VPTWarning
from vpt.run_record import global_seed
from vpt.tasks.parallel import joint_loss

if TYPE_CHECKING:
    from vpt.deltas.base import Shape
    from vpt.deltas.prompts.relocation import Assignment

_PRECISIONS = ("32-true", "64-true", "bf16-mixed")


def relocating(task: Any) -> list[L.Callback]:
    """What moves the prompts of a `TuningTask`, if any move; a ConfigError where it cannot train so."""
    found = [part for part in task.model.parts() if isinstance(part, Prompt) and part.assigned is not None]
    if found and task.trainer.state.fn == "fit":
        _check(task, len(found))
        warmup, epochs = cast("Assignment", found[0].assigned).options.warmup, task.trainer.max_epochs
        if epochs is not None and 0 < epochs <= warmup:
            text = f"relocate has a warmup of {warmup} epochs, and trainer.max_epochs is {epochs}: no prompt moves."
            warnings.warn(text, VPTWarning, stacklevel=2)
    return [Relocation(found[0])] if found else []


def _check(task: Any, prompts: int) -> None:
    if prompts > 1:
        raise ConfigError("One prompt of a delta can relocate: leave it out of the others.")
    unset = (None, 0, False)
    if given := [name for name in ("ema_decay", "start_decay", "compile") if task.hparams[name] not in unset]:
        raise ConfigError(f"Prompts that relocate have another place in each epoch: leave {' and '.join(given)} out.")
    if (precision := task.trainer.precision) not in _PRECISIONS:
        raise ConfigError(f"Prompts relocate by gradients that {precision} rounds away: take bf16-mixed or 32-true.")
    if getattr(task.trainer, "datamodule", None) is None:
        raise ConfigError("Prompts relocate by a pass over the training images of a data module: give one.")
    if task.trainer.overfit_batches:  # Lightning trains on the first images, unshuffled, and the pass would see others
        raise ConfigError(
            "Prompts relocate by a pass over shuffled images: take limit_train_batches, not overfit_batches."
        )


class Relocation(L.Callback):
    """At the start of each epoch behind the warm-up moves the prompt of the largest score, where that is positive.

    The score of a prompt is ∂L/∂ρ, with ρ = 1 a gate that multiplies it and L the training loss, as the mean over one
    pass over the training images. What is random follows from the run's seed and the epoch. Its state are the policy
    and the loss before the last move.
    """

    def __init__(self, prompts: Prompt) -> None:
        """Takes prompts with `relocate`, and begins with no policy."""
        self._prompts = prompts
        self._policy: Policy | None = None
        self._before: float | None = None
        self._loader: Any = None

    @property
    def _assigned(self) -> Assignment:
        return cast("Assignment", self._prompts.assigned)

    def state_dict(self) -> dict[str, Any]:
        """The policy, and the loss before a move that has no reward yet."""
        return {"policy": None if self._policy is None else self._policy.state_dict(), "before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with them."""
        self._before = state_dict["before"]
        if state_dict["policy"] is not None:
            self._policy = Policy(self._assigned.depth, torch.Generator())
            self._policy.load_state_dict(state_dict["policy"])

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rewards the last move, and makes the next one; what training draws is as without it."""
        if trainer.current_epoch < self._assigned.options.warmup:
            return
        device = pl_module.device
        seed = cast("int", trainer.strategy.broadcast(np.random.SeedSequence(global_seed()).entropy))
        own, common = (
            int(np.random.SeedSequence([seed, trainer.current_epoch, *place]).generate_state(1)[0])
            for place in ((trainer.global_rank, 1), (0, 2))
        )
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(own)
            scores, loss = self._scores(trainer, pl_module)
            self.move(scores, loss, torch.Generator().manual_seed(common))

    def move(self, scores: Tensor, loss: float, generator: torch.Generator) -> None:
        """Learns from the loss behind the last move, and moves the prompt of the largest score (N,), if positive."""
        assigned, worst = self._assigned, int(scores.argmax())
        self._policy = self._policy or Policy(assigned.depth, generator)
        if self._before is not None:
            self._policy.learn(self._before - loss - float(scores[worst]))
        self._before = None
        if float(scores[worst]) > 0:
            self._before = loss
            numbers, layers = assigned.numbers(), assigned.layers
            sums = torch.zeros(assigned.depth, dtype=scores.dtype).index_add(0, layers, scores).tolist()
            layer = self._policy.choose(state_of(sums, numbers, int(layers[worst])), generator)
            assigned.move(cast("Tensor", self._prompts.tokens), worst, layer)

    def _scores(self, trainer: L.Trainer, task: Any) -> tuple[Tensor, float]:
        """The score of each prompt, float64 (N,), and the training loss, as means over the batches of an epoch."""
        if self._loader is None:
            self._loader = cast("Any", trainer).datamodule.train_dataloader()
        if hasattr(self._loader.sampler, "set_epoch"):
            self._loader.sampler.set_epoch(trainer.current_epoch)
        sums: list[Tensor] = []  # of gates, in the order of their layers, and of losses; looked at when all are there
        batches = int(trainer.num_training_batches)
        rows = torch.cat([self._assigned.rows(layer) for layer in range(self._assigned.depth)])
        for index, batch in enumerate(islice(self._loader, batches)):
            batch = trainer.strategy.batch_to_device(batch)
            losses: list[Tensor] = []

            def loss(batch: Any = batch, index: int = index, losses: list[Tensor] = losses) -> Tensor:
                with trainer.precision_plugin.forward_context():
                    losses.append(joint_loss(task, batch, index))
                return losses[0]

            shapes: dict[nn.Module, Sequence[Shape]] = {self._prompts: self._prompts.shapes}
            found = mask_gradients(shapes, 1, 1, loss, task.model.backbone.mean)[self._prompts]
            sums.append(torch.cat([*(gates.flatten() for gates in found), losses[0].detach().view(1)]).double())
        means = torch.stack(sums).sum(dim=0) / batches
        if trainer.world_size > 1:
            means = cast("Tensor", trainer.strategy.reduce(means, reduce_op="mean"))
        of_layers = means.cpu()
        return torch.empty_like(of_layers[:-1]).index_copy(0, rows, of_layers[:-1]), float(of_layers[-1])
