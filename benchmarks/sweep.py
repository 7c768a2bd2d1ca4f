"""An α sweep against as many single evaluations: time and peak memory, each run in a process of its own.

    python -m benchmarks.sweep [--backbone vit_tiny_patch16_224] [--images 256] [--batch 64] [--rounds 3]
    python -m benchmarks.sweep --print

Weights are random and images noise, read once from memory: neither time nor memory depends on them.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.records import RESULTS, Records, Row, machine, markdown
from vpt.backbones import create_backbone
from vpt.data import ImageDataModule
from vpt.data.splits import Split
from vpt.models import TunedModel, save_delta
from vpt.robustness import run

CLASSES = tuple("abcdefghij")
GRID = tuple(step / 10 for step in range(11))
JOBS = {"single": ("full", (1.0,)), "end-to-end": ("full", GRID), "head only": ("linear", GRID)}


def data(size: int, images: int) -> ImageDataModule:
    """A test list of noise; nothing to train on, nothing to validate."""

    def split(name: str, n: int) -> Split:
        pixels = np.random.default_rng(0).integers(0, 256, (n, 3, size, size), dtype=np.uint8)
        return Split(name, [f"{name}/{i}" for i in range(n)], np.arange(n) % len(CLASSES), lambda: pixels)

    splits = {"train": split("train", 1), "val": split("val", 0), "test": split("test", images)}
    return ImageDataModule("noise", CLASSES, splits, "square", size, 64, 0, 0, "none", None)


def prepare(folder: Path, name: str) -> None:
    """Writes weights, a fully fine-tuned model and two linear probes."""
    weights = folder / "weights.safetensors"
    save_file(create_backbone(name, "random").model.state_dict(), weights)
    for kind in ("full", "linear", "anchor"):
        backbone = create_backbone(name, str(weights))
        preset = data(backbone.input_shape[1], 1).preset.to_dict()
        model = TunedModel(backbone, len(CLASSES), (), CLASSES, preset)
        if kind == "full":
            model.backbone.unfreeze()
            with torch.no_grad():
                for tensor in model.owned().values():
                    tensor.add_(torch.randn_like(tensor), alpha=0.01)
        save_delta(folder / f"{kind}.safetensors", model)


def measure(folder: Path, job: str, size: int, images: int, batch: int) -> dict[str, float]:
    """Seconds, and the peak of memory in MiB, of the device where there is one.

    Else of this process: its processor time, which others on the machine do not lengthen, and its resident memory.
    """
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    kind, alphas = JOBS[job]
    module = data(size, images)
    with tempfile.TemporaryDirectory() as out:
        start = clock()
        anchor = None if len(alphas) == 1 else folder / "anchor.safetensors"
        run(folder / f"{kind}.safetensors", module, alphas, Path(out), anchor=anchor, severities=(), batch_size=batch)
        seconds = clock() - start
    if torch.cuda.is_available():
        return {"seconds": seconds, "mib": torch.cuda.max_memory_allocated() / 2**20}
    return {"seconds": seconds, "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}


def blocks(out: Path = RESULTS) -> dict[str, str]:
    """What is there, as Markdown."""
    rows = []
    for found in _kept(out).rows():
        single = found["runs"]["single"]
        bound = 1.3 * _middle(single, "mib") + found["interpolated_mib"]
        for job, runs in found["runs"].items():
            seconds, mib = _middle(runs, "seconds"), _middle(runs, "mib")
            peak = f"{mib / bound:.2f}"
            speedup = "–" if job == "single" else f"{len(GRID) * _middle(single, 'seconds') / seconds:.2f}"
            rows.append([found["backbone"], job, f"{seconds:.1f}", speedup, f"{mib:.0f}", peak])
    speed, bound_title = f"speed-up over {len(GRID)} evaluations", "peak / (1.3 × single + one copy of the weights)"
    head = ["backbone", "evaluation", "seconds", speed, "peak memory (MiB)", bound_title]
    return {"sweep": markdown(head, rows, 2)}


def _middle(runs: Sequence[dict[str, float]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def _kept(out: Path) -> Records:
    return Records(out / "sweep.jsonl", "backbone")


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, keeps and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--print", action="store_true", help="measure nothing, print what is there")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)  # what the child processes are asked
    args = parser.parse_args(argv)
    if args.job is not None:
        folder, job = Path(args.job[0]), args.job[1]
        size = json.loads((folder / "size.json").read_text())
        print(json.dumps(measure(folder, job, size, args.images, args.batch)))
        return
    if not args.print:
        _kept(args.out).put(compare(args))
    print(*blocks(args.out).values(), sep="\n\n")


def compare(args: argparse.Namespace) -> Row:
    """All jobs in turn, each in a process of its own."""
    found: dict[str, list[dict[str, float]]] = {job: [] for job in JOBS}
    protocol = {name: getattr(args, name) for name in ("backbone", "images", "batch", "rounds")}
    flags = [f"--{name}={value}" for name, value in protocol.items()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, args.backbone)
        (folder / "size.json").write_text(str(create_backbone(args.backbone, "random").image_size))
        interpolated = (folder / "full.safetensors").stat().st_size / 2**20
        for _ in range(args.rounds):
            for job in JOBS:
                command = [sys.executable, "-m", "benchmarks.sweep", *flags, "--job", name, job]
                answer = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
                found[job].append(json.loads(answer.stdout.splitlines()[-1]))
    where = machine("cuda" if torch.cuda.is_available() else "cpu")
    return {**protocol, "machine": where, "interpolated_mib": interpolated, "runs": found}


if __name__ == "__main__":
    main()
