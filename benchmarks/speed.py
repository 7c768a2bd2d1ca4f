"""Speed and memory of VPT-deep, of cached features and of a mixed batch, against the concatenation in the same run.

    python -m benchmarks [--backbones vit_base_patch16_224] [--tokens 10 50 100 200] [--precisions fp32 bf16]

    python -m benchmarks --compiled --threads 1 [--backbones vit_tiny_patch16_224 vit_base_patch16_224]
    python -m benchmarks --print

Everything is measured in turn, A B C A B C ..., and medians are compared. Weights are random: time does not depend on
them. Each row is kept with its machine as a line of OUT/speed.jsonl, in the place of an earlier one of the same kind.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.plain import CLASSES, Bare, Concatenated, matmul_ceiling, vit_flops
from benchmarks.records import RESULTS, Records, Row, machine, markdown
from vpt.backbones import Backbone, create_backbone
from vpt.experiments.profile import Run, counted_flops, forward_pass, interleaved, step_memory, training_step
from vpt.models import TunedModel, save_delta
from vpt.models.feature_cache import FeatureCache
from vpt.models.prompt_bank import PromptBank

BACKBONES = [
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
TITLES = {
    "vit_tiny_patch16_224": "ViT-Ti/16",
    "vit_small_patch16_224": "ViT-S/16",
    "vit_base_patch16_224": "ViT-B/16",
    "swin_tiny_patch4_window7_224": "Swin-T",
}
SHOWN = "vit_base_patch16_224"
"""The backbone with a table of its own."""
MEMORY = "activation memory (MiB)"


def pictures(batch: int, backbone: Backbone, device: str) -> Tensor:
    """A batch of noise."""
    return torch.randint(0, 256, (batch, *backbone.input_shape), dtype=torch.uint8, device=device)


def deep_prompts(name: str, tokens: int, precision: str, mode: str, args: argparse.Namespace, device: str) -> Row:
    """One row: the concatenation, ours, ours with all tokens in the last block, and the backbone only."""
    specs = [{"name": "prompt", "num_tokens": tokens}]
    ours, whole = (TunedModel(create_backbone(name, "random"), CLASSES, specs) for _ in range(2))
    whole.backbone.trim = False
    plain: list[nn.Module] = [Concatenated(name, tokens), ours, whole, Bare(name)]
    plain = [model.to(device, PRECISIONS[precision]) for model in plain]
    images = pictures(args.batch, ours.backbone, device)
    row: Row = {"backbone": name, "tokens": tokens, "precision": precision, "mode": mode, "batch": args.batch}
    if precision == "fp32":
        row |= _flops(plain, images, tokens)
    work = counted_flops(training_step(plain[1], images))
    memory = [step_memory(model, images) for model in plain]
    models = [cast("nn.Module", torch.compile(model)) for model in plain] if mode == "compiled" else plain
    steps = interleaved([training_step(model, images) for model in models], args.rounds)
    forwards = interleaved([forward_pass(model, images) for model in models], args.rounds)
    for key, values in (("step_ms", [1000 * s for s in steps]), ("forward_ms", [1000 * s for s in forwards])):
        row[key] = dict(
            zip(("plain", "ours", "untrimmed", "bare"), (round(v / args.batch, 2) for v in values), strict=True)
        )
    row["memory_mib"] = dict(zip(("plain", "ours", "untrimmed", "bare"), (m >> 20 for m in memory), strict=True))
    row["tflops"] = round(work / steps[1] / 1e12, 3)
    row |= {"plain/ours": steps[0] / steps[1], "ours/bare": steps[1] / steps[3], "untrimmed/bare": steps[2] / steps[3]}
    return row


def _flops(models: list[nn.Module], images: Tensor, tokens: int) -> Row:
    counted = [counted_flops(partial(model, images)) for model in models]
    row: Row = {
        "gflops": [round(c / len(images) / 1e9, 2) for c in counted],
        "flops plain/ours": counted[0] / counted[1],
    }
    backbone = cast("TunedModel", models[1]).backbone
    if not backbone.layout.windowed:
        head = 2 * len(images) * backbone.num_features * CLASSES
        row["counted/formula"] = counted[1] / (vit_flops(backbone.model, len(images), tokens, True) + head)
    return row


def compiled_steps(name: str, args: argparse.Namespace, device: str) -> Row:
    """A step of VPT-deep as users run it: eager and compiled in place, in fp32 and under autocast to bfloat16."""
    eager = TunedModel(create_backbone(name, "random"), CLASSES, [{"name": "prompt", "num_tokens": 10}]).to(device)
    compiled = copy.deepcopy(eager)
    compiled.compile()
    images = pictures(args.batch, eager.backbone, device)
    steps = [training_step(model, images) for model in (eager, compiled)]
    halves = [partial(_mixed, step, device) for step in steps]
    seconds = interleaved([*steps, *halves], args.rounds)
    ways = ("fp32", "fp32 compiled", "bf16", "bf16 compiled")
    ms = {way: round(1000 * each / args.batch, 2) for way, each in zip(ways, seconds, strict=True)}
    return {"backbone": name, "batch": args.batch, "step_ms": ms}


def _mixed(step: Run, device: str) -> None:
    with torch.autocast(device, torch.bfloat16):
        step()


def kept_features(name: str, epochs: int, args: argparse.Namespace, device: str) -> Row:
    """A linear probe over `epochs` epochs with cached features, as passes over the data."""
    backbone = create_backbone(name, "random").to(device)
    batches = [pictures(args.batch, backbone, device) for _ in range(4)]
    head = nn.Linear(backbone.num_features, CLASSES, device=device)

    def train() -> None:
        cache = FeatureCache(backbone)
        for _ in range(epochs):
            for number, images in enumerate(batches):
                index = torch.arange(args.batch) + number * args.batch
                head(cache("train", len(batches) * args.batch, index, images)).square().mean().backward()
                head.zero_grad()

    def once() -> None:
        with torch.no_grad():
            for images in batches:
                backbone(images)

    kept, single = interleaved([train, once], args.rounds)
    return {"backbone": name, "epochs": epochs, "kept/one pass": kept / single}


def mixed_batch(name: str, tasks: int, args: argparse.Namespace, device: str) -> Row:
    """A batch of several tasks in one pass, against one pass for each task."""
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder) / "weights.safetensors")
        save_file(create_backbone(name, "random").model.state_dict(), weights)
        files, models = {}, []
        for task in range(tasks):
            specs = [{"name": "prompt", "num_tokens": 10 * (task + 1)}]
            models.append(TunedModel(create_backbone(name, weights), CLASSES + task, specs).eval().to(device))
            files[str(task)] = save_delta(Path(folder) / f"{task}.safetensors", models[-1])
        bank = PromptBank(files).to(device)
    images = pictures(args.batch, bank.backbone, device)
    order = [str(position % tasks) for position in range(args.batch)]

    def mixed() -> None:
        bank(images, order)

    def apart() -> None:
        with torch.no_grad():
            for task, model in enumerate(models):
                model(images[[position % tasks == task for position in range(args.batch)]])

    together, one_by_one = interleaved([mixed, apart], args.rounds)
    return {"backbone": name, "tasks": tasks, "batch": args.batch, "apart/together": one_by_one / together}


def blocks(out: Path = RESULTS) -> dict[str, str]:
    """What is there, as Markdown: all columns of one backbone, the ratios of all, and what else costs time."""
    steps = [row for row in _kept(out).rows() if row["table"] == "steps"]
    memory = ("plain", "ours", "bare")
    ratios = ["speed-up", "FLOPs, concatenated / ours", "ours / backbone only", "ours without dropping / backbone only"]
    models = ["ours", "backbone only"]
    head = ["precision", "tokens", "concatenated, ms/image", *models, *ratios, f"{MEMORY}, concatenated", *models]
    rows = [
        [
            row["precision"],
            row["tokens"],
            *(f"{row['step_ms'][name]:.0f}" for name in memory),
            *_ratios(row),
            *(row["memory_mib"][name] for name in memory),
        ]
        for row in steps
        if (row["backbone"], row["mode"]) == (SHOWN, "eager")
    ]
    others = ["backbone", "precision", "mode", "tokens", *ratios, "TFLOP/s, ours"]
    lines = []
    for row in steps:
        name = TITLES.get(row["backbone"], row["backbone"])
        lines.append([name, row["precision"], row["mode"], row["tokens"], *_ratios(row), row["tflops"]])
    short = markdown(
        [head[0], head[1], *head[2:4], head[5], f"{MEMORY}, concatenated", "ours"],
        [[*row[:4], row[5], *row[9:11]] for row in rows],
    )
    return _compiled(out) | {
        "speed": markdown(head, rows),
        "speed short": short,
        "speed all": markdown(others, lines, 3),
        "speed features": _features(out),
    }


def _ratios(row: Row) -> list[str]:
    operations = f"{row['flops plain/ours']:.2f}" if "flops plain/ours" in row else "–"
    return [f"{row['plain/ours']:.2f}", operations, f"{row['ours/bare']:.2f}", f"{row['untrimmed/bare']:.2f}"]


def _compiled(out: Path) -> dict[str, str]:
    """Compiled steps against eager ones in fp32; nothing where none was measured."""
    found = [row for row in _kept(out).rows() if row["table"] == "compiled"]
    rows = [
        [TITLES.get(row["backbone"], row["backbone"]), way, f"{ms:.1f}", f"{row['step_ms']['fp32'] / ms:.2f}"]
        for row in found
        for way, ms in row["step_ms"].items()
    ]
    head = ["backbone", "step", "ms/image", "speed-up over fp32"]
    return {"compiled": markdown(head, rows, 2)} if rows else {}


def _features(out: Path) -> str:
    head = ["backbone", "linear probe, 100 epochs (forward passes over its data)", "four tasks in one batch: speed-up"]
    rows = []
    for name, title in TITLES.items():
        kept, mixed = (_kept(out).find(table, name, None, None, None) for table in ("kept_features", "mixed_batch"))
        if kept is not None and mixed is not None:
            rows.append([title, f"{kept['kept/one pass']:.2f}", f"{mixed['apart/together']:.2f}"])
    return markdown(head, rows)


def _kept(out: Path) -> Records:
    return Records(out / "speed.jsonl", "table", "backbone", "tokens", "precision", "mode")


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, keeps and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=BACKBONES)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 10, 50, 100, 200])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=list(PRECISIONS))
    parser.add_argument("--modes", nargs="+", default=["eager"], choices=["eager", "compiled"])
    parser.add_argument("--compiled", action="store_true", help="measure compiled steps alone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--print", action="store_true", help="measure nothing, print what is there")
    args = parser.parse_args(argv)
    if not args.print:
        torch.set_num_threads(args.threads)
        _measure(args, "cuda" if torch.cuda.is_available() else "cpu")
    print(*blocks(args.out).values(), sep="\n\n")


def _measure(args: argparse.Namespace, device: str) -> None:
    where = machine(device)
    if args.compiled:
        for name in args.backbones:
            row = {"table": "compiled", **compiled_steps(name, args, device), "machine": where}
            _kept(args.out).put(row)
            print(row, file=sys.stderr, flush=True)
        return
    where["matmul_tflops"] = {key: round(matmul_ceiling(PRECISIONS[key], device) / 1e12, 3) for key in args.precisions}

    def keep(table: str, row: Row) -> None:
        _kept(args.out).put({"table": table, **row, "machine": where})
        print(row, file=sys.stderr, flush=True)

    for name in args.backbones:
        for precision in args.precisions:
            for mode in args.modes:
                for tokens in args.tokens:
                    keep("steps", deep_prompts(name, tokens, precision, mode, args, device))
                    gc.collect()  # models refer to themselves
    for name in args.backbones:
        keep("kept_features", kept_features(name, 100, args, device))
        keep("mixed_batch", mixed_batch(name, min(4, args.batch), args, device))


if __name__ == "__main__":
    main()
