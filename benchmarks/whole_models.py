"""Deep prompts on models that timm runs whole: a training step against the bare model, and against a plainer way.

    python -m benchmarks.whole_models [--tokens 10 100] [--rounds 5] [--threads 1]
    python -m benchmarks.whole_models --print

The plainer way normalises and projects the prompts for each image, as if they stood in its sequence; ours does so once
a step. The bare model computes gradients for its head alone, but passes them through itself as the others do. Random
weights, fp32, the weights' own image size. Rounds are interleaved.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.records import RESULTS, Records, Row, machine, markdown
from vpt.backbones import create_backbone
from vpt.backbones.attention.base import OpenAttention
from vpt.deltas.prompts.prompt import Prompt
from vpt.experiments.profile import interleaved

CLASSES = 10
MODELS = (
    "vit_relpos_small_patch16_224",
    "cait_xxs24_224",
    "hiera_tiny_224",
    "maxvit_rmlp_pico_rw_256",
    "pvt_v2_b0",
    "swinv2_cr_tiny_224",
)


class OfEachImage(Prompt):
    """Prompts that are projected for every image of the batch."""

    def keys_values(self, layer: int, attention: OpenAttention, images: int) -> tuple[Tensor, Tensor]:
        """See `Prompt`."""
        norm = self.layout.norms[self.blocks[layer]]
        _, keys, values = attention.project(norm(self.entering(layer, images).expand(images, -1, -1)))
        return keys, values


def measure(name: str, tokens: int, batch: int, rounds: int) -> Row:
    """A row of one model and one number of prompts."""
    seconds = interleaved([_step(name, kind, tokens, batch) for kind in (OfEachImage, Prompt, None)], rounds)
    ways = ("each image", "ours", "bare")
    return {
        "backbone": name,
        "tokens": tokens,
        "batch": batch,
        "step_ms": {way: round(1000 * each / batch, 2) for way, each in zip(ways, seconds, strict=True)},
        "each/ours": seconds[0] / seconds[1],
        "ours/bare": seconds[1] / seconds[2],
    }


def _step(name: str, kind: type[Prompt] | None, tokens: int, batch: int) -> Callable[[], None]:
    torch.manual_seed(0)
    backbone = create_backbone(name, "random")
    images = torch.rand(batch, *backbone.input_shape)
    head = nn.Linear(backbone.num_features, CLASSES)
    trained = list(head.parameters())
    if kind is None:
        entry = nn.Parameter(torch.zeros(()))  # so that gradients pass through the whole model
        backbone.entry.register_forward_pre_hook(lambda _, args: (args[0] + entry,))
        trained.append(entry)
    else:
        part = kind(backbone, tokens)
        part.attach()
        trained += part.parameters()

    def run() -> None:
        torch.autograd.grad(head(backbone(images)).square().mean(), trained)

    return run


def blocks(out: Path = RESULTS) -> dict[str, str]:
    """What is there, as Markdown."""
    rows = [
        [f"`{row['backbone']}`", row["tokens"], *(f"{ms:.1f}" for ms in row["step_ms"].values()), *_ratios(row)]
        for row in _kept(out).rows()
    ]
    head = ["backbone", "prompts", "projected for each image, ms/image", "ours", "bare", "speed-up", "ours / bare"]
    return {"whole models": markdown(head, rows)} if rows else {}


def _ratios(row: Row) -> list[str]:
    return [f"{row[key]:.2f}" for key in ("each/ours", "ours/bare")]


def _kept(out: Path) -> Records:
    return Records(out / "whole_models.jsonl", "backbone", "tokens")


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, keeps and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[10, 100])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--print", action="store_true", help="measure nothing, print what is there")
    args = parser.parse_args(argv)
    if not args.print:
        torch.set_num_threads(args.threads)
        where = machine("cpu")
        for name in args.backbones:
            for tokens in args.tokens:
                _kept(args.out).put({**measure(name, tokens, args.batch, args.rounds), "machine": where})
    print(*blocks(args.out).values(), sep="\n\n")


if __name__ == "__main__":
    main()
