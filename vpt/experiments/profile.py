"""The cost ledger of a composition on a backbone: parameters, bytes, operations, memory, time."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vpt.backbones import create_backbone
from vpt.backbones.frozen_weights import wide_weights
from vpt.deltas.base import DeltaPart
from vpt.errors import ConfigError
from vpt.models.classifier import TunedModel
from vpt.models.delta_file import save_delta

Run = Callable[[], None]


def training_step(model: nn.Module, images: Tensor) -> Run:
    """One forward and backward pass of images, uint8 (B, 3, H, W), without an optimiser."""

    def run() -> None:
        model(images).float().square().mean().backward()
        model.zero_grad()
        wait(images)

    return run


def forward_pass(model: nn.Module, images: Tensor) -> Run:
    """One forward pass of images, uint8 (B, 3, H, W), without gradients."""

    def run() -> None:
        with torch.no_grad():
            model(images)
        wait(images)

    return run


def interleaved(runs: Sequence[Run], rounds: int) -> list[float]:
    """Median seconds of each, measured in turn, A B C A B C ..., in `rounds` ≥ 1 after one to warm up."""
    times: list[list[float]] = [[] for _ in runs]
    for round_ in range(rounds + 1):
        for seconds, run in zip(times, runs, strict=True):
            start = time.perf_counter()
            run()
            if round_:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def step_memory(model: nn.Module, images: Tensor) -> int:
    """Bytes of a step: on a GPU the peak above what lies there before; on a CPU what the graph keeps for backward."""
    if images.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        training_step(model, images)()
        return torch.cuda.max_memory_allocated() - before
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output kept as it is would keep its graph, and that the output

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(images)
    del output
    return sum(kept.values())


def counted_flops(run: Run) -> int:
    """Operations of one call, 2 for a multiplication and addition; attention as two matrix products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return int(counter.get_total_flops())


def wait(images: Tensor) -> None:
    """Waits for the device that images lie on."""
    if images.is_cuda:
        torch.cuda.synchronize()


SHARE = 0.95
"""Of a run's own best validation accuracy, for `steps_to_share`."""


@dataclass(frozen=True)
class Ledger:
    """What a composition costs; operations, memory and time are of one batch.

    Attributes:
        trainable: Trained parameters as counted, head included, of `total`.
        formula: The same by the formulas of the deltas and of the head; None after full fine-tuning.
        delta_bytes: Size of the delta file.
        batch: Images of the batch.
        forward_flops: Of a forward pass, as `counted_flops`; `step_flops` of a forward and backward pass.
        memory: Bytes of a training step, as `step_memory`.
        forward_seconds: Median of a `forward_pass`; `step_seconds` of a `training_step`.
        frozen_error: Largest difference of logits from those of frozen weights in fp32, as a share of the largest
            logit; None where they are in fp32.
    """

    trainable: int
    formula: int | None
    total: int
    delta_bytes: int
    batch: int
    forward_flops: int
    step_flops: int
    memory: int
    forward_seconds: float
    step_seconds: float
    device: str
    frozen_error: float | None = None


def profile(model: TunedModel, batch: int = 8, rounds: int = 5) -> Ledger:
    """Measures a model, its deltas attached, as it trains on `batch` images; a ConfigError if a number is below 1."""
    if batch < 1 or rounds < 1:
        raise ConfigError(f"batch and rounds must be at least 1, got {batch} and {rounds}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    images = model.backbone.random_images(batch).to(device)
    step, forward = training_step(model, images), forward_pass(model, images)
    seconds = interleaved([step, forward], rounds)
    trainable, total = model.parameter_counts()
    return Ledger(
        trainable=trainable,
        formula=_formula(model),
        total=total,
        delta_bytes=_delta_bytes(model),
        batch=batch,
        forward_flops=counted_flops(lambda: model(images)),
        step_flops=counted_flops(step),
        memory=step_memory(model, images),
        forward_seconds=seconds[1],
        step_seconds=seconds[0],
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        frozen_error=frozen_error(model, images) if model.backbone.narrow else None,
    )


@torch.no_grad()
def frozen_error(model: TunedModel, images: Tensor) -> float:
    """What frozen weights in bfloat16 do to the logits of some images: see `Ledger`."""
    backbone, own, twin = model.backbone, copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    wide = create_backbone(
        backbone.name, backbone.weights, backbone.image_size, backbone.normalization, backbone.pool
    ).to(backbone.mean.device)
    twin.backbone.widen()
    for weight, exact in zip(
        wide_weights(twin.backbone.model).values(), wide_weights(wide.model).values(), strict=True
    ):
        weight.data = exact.data
    logits = twin(images)
    return float((own(images) - logits).abs().max() / logits.abs().max())


def _formula(model: TunedModel) -> int | None:
    if not model.backbone.frozen:
        return None
    head = (model.backbone.num_features + 1) * model.head.out_features
    parts = [] if model.delta is None else [cast("DeltaPart", part) for part in model.delta.parts]
    return head + sum(part.expected_parameters() for part in parts)


def _delta_bytes(model: TunedModel) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return save_delta(Path(folder) / "delta.safetensors", model).stat().st_size


def steps_to_share(run: Path, share: float = SHARE, tag: str = "val/acc") -> tuple[int, int]:
    """How soon a run reached a share in (0, 1] of its own best value of a scalar: steps until then, and all its steps.

    A ConfigError where there is no such folder, or its TensorBoard events have no such scalar.
    """
    if not run.is_dir():
        raise ConfigError(f"There is no run {run}: name the folder of a finished one.")
    values = scalars(run, tag)
    if not values:
        raise ConfigError(f"{run} has no {tag} in its TensorBoard events: validate while it trains.")
    best = max(value for _, value in values)
    return next(step for step, value in values if value >= share * best) + 1, values[-1][0] + 1


def scalars(run: Path, tag: str) -> list[tuple[int, float]]:
    """Step and value of a scalar such as ``val/acc`` in a run's TensorBoard events; empty if it was not logged."""
    if not run.is_dir():
        return []
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    if tag not in events.Tags()["scalars"]:
        return []
    return [(event.step, float(event.value)) for event in events.Scalars(tag)]
