"""Time, memory and arithmetic of a training step."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Run = Callable[[], None]


def training_step(model: nn.Module, images: Tensor) -> Run:
    """One forward and backward pass, without an optimiser."""

    def run() -> None:
        model(images).float().square().mean().backward()
        model.zero_grad()
        _wait(images)

    return run


def forward_pass(model: nn.Module, images: Tensor) -> Run:
    """One forward pass without gradients."""

    def run() -> None:
        with torch.no_grad():
            model(images)
        _wait(images)

    return run


def interleaved(runs: Sequence[Run], rounds: int) -> list[float]:
    """Median seconds of each, measured in turn, A B C A B C ..., after one round to warm up."""
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
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(images)
    del output
    return sum(kept.values())


def forward_flops(model: nn.Module, images: Tensor) -> int:
    """Counted operations of a forward pass, 2 per multiplication and addition; attention as two matrix products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images)
    return int(counter.get_total_flops())


def step_flops(model: nn.Module, images: Tensor) -> int:
    """Counted operations of a training step, forward and backward."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        training_step(model, images)()
    return int(counter.get_total_flops())


def matmul_ceiling(dtype: torch.dtype, device: str, rounds: int = 5) -> float:
    """Operations a second of a large square matrix product: what a step could reach at best."""
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def product() -> None:
        torch.mm(a, b)
        _wait(a)

    return float(2 * side**3 / interleaved([product], rounds)[0])


def vit_flops(model: Any, batch: int, prompts: int, trim: bool) -> int:
    """The formula for VPT-deep as keys and values on a plain ViT with a class token, without the head.

    Per block: 2·3d² for each token and each prompt (once for all images), 4·d for each pair of query and key, 2·d² and
    2·2·d·h for each token behind the attention; with `trim` only one token passes the last block.
    """
    dim, depth, hidden = model.embed_dim, len(model.blocks), model.blocks[0].mlp.fc1.out_features
    patches = model.patch_embed.num_patches
    tokens = patches + 1
    total = batch * patches * 2 * dim * model.patch_embed.proj.weight[0].numel()
    for block in range(depth):
        asking = 1 if trim and block == depth - 1 else tokens
        total += 6 * dim * dim * (batch * tokens + prompts)
        total += batch * asking * (4 * dim * (tokens + prompts) + 2 * dim * dim + 4 * dim * hidden)
    return int(total)


def machine(device: str) -> dict[str, Any]:
    """What the numbers belong to."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    versions = {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()}
    return {"device": name, "threads": torch.get_num_threads(), "versions": versions}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _wait(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize()
