"""A training step of some deltas as they are computed, against the same function computed in the plainest way.

    python -m benchmarks.delta_steps [--backbone vit_base_patch16_224] [--rounds 7] [--threads 1]
    python -m benchmarks.delta_steps --print

LoRA adds to queries and values of a fused layer, plainly by putting its output together again from slices. A prefix
under bf16 autocast joins the keys as it is, plainly in fp32, which widens all of them. Shallow prompts behind a
projection are projected once a step, plainly whenever their number is asked for. Rounds are interleaved.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.records import RESULTS, Records, Row, machine, markdown
from vpt.backbones import create_backbone
from vpt.backbones.attention.base import OpenAttention
from vpt.deltas.base import DeltaPart, Handle
from vpt.deltas.extra_key_values import Edited, per_row
from vpt.deltas.low_rank.lora import Lora
from vpt.deltas.prefix import Prefix
from vpt.deltas.prompts.prompt import Prompt
from vpt.experiments.profile import interleaved

CLASSES = 10


class SlicedLora(Lora):
    """Each change is added to its slice, and all slices are put together again."""

    def hooks(self) -> Iterator[Handle]:
        """See `DeltaPart`."""
        for key, target in self.targets.items():
            yield target.module.register_forward_hook(partial(self._add_slice, key))

    def _add_slice(self, key: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        start, stop = self.targets[key].start, self.targets[key].stop
        change = (args[0] @ self.down[key].T) @ self.up[key].T * self.factor
        return torch.cat([out[..., :start], out[..., start:stop] + change, out[..., stop:]], dim=-1)


class WideningPrefix(Prefix):
    """Keys and values join those of the tokens in their own precision."""

    def _append(self, layer: int, attention: OpenAttention, keys: Tensor, values: Tensor) -> Edited:
        rows = keys.shape[0]
        own = (per_row(part, rows, attention.windows) for part in self.keys_values(layer, attention, rows))
        own_keys, own_values = own
        return torch.cat([keys, own_keys], dim=2), torch.cat([values, own_values], dim=2), None


class ReprojectedPrompt(Prompt):
    """The number of prompts is read from the projected prompts."""

    def _weaken_tokens(self, layer: int, attention: OpenAttention, keys: Tensor, values: Tensor) -> Edited:
        before, number = self.backbone.layout.num_prefix, self.prompts(0).shape[0]
        return keys, values, self.key_bias(layer, keys, number, before, keys.shape[2] - before - number)


CASES: dict[str, tuple[type[DeltaPart], type[DeltaPart], dict[str, Any], str]] = {
    "lora on q and v": (SlicedLora, Lora, {"rank": 8}, "fp32"),
    "prefix of 10": (WideningPrefix, Prefix, {"num_tokens": 10}, "bf16"),
    "prefix of 100": (WideningPrefix, Prefix, {"num_tokens": 100}, "bf16"),
    "shallow prompts of 100, projected": (
        ReprojectedPrompt,
        Prompt,
        {"num_tokens": 100, "deep": False, "project": 512},
        "fp32",
    ),
}


def measure(name: str, batch: int, rounds: int) -> Iterator[Row]:
    """A row for each case."""
    images = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (batch,))
    for what, (plain, ours, options, precision) in CASES.items():
        steps = [_step(name, kind, options, images, labels, precision == "bf16") for kind in (plain, ours)]
        seconds = interleaved(steps, rounds)
        yield {
            "backbone": name,
            "what": what,
            "precision": precision,
            "batch": batch,
            "step_ms": [round(1000 * each / batch, 2) for each in seconds],
            "plain/ours": seconds[0] / seconds[1],
        }


def _step(name: str, kind: type[DeltaPart], options: dict[str, Any], images: Tensor, labels: Tensor, half: bool) -> Any:
    torch.manual_seed(0)
    backbone = create_backbone(name, "random")
    part, head = cast("Any", kind)(backbone, **options), nn.Linear(backbone.num_features, CLASSES)
    part.attach()
    parameters = [*part.parameters(), *head.parameters()]

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = nn.functional.cross_entropy(head(backbone(images)), labels)
        torch.autograd.grad(loss, parameters)

    return run


def blocks(out: Path = RESULTS) -> dict[str, str]:
    """What is there, as Markdown."""
    rows = [
        [row["what"], row["precision"], *(f"{ms:.1f}" for ms in row["step_ms"]), f"{row['plain/ours']:.2f}"]
        for row in _kept(out).rows()
    ]
    if not rows:
        return {}
    return {"delta steps": markdown(["delta", "precision", "baseline, ms/image", "ours", "speed-up"], rows, 2)}


def _kept(out: Path) -> Records:
    return Records(out / "delta_steps.jsonl", "backbone", "what", "precision")


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, keeps and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--print", action="store_true", help="measure nothing, print what is there")
    args = parser.parse_args(argv)
    if not args.print:
        torch.set_num_threads(args.threads)
        where = machine("cpu")
        for row in measure(args.backbone, args.batch, args.rounds):
            _kept(args.out).put({**row, "machine": where})
    print(*blocks(args.out).values(), sep="\n\n")


if __name__ == "__main__":
    main()
