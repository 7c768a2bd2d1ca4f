"""Speed and memory of VPT-deep, of kept features and of a mixed batch, against the plain formulation in the same run.

    python -m benchmarks [--backbones vit_base_patch16_224] [--tokens 10 50 100 200] [--precisions fp32 bf16]

Everything is measured in turn, A B C A B C ..., and medians are compared. Weights are random: time does not depend on
them. One JSON file with the machine and all rows is written besides the text.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.measure import machine, matmul_ceiling, vit_flops
from benchmarks.plain import CLASSES, Bare, Concatenated
from vpt.backbones import create_backbone
from vpt.experiments.cost_ledger import counted_flops, forward_pass, interleaved, step_memory, training_step
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
Row = dict[str, Any]


def pictures(batch: int, size: int, device: str) -> Tensor:
    """A batch of noise."""
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)


def deep_prompts(name: str, tokens: int, precision: str, mode: str, args: argparse.Namespace, device: str) -> Row:
    """One row: the plain concatenation, ours, ours without the trim of the last block, and the bare backbone."""
    specs = [{"name": "prompt", "num_tokens": tokens}]
    ours, whole = (TunedModel(create_backbone(name, "random"), CLASSES, specs) for _ in range(2))
    whole.backbone.trim = False
    plain: list[nn.Module] = [Concatenated(name, tokens), ours, whole, Bare(name)]
    plain = [model.to(device, PRECISIONS[precision]) for model in plain]
    images = pictures(args.batch, ours.backbone.image_size, device)
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


def kept_features(name: str, epochs: int, args: argparse.Namespace, device: str) -> Row:
    """A linear probe over `epochs` epochs with its features kept, as passes over the data."""
    backbone = create_backbone(name, "random").to(device)
    batches = [pictures(args.batch, backbone.image_size, device) for _ in range(4)]
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
    images = pictures(args.batch, bank.backbone.image_size, device)
    order = [str(position % tasks) for position in range(args.batch)]

    def mixed() -> None:
        bank(images, order)

    def apart() -> None:
        with torch.no_grad():
            for task, model in enumerate(models):
                model(images[[position % tasks == task for position in range(args.batch)]])

    together, one_by_one = interleaved([mixed, apart], args.rounds)
    return {"backbone": name, "tasks": tasks, "batch": args.batch, "apart/together": one_by_one / together}


HEADER = (
    "backbone", "n", "precision", "mode", "plain", "ours", "bare", "plain/ours", "FLOPs plain/ours",
    "ours/bare", "untrimmed/bare", "MiB plain", "MiB ours", "MiB bare", "TFLOP/s ours",
)  # fmt: skip


def show(row: Row) -> str:
    """A row of the table of steps."""
    step, memory = row["step_ms"], row["memory_mib"]
    cells = [row["backbone"], row["tokens"], row["precision"], row["mode"]]
    cells += [f"{step[name]:.1f}" for name in ("plain", "ours", "bare")]
    cells += [f"{row['plain/ours']:.2f}", f"{row['flops plain/ours']:.2f}" if "flops plain/ours" in row else "–"]
    cells += [f"{row['ours/bare']:.2f}", f"{row['untrimmed/bare']:.2f}"]
    cells += [memory[name] for name in ("plain", "ours", "bare")]
    cells.append(row["tflops"])
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=BACKBONES)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 10, 50, 100, 200])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=list(PRECISIONS))
    parser.add_argument("--modes", nargs="+", default=["eager"], choices=["eager", "compiled"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed.json"))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result: Row = {"machine": machine(device), "steps": [], "kept_features": [], "mixed_batch": []}
    ceilings = {key: matmul_ceiling(PRECISIONS[key], device) / 1e12 for key in args.precisions}
    result["machine"]["matmul_tflops"] = {key: round(value, 3) for key, value in ceilings.items()}
    print(json.dumps(result["machine"]))
    print("ms per image of a training step; MiB kept for backward (CPU) or peak (GPU) of a batch")
    print(f"| {' | '.join(HEADER)} |", "|---|--:|---|---" + "|--:" * 11 + "|", sep="\n", flush=True)
    for name in args.backbones:
        for precision in args.precisions:
            for mode in args.modes:
                for tokens in args.tokens:
                    result["steps"].append(deep_prompts(name, tokens, precision, mode, args, device))
                    gc.collect()  # models refer to themselves
                    print(show(result["steps"][-1]), flush=True)
                    _write(args.out, result)
    for name in args.backbones:
        result["kept_features"].append(kept_features(name, 100, args, device))
        print("linear probe, features kept:", json.dumps(result["kept_features"][-1]), flush=True)
        result["mixed_batch"].append(mixed_batch(name, min(4, args.batch), args, device))
        print("four tasks in one batch:", json.dumps(result["mixed_batch"][-1]), flush=True)
        _write(args.out, result)


def _write(out: Path, result: Row) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(out)


if __name__ == "__main__":
    main()
