"""Several processes train what one would: the mean of a step is over all their images, and each counts once.

By DDP each has the whole model. By FSDP2 each keeps a share of the backbone's weights, and has a block's whole only
while it computes with it; what a delta and a head train on a frozen backbone is small, and whole on every process.
Where the backbone itself trains, so do all its gradients and the state of the optimiser lie in shares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, StrategyRegistry
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from vpt.backbones import Backbone
from vpt.data.samplers import EpochSampler
from vpt.errors import ConfigError

Batch = dict[str, Tensor]
Weighed = tuple[Tensor, Tensor | int]
"""A mean over a batch, a scalar, and what the batch weighs in it: how many images or pixels, or the sum of weights."""
_FORWARD = ("pooled", "tokens", "before_block", "from_block")  # what else computes with the whole of a `Backbone`


def check_strategy(trainer: L.Trainer, task: L.LightningModule | None = None) -> None:
    """Refuses, by a ConfigError, strategies that are not known to train what one process does, or not this task."""
    if (
        not isinstance(trainer.strategy, SingleDeviceStrategy | FullySharded)
        and type(trainer.strategy) is not DDPStrategy
    ):
        raise ConfigError(
            f"trainer.strategy is {type(trainer.strategy).__name__}, and vpt trains by ddp, where every process has "
            "the whole model, or by fsdp2, where each has a share of the backbone: name one of them."
        )
    if task is not None and isinstance(trainer.strategy, FullySharded):
        trainer.strategy.check(task)


def without_repeat(batch: Batch, batch_idx: int, trainer: L.Trainer) -> tuple[Batch, bool]:
    """Leaves out the image that a process reads at the end of an epoch only because others have one more.

    A batch of nothing else stays as it is; whether a batch counts is told beside it.
    """
    sampler = _sampler_of_last(batch_idx, trainer)
    if sampler is None or not sampler.repeats:
        return batch, True
    rest = {key: column[:-1] for key, column in batch.items()}
    return (rest, True) if len(rest["index"]) else (batch, False)


def images_of_step(batch: Batch, batch_idx: int, trainer: L.Trainer) -> int:
    """How many images all processes train on in a step, in which this one has a batch."""
    sampler = _sampler_of_last(batch_idx, trainer)
    repeated = 0 if sampler is None else -len(cast("Any", sampler).dataset) % trainer.world_size
    return len(batch["index"]) * trainer.world_size - repeated


def _sampler_of_last(batch_idx: int, trainer: L.Trainer) -> EpochSampler | None:
    loader: Any = trainer.train_dataloader
    sampler = getattr(loader, "sampler", None)
    return sampler if isinstance(sampler, EpochSampler) and batch_idx + 1 == len(loader) else None


def joint_loss(task: Any, batch: Batch, batch_idx: int) -> Tensor:
    """This process's part of the mean loss of a batch that a `TuningTask` trains on, a scalar (`joint_mean`)."""
    batch, counts = without_repeat(batch, batch_idx, task.trainer)
    batch = task.mixed(batch, batch_idx)
    penalties = [(each, len(batch["index"])) for each in task.model.penalties()]
    return joint_mean([*task.training_losses(batch), *penalties], task.trainer, counts)


def joint_mean(losses: Sequence[Weighed], trainer: L.Trainer, counts: bool = True) -> Tensor:
    """The sum of the means, a scalar.

    Of several processes it is this one's part of the means over all of their batches: the mean of the parts, and of
    their gradients, which is what `DistributedDataParallel` takes. The part is 0 where the batch does not count.
    """
    if trainer.world_size == 1:
        return cast("Tensor", sum(mean for mean, _ in losses))
    means = torch.stack([mean for mean, _ in losses])
    weights = torch.stack([torch.as_tensor(weight, dtype=torch.float64, device=means.device) for _, weight in losses])
    weights = weights * counts
    total = cast("Tensor", trainer.strategy.reduce(weights.clone(), reduce_op="sum"))
    shares = trainer.world_size * weights / total.clamp(min=torch.finfo(total.dtype).tiny)
    return (means * shares.to(means.dtype)).sum()


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Spreads the backbone within a module over the processes of a mesh, and, where it trains, all else that trains.

    The weights that a delta computes others from stay whole on every process (`vpt.deltas.base.Parametrization`). What
    is spread already stays as it is.
    """
    (backbone,) = (each for each in module.modules() if isinstance(each, Backbone))
    if isinstance(backbone, FSDPModule):
        return
    inside = set(backbone.modules())
    kept = {
        parameter
        for each in inside
        for name, parameter in each.named_parameters(recurse=False)
        if name in vars(each).get("_computed", ()) or parameter.ndim == 0
    }
    rest = [each for each in module.modules() if each not in inside and list(each.parameters(recurse=False))]
    for unit in (*_units(backbone), backbone, *(rest if backbone.tuned else ())):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
        unit.unshard()  # once outside of inference mode, whose tensors could not be written to outside of it again
        unit.reshard()
    for name in _FORWARD:
        register_fsdp_forward_method(backbone, name)


def _units(backbone: Backbone) -> list[Any]:
    """What is gathered at once: blocks, or, on a Swin, whose tokens may pass beside a block, its two halves."""
    if not backbone.has_layout:
        return []
    blocks: list[Any] = list(backbone.layout.blocks)
    return [half for block in blocks for half in (block.attn, block.mlp)] if backbone.layout.windowed else blocks


def share_gradients(module: nn.Module) -> None:
    """Takes the mean over processes of the gradients of what each has as a whole; FSDP2 does so for the rest."""
    own = [each.grad for each in module.parameters() if each.grad is not None and not isinstance(each, DTensor)]
    if not own:
        return
    flat = torch.cat([each.flatten() for each in own])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for each, mean in zip(own, torch.split(flat, [each.numel() for each in own]), strict=True):
        each.copy_(mean.view_as(each))


def joint(tensor: Tensor) -> Tensor:
    """The whole of a tensor in shares; another as it is. Every process has to ask."""
    return cast("Tensor", cast("Any", tensor).full_tensor()) if isinstance(tensor, DTensor) else tensor


def gathered(value: Any) -> Any:
    """Nested values with the whole of each tensor in shares: on the CPU of the first process, and empty on others.

    Every process has to ask.
    """
    if isinstance(value, Mapping):
        return {key: gathered(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(gathered, value))
    if not isinstance(value, DTensor):
        return value
    whole = joint(value.detach())
    return whole.cpu() if distributed.get_rank() == 0 else whole.new_empty(0, device="cpu")


def shared_as(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, on the device of another, and in shares as that is."""
    value = value.to(like.device)
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """While this lasts, the first process has all parameters of a model as plain tensors on the CPU, to be written.

    Every process has to enter; on others they are empty. The model cannot compute meanwhile.
    """
    spread = [
        (each, name, parameter)
        for each in model.modules()
        for name, parameter in each.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    try:
        for module, name, parameter in spread:
            module._parameters[name] = nn.Parameter(gathered(parameter), parameter.requires_grad)
        yield
    finally:
        for module, name, parameter in spread:
            module._parameters[name] = cast("nn.Parameter", parameter)


@StrategyRegistry.register("fsdp2", description="the backbone in shares, one on each process", override=True)
class FullySharded(ModelParallelStrategy):
    """Trains what `DDPStrategy` does, with the backbone in shares (`torch.distributed.fsdp.fully_shard`).

    Checkpoints are those of one process, which the first one writes.
    """

    def __init__(self) -> None:
        """Shares among all processes."""
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)
        self._batches = self._most = 0

    def connect(self, model: L.LightningModule) -> None:
        """Takes a task that it can train."""
        super().connect(model)
        self.check(model)

    def check(self, task: L.LightningModule) -> None:
        """Refuses, by a ConfigError, what cannot be computed with a backbone in shares."""
        if str(self.precision_plugin.precision) == "16-mixed":
            raise ConfigError("trainer.strategy fsdp2 does not go with precision 16-mixed: take bf16-mixed or 32-true.")
        for name in ("compile", "micro_batch"):
            if task.hparams.get(name):
                raise ConfigError(f"model.{name} does not go with trainer.strategy fsdp2: leave one of them out.")
        if not task.automatic_optimization:
            raise ConfigError(f"{type(task).__name__} solves for its head, and does not go with fsdp2: take ddp.")
        (backbone,) = (each for each in task.modules() if isinstance(each, Backbone))
        norms = (each for each in backbone.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm))
        if backbone.tuned and next(norms, None) is not None:
            raise ConfigError(
                f"{backbone.name} has batch norms, whose statistics would differ between the processes of fsdp2, which "
                "train them: take trainer.strategy ddp, or a delta instead of full fine-tuning."
            )

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights are restored while each process has them as a whole."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """As of any other strategy."""
        return True

    def setup_environment(self) -> None:
        """Counts the processes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: L.Trainer) -> None:
        """Shares the weights, in their precision, before the optimiser sees them."""
        self.model = self.precision_plugin.convert_module(cast("nn.Module", self.model))
        shard(self.model, self.device_mesh["data_parallel"])
        Strategy.setup(self, trainer)

    def post_backward(self, closure_loss: Tensor) -> None:
        """See `share_gradients`."""
        share_gradients(cast("nn.Module", self.lightning_module))

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """In shares: what of it a checkpoint keeps is gathered by the task."""
        return Strategy.lightning_module_state_dict(self)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint of one process; a ConfigError where the model is in shares already."""
        if any(isinstance(each, DTensor) for each in cast("nn.Module", self.lightning_module).parameters()):
            raise ConfigError("A model that is in shares already takes no checkpoint: build the task anew.")
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """As of any other strategy: nothing is in shares yet."""
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The state as one process would have it, on the first one."""
        return cast("dict[str, Any]", gathered(Strategy.optimizer_state(self, optimizer)))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Shares what one process would have as the parameters are shared."""
        Strategy.load_optimizer_state_dict(self, checkpoint)
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        state[name] = shared_as(value, parameter)

    def on_validation_start(self) -> None:
        """Knows how many batches each process has: weights are gathered for as many as any of them has."""
        trainer = cast("L.LightningModule", self.lightning_module).trainer
        sanity, validation = trainer.num_sanity_val_batches, trainer.num_val_batches
        self._count(sanity if trainer.sanity_checking else validation)

    def on_test_start(self) -> None:
        """As of a validation."""
        self._count(cast("L.LightningModule", self.lightning_module).trainer.num_test_batches)

    def on_predict_start(self) -> None:
        """As of a validation."""
        self._count(cast("L.LightningModule", self.lightning_module).trainer.num_predict_batches)

    def _count(self, batches: list[int | float]) -> None:
        self._batches = int(sum(batches))
        self._most = int(self.reduce(torch.tensor(self._batches, device=self.root_device), reduce_op="max"))

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """A step, and those of others that this process has no batch for."""
        return self._with_others(super().validation_step, *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """As of a validation."""
        return self._with_others(super().test_step, *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """As of a validation."""
        return self._with_others(super().predict_step, *args, **kwargs)

    def _with_others(self, step: Callable[..., Any], batch: Any, batch_idx: int, *args: Any, **kwargs: Any) -> Any:
        found = step(batch, batch_idx, *args, **kwargs)
        if batch_idx + 1 == self._batches:
            for _ in range(self._most - self._batches):
                accompany(cast("L.LightningModule", self.lightning_module), batch)
        return found


def is_sharded(trainer: L.Trainer) -> bool:
    """Whether a trainer's processes have the backbone in shares."""
    return isinstance(trainer.strategy, FullySharded)


@torch.no_grad()
def accompany(task: Any, batch: Mapping[str, Tensor]) -> None:
    """Computes in vain with an image, where others need this process's share while it has nothing to compute."""
    if is_sharded(task.trainer):
        # A head that trains with the backbone is in shares, too.
        task.model.classify(task.model.encode(batch["image"][:1]))
