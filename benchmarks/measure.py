"""What a machine could reach at best, what a step has to compute, and which machine it was."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import timm
import torch

from vpt.experiments.cost_ledger import interleaved, wait


def matmul_ceiling(dtype: torch.dtype, device: str, rounds: int = 5) -> float:
    """Operations a second of a large square matrix product: what a step could reach at best."""
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def product() -> None:
        torch.mm(a, b)
        wait(a)

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
