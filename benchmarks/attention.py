"""Softmax attention in bfloat16 on a CPU: PyTorch's fused kernel against two products, in the same run.

    python -m benchmarks.attention [--rounds 5] [--threads 1]

First attention alone, forward and backward, with its error against float64; then whole steps of a frozen backbone with
a gradient at its input, timm's own with fused attention and ours, on the same random weights, with the error of that
gradient against fp32. Rounds are interleaved.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpt.backbones import create_backbone
from vpt.experiments.cost_ledger import interleaved

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


def alone(shape: tuple[int, ...], dtype: torch.dtype, rounds: int) -> str:
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
    return " | ".join(
        [*(f"{1000 * t:.1f}" for t in times), f"{times[0] / times[1]:.1f}", *(f"{e:.1e}" for e in errors)]
    )


def whole(name: str, rounds: int) -> str:
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
    fused, ours = interleaved([partial(_discard, gradient, model) for model in models], rounds)
    return f"{125 * fused:.1f} | {125 * ours:.1f} | {fused / ours:.2f} | {errors[0]:.1e} | {errors[1]:.1e}"


def _discard(gradient: Callable[[nn.Module, bool], Tensor], model: nn.Module) -> None:
    gradient(model, True)


def tables(rounds: int) -> Iterator[str]:
    """Both, as Markdown."""
    yield "| attention alone | precision | fused, ms | products, ms | fused / products | error, fused | products |"
    yield "|---|---|--:|--:|--:|--:|--:|"
    for dtype, precision in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for title, shape in SHAPES.items():
            yield f"| {title} | {precision} | {alone(shape, dtype, rounds)} |"
    yield "\n| bf16 step | timm, fused, ms/image | ours | timm / ours | error of the gradient, timm | ours |"
    yield "|---|--:|--:|--:|--:|--:|"
    for name in BACKBONES:
        yield f"| {name} | {whole(name, rounds)} |"


def main() -> None:
    """Prints the tables as they are measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for line in tables(args.rounds):
        print(line, flush=True)


if __name__ == "__main__":
    main()
