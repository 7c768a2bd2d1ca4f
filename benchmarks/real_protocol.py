"""The published procedure on five small tasks with eleven ways to adapt ViT-Ti/16: tables of docs/protocol.md.

    python -m benchmarks.real_protocol --root $VPT_DATA [--tasks caltech101 ...] [--methods lora ...] [--threads 1]
    python -m benchmarks.real_protocol --root $VPT_DATA --print

A cell of the table is what `vpt sweep --halving 3` does with the method's config over the task's: three rates on
train800, of which only the best on val200 goes on after two of four epochs, then three seeds on train800val200, test
read once each. The records of a finished cell are kept under --out, so that an interrupted run continues; delta files
and most logits stay under --build. `vpt report` reads --out as any other folder of runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from vpt.atomic_write import write_json
from vpt.cli.commands.lightning_cli import resolve
from vpt.data import default_root
from vpt.experiments.engine import serially
from vpt.experiments.sweep import RATE, SWEEP_FILE, Plan, sweep
from vpt.experiments.transfer import Mode, transfer
from vpt.models.identity import without_places
from vpt.run_record import RUN_FILE

BACKBONE = "vit_tiny_patch16_224"
WEIGHTS = "weights/vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
CONFIGS = Path(__file__).parents[1] / "configs"
SEEDS = (42, 44, 82)
BATCH, EPOCHS, HALVING = 10, 4, 3
LINEAR_EPOCHS = 12  # its features are kept, so an epoch costs next to nothing

TASKS = {
    "caltech101": "vtab/caltech101",
    "signdigits10": "local/signdigits10",
    "pacs7_photo": "local/pacs_photo",
    "digits": "demo",
    "shapes": "local/shapes",
}
METHODS = {
    "linear": (3e-3, 1e-2, 3e-2),
    "bias": (1e-3, 3e-3, 1e-2),
    "lora": (1e-3, 2e-3, 4e-3),
    "adapter": (1e-3, 2e-3, 4e-3),
    "ssf": (1e-3, 3e-3, 1e-2),
    "prefix": (2e-3, 6e-3, 2e-2),
    "vpt_shallow": (2e-3, 4e-3, 8e-3),
    "vpt_deep": (2e-3, 4e-3, 8e-3),
    "prompt_bias": (1e-3, 2e-3, 4e-3),
    "prompt_lora": (1e-3, 2e-3, 4e-3),
    "full": (3e-5, 1e-4, 3e-4),
}
"""By config of configs/method: AdamW's rates at batch 10."""
TRANSFERRED = "vpt_deep"


@dataclass(frozen=True)
class Place:
    """Where things are; `quick` rehearses with two batches an epoch and two seeds."""

    root: Path
    out: Path
    build: Path
    quick: bool

    def record(self, task: str, method: str) -> dict[str, Any] | None:
        """What a finished cell found."""
        path = self.out / task / method / SWEEP_FILE
        return dict(json.loads(path.read_text())) if path.is_file() else None

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the tested runs."""
        return SEEDS[:2] if self.quick else SEEDS


def arguments(place: Place, task: str, method: str) -> list[str]:
    """Those of `vpt sweep`, but for its own."""
    epochs = LINEAR_EPOCHS if method == "linear" else EPOCHS
    demo = ["--data.image_size=224"] if task in ("digits", "shapes") else [f"--data.root={place.root}"]
    quick = ["train", "val", "test"] if place.quick else []
    return [
        "-c",
        str(CONFIGS / f"{TASKS[task]}.yaml"),
        "-c",
        str(CONFIGS / "method" / f"{method}.yaml"),
        f"--model.backbone={BACKBONE}",
        f"--model.weights={place.root / WEIGHTS}",
        f"--data.batch_size={BATCH}",
        f"--trainer.max_epochs={epochs}",
        f"--trainer.check_val_every_n_epoch={-(-epochs // HALVING)}",
        "--trainer.precision=bf16-mixed",
        "--trainer.num_sanity_val_steps=0",
        *demo,
        *(f"--trainer.limit_{split}_batches=2" for split in quick),
    ]


def plan(place: Place, method: str) -> Plan:
    """Three rates by val200, then the seeds."""
    rates = [rate * 256 / BATCH for rate in METHODS[method]]
    return Plan({RATE: rates}, {"data.train": "train800"}, {"data.train": "train800val200"}, place.seeds, HALVING)


def run_cell(place: Place, task: str, method: str) -> None:
    """Runs what is missing of a cell and keeps its records."""
    if place.record(task, method) is not None:
        return
    folder, kept = place.build / task / method, place.out / task / method
    sweep(resolve(arguments(place, task, method)), plan(place, method), folder, serially)
    for seed in place.seeds:
        (record,) = folder.glob(f"test/*seed*{seed}/{RUN_FILE}")
        write_json(kept / f"seed-{seed}" / RUN_FILE, without_places(json.loads(record.read_text())))
        if seed == place.seeds[0] and (logits := record.with_name("test.parquet")).stat().st_size < 100_000:
            shutil.copyfile(logits, kept / f"seed-{seed}" / logits.name)
    write_json(kept / SWEEP_FILE, without_places(json.loads((folder / SWEEP_FILE).read_text())))


def run_transfer(place: Place, mode: Mode) -> None:
    """The matrix of one method and the first seed."""
    kept = place.out / f"transfer-{mode}.json"
    if kept.is_file():
        return
    matrix = transfer([_first_run(place, task) for task in TASKS], place.build / "transfer", serially, mode)
    write_json(kept, {"mode": mode, "method": TRANSFERRED, "seed": SEEDS[0], "accuracy": matrix})


def _first_run(place: Place, task: str) -> Path:
    """The run of the first seed, trained again where only its record is left."""
    run_cell(place, task, TRANSFERRED)
    found = place.record(task, TRANSFERRED) or {}
    again = replace(plan(place, TRANSFERRED), grid={RATE: [found["chosen"][RATE]]}, seeds=SEEDS[:1])
    folder = place.build / task / TRANSFERRED
    sweep(resolve(arguments(place, task, TRANSFERRED)), again, folder, serially)
    (run,) = folder.glob(f"test/*seed*{SEEDS[0]}")
    return run


def tables(place: Place) -> Iterator[str]:
    """What is there, as Markdown."""
    yield f"| method | {' | '.join(TASKS)} |\n|---|{'--:|' * len(TASKS)}"
    for method in METHODS:
        cells = {task: place.record(task, method) for task in TASKS}
        yield f"| `{method}` | {' | '.join(_accuracy(cell) for cell in cells.values())} |"
    yield f"\n| method | {' | '.join(TASKS)} | images/s |\n|---|{'--:|' * (len(TASKS) + 1)}"
    for method in METHODS:
        cells = {task: place.record(task, method) for task in TASKS}
        found = [cell for cell in cells.values() if cell is not None]
        seconds = sum(cell["seconds"] for cell in found)
        speed = f"{sum(cell['images'] for cell in found) / seconds:.1f}" if seconds else "–"
        yield f"| `{method}` | {' | '.join(_chosen(cell) for cell in cells.values())} | {speed} |"
    every = [cell for task in TASKS for method in METHODS if (cell := place.record(task, method)) is not None]
    if every:
        images, seconds = (sum(cell[key] for cell in every) for key in ("images", "seconds"))
        yield f"\n{len(every)} cells, {images:,} images in {seconds / 3600:.1f} h: {images / seconds:.1f} images/s."
    for mode in ("frozen", "init"):
        if (path := place.out / f"transfer-{mode}.json").is_file():
            matrix = json.loads(path.read_text())["accuracy"]
            yield f"\n| {mode}: from ↓ to → | {' | '.join(matrix)} |\n|---|{'--:|' * len(matrix)}"
            for source, row in matrix.items():
                yield f"| {source} | {' | '.join(f'{100 * value:.1f}' for value in row.values())} |"


def _accuracy(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "–"
    values = list(cell["tests"].values())
    return f"{100 * mean(values):.1f} ± {100 * stdev(values):.1f}"


def _chosen(cell: dict[str, Any] | None) -> str:
    return "–" if cell is None else f"{cell['chosen'][RATE] * BATCH / 256:.0e} ({100 * cell['val']:.1f})"


def command_line(about: str | None) -> argparse.ArgumentParser:
    """Flags of all commands on these records."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(default_root()))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/real_protocol"))
    parser.add_argument("--build", type=Path, default=Path("build/real_protocol"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--print", action="store_true", help="run nothing, print what is there")
    return parser


def main() -> None:
    """Runs what is missing and prints the tables."""
    parser = command_line(__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--transfer", nargs="*", choices=["frozen", "init"], help="then the transfer matrix")
    parser.add_argument("--quick", action="store_true", help="a rehearsal under BUILD/quick: two batches, two seeds")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out, build = (args.build / "quick/results", args.build / "quick") if args.quick else (args.out, args.build)
    place = Place(args.root, out, build, args.quick)
    if not args.print:
        for method in args.methods:
            for task in args.tasks:
                run_cell(place, task, method)
        for mode in args.transfer or ():
            run_transfer(place, mode)
    print(*tables(place), sep="\n")


if __name__ == "__main__":
    main()
