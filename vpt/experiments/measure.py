"""Time, memory and arithmetic of a training step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Run = Callable[[], None]


def training_step(model: nn.Module, images: Tensor) -> Run:
    """One forward and backward pass, without an optimiser.

    Args:
        model: Images to anything that has a gradient.
        images: (B, 3, H, W) uint8.
    """

    def run() -> None:
        model(images).float().square().mean().backward()
        model.zero_grad()
        wait(images)

    return run


def forward_pass(model: nn.Module, images: Tensor) -> Run:
    """One forward pass without gradients.

    Args:
        model: Takes images.
        images: (B, 3, H, W) uint8.
    """

    def run() -> None:
        with torch.no_grad():
            model(images)
        wait(images)

    return run


def interleaved(runs: Sequence[Run], rounds: int) -> list[float]:
    """Median seconds of each, measured in turn, A B C A B C ..., after one round to warm up.

    Args:
        runs: What to time.
        rounds: How often, at least 1.
    """
    times: list[list[float]] = [[] for _ in runs]
    for round_ in range(rounds + 1):
        for seconds, run in zip(times, runs, strict=True):
            start = time.perf_counter()
            run()
            if round_:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def step_memory(model: nn.Module, images: Tensor) -> int:
    """Bytes of a step: on a GPU the peak above what lies there before; on a CPU what the graph keeps for backward.

    Args:
        model: Images to anything that has a gradient.
        images: (B, 3, H, W) uint8.
    """
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
    """Operations of what is called, 2 for a multiplication and addition; attention as two matrix products.

    Args:
        run: Called once.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return int(counter.get_total_flops())


def wait(images: Tensor) -> None:
    """Waits for the device that images lie on.

    Args:
        images: Any tensor.
    """
    if images.is_cuda:
        torch.cuda.synchronize()
