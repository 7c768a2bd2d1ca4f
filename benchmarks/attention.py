"""Softmax attention in bfloat16 on a CPU: PyTorch's fused kernel against two products, in the same run.

    python -m benchmarks.attention [--rounds 5] [--threads 1]
    python -m benchmarks.attention --print

First attention alone, forward and backward, with its error against float64; then whole steps of a frozen backbone with
a gradient at its input, timm's own with fused attention and ours, on the same random weights, with the error of that
gradient against fp32. Rounds are interleaved.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.records import RESULTS, Records, Row, machine, markdown
from vpt.backbones import create_backbone
from vpt.experiments.profile import interleaved

SHAPES = {  # batch or windows, heads, queries, keys, channels of a head
    "ViT-Ti, 10 prompts": (8, 3, 197, 207, 64),
    "ViT-B, 10 prompts": (8, 12, 197, 207, 64),
    "ViT-B, 100 prompts": (8, 12, 197, 297, 64),
    "Swin-T, first stage, 10 prompts": (512, 3, 49, 59, 32),
    "Swin-T, last stage, 100 prompts": (8, 24, 49, 149, 32),
}
BACKBONES = ["vit_tiny_patch16_224", "vit_base_patch16_224", "swin_tiny_patch4_window7_224"]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What `OpenAttention` computes where it does not fuse."""
    scores: Tensor = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return scores.softmax(dim=-1) @ v


def alone(shape: tuple[int, ...], dtype: torch.dtype, rounds: int) -> Row:
    """Milliseconds of both, fused first, and their errors."""
    rows, heads, queries, keys, channels = shape
    sizes = (queries, keys, keys, queries)
    exact = [torch.randn(rows, n, heads, channels, dtype=torch.float64).transpose(1, 2) for n in sizes]
    q, k, v, gradient = (tensor.to(dtype) for tensor in exact)
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    ways: list[Attend] = [F.scaled_dot_product_attention, products]

    def step(attend: Attend) -> Callable[[], None]:
        def run() -> None:
            torch.autograd.grad(attend(*leaves), leaves, gradient)

        return run

    times = interleaved([step(way) for way in ways], rounds)
    truth = products(*(leaf.detach().double() for leaf in leaves))
    errors = [float((way(*leaves).detach().double() - truth).norm() / truth.norm()) for way in ways]
    return {"ms": [1000 * seconds for seconds in times], "errors": errors}


def whole(name: str, rounds: int) -> Row:
    """Milliseconds an image of timm's model and ours under autocast, 8 images, and errors of the input's gradient."""
    own, timms = create_backbone(name, "random").model, timm.create_model(name, num_classes=0)
    timms.load_state_dict(own.state_dict())
    images = torch.randn(8, 3, 224, 224, requires_grad=True)

    def gradient(model: nn.Module, half: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            features = model(images)
        return torch.autograd.grad(features.float().square().mean(), images)[0]

    models = [model.eval().requires_grad_(False) for model in (timms, own)]
    exact = gradient(timms, half=False)
    errors = [float((gradient(model, half=True) - exact).norm() / exact.norm()) for model in models]
    times = interleaved([partial(_discard, gradient, model) for model in models], rounds)
    return {"ms": [125 * seconds for seconds in times], "errors": errors}


def _discard(gradient: Callable[[nn.Module, bool], Tensor], model: nn.Module) -> None:
    gradient(model, True)


def measure(rounds: int) -> Iterator[Row]:
    """Attention alone in both precisions, then whole steps."""
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for title, shape in SHAPES.items():
            yield {"table": "alone", "what": title, "precision": precision, **alone(shape, dtype, rounds)}
    for name in BACKBONES:
        yield {"table": "step", "what": name, "precision": "bf16", **whole(name, rounds)}


def blocks(out: Path = RESULTS) -> dict[str, str]:
    """What is there, as Markdown."""
    found = _kept(out).rows()
    if not found:
        return {}
    rows = {
        table: [
            [
                *([row["what"], row["precision"]] if table == "alone" else [row["what"]]),
                *(f"{ms:.1f}" for ms in row["ms"]),
                f"{row['ms'][0] / row['ms'][1]:.2f}",
                *(f"{error:.1e}" for error in row["errors"]),
            ]
            for row in found
            if row["table"] == table
        ]
        for table in ("alone", "step")
    }
    alone = ["attention alone", "precision", "fused, ms", "unfused, ms", "speed-up"]
    step = ["bf16 step", "timm, fused, ms/image", "ours", "speed-up", "gradient error, timm", "ours"]
    return {
        "attention alone": markdown([*alone, "error, fused", "unfused"], rows["alone"], 2),
        "attention steps": markdown(step, rows["step"]),
    }


def _kept(out: Path) -> Records:
    return Records(out / "attention.jsonl", "table", "what", "precision")


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, keeps and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--print", action="store_true", help="measure nothing, print what is there")
    args = parser.parse_args(argv)
    if not args.print:
        torch.set_num_threads(args.threads)
        where = machine("cpu")
        for row in measure(args.rounds):
            _kept(args.out).put({**row, "machine": where})
    print(*blocks(args.out).values(), sep="\n\n")


if __name__ == "__main__":
    main()
