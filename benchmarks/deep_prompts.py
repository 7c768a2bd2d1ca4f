"""One training step of VPT-deep: prompts as keys and values against prompts in the sequence, in the same run.

    python -m benchmarks.deep_prompts --backbone vit_tiny_patch16_224 --tokens 10 50 100

Plain formulation: concatenate the prompts before every block, run timm's own block (fused attention), drop their
outputs. Both are run in turn, A B A B ..., and the ratio of the medians is printed, with the bare backbone's step
(a gradient at its input) as a floor. Weights are random: time does not depend on them.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vpt.backbones import create_backbone
from vpt.tuning import TunedModel


class Concatenated(nn.Module):
    """VPT-deep as published: prompts in the sequence, outputs dropped."""

    def __init__(self, name: str, tokens: int) -> None:
        """Builds a frozen backbone, prompts and a head."""
        super().__init__()
        self.backbone = create_backbone(name, "random")
        model: Any = self.backbone.model
        for block in model.blocks:
            block.attn.num_queries = None  # all tokens pass the last block, as in the published code
        layers, width = len(model.blocks), self.backbone.num_features
        self.prompts = nn.Parameter(torch.empty(layers, tokens, width).uniform_(-0.1, 0.1))
        self.head = nn.Linear(width, 100)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of uint8 images."""
        model: Any = self.backbone.model
        x = model.norm_pre(model._pos_embed(model.patch_embed(self.backbone.normalize(images))))
        number = self.prompts.shape[1]
        for prompts, block in zip(self.prompts, model.blocks, strict=True):
            x = torch.cat([x[:, :1], prompts.expand(len(x), -1, -1), x[:, 1:]], dim=1)
            x = block(x)
            x = torch.cat([x[:, :1], x[:, 1 + number :]], dim=1)
        return self.head(model.forward_head(model.norm(x), pre_logits=True))  # type: ignore[no-any-return]


class Bare(nn.Module):
    """The frozen backbone with a gradient at its input: what no prompt tuning can undercut without trimming."""

    def __init__(self, name: str) -> None:
        """Builds the backbone."""
        super().__init__()
        self.backbone = create_backbone(name, "random")

    def forward(self, images: Tensor) -> Tensor:
        """Features of uint8 images, whole last block."""
        model: Any = self.backbone.model
        with self.backbone.whole():
            x = self.backbone.normalize(images).requires_grad_()
            return model.forward_head(model.forward_features(x), pre_logits=True)  # type: ignore[no-any-return]


def step(model: nn.Module, images: Tensor) -> Callable[[], None]:
    """One forward and backward pass, without an optimiser."""

    def run() -> None:
        model(images).square().mean().backward()
        model.zero_grad()
        if images.is_cuda:
            torch.cuda.synchronize()

    return run


def interleaved(runs: list[Callable[[], None]], rounds: int) -> list[float]:
    """Median seconds of each, measured in turn after one warm-up round."""
    times: list[list[float]] = [[] for _ in runs]
    for round_ in range(rounds + 1):
        for seconds, run in zip(times, runs, strict=True):
            start = time.perf_counter()
            run()
            if round_:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def main() -> None:
    """Prints one row per number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--tokens", type=int, nargs="+", default=[10, 50, 100])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or 'CPU'}"
    software = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{args.backbone}, batch {args.batch}, fp32, {where}, {software}")
    print("| tokens | plain ms/image | ours ms/image | bare ms/image | plain / ours | ours / bare |")
    print("|--:|--:|--:|--:|--:|--:|", flush=True)
    size = create_backbone(args.backbone, "random").image_size
    images = torch.randint(0, 256, (args.batch, 3, size, size), dtype=torch.uint8, device=device)
    for tokens in args.tokens:
        specs = [{"name": "prompt", "num_tokens": tokens}]
        models: list[nn.Module] = [
            Concatenated(args.backbone, tokens),
            TunedModel(create_backbone(args.backbone, "random"), 100, specs),
            Bare(args.backbone),
        ]
        plain, ours, bare = interleaved([step(model.to(device), images) for model in models], args.rounds)
        milliseconds = " | ".join(f"{1000 * seconds / args.batch:.1f}" for seconds in (plain, ours, bare))
        print(f"| {tokens} | {milliseconds} | {plain / ours:.2f} | {ours / bare:.2f} |", flush=True)


if __name__ == "__main__":
    main()
