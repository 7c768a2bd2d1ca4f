"""Whole trials that train together, against one after another: trials an hour, and on a card Ray with shares of it.

    python -m benchmarks.together [--backbone vit_nano_patch8_64] [--batches 10 64] [--together 1 2 4 8] [--rounds 3]
    python -m benchmarks.together --backbone vit_base_patch16_224 --images 800 --precision bf16-mixed   # on a card
    python -m benchmarks.together --print

A trial trains ten deep prompts on digits, 128 images in its own order, and writes its files; starting up counts. Rounds
are interleaved. On a processor the time is the processor's, which other programs on the machine lengthen less.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import RESULTS, Records, Row, machine, markdown
from vpt.backbones.bundled import weights_file
from vpt.cli.warning_filters import hush
from vpt.errors import VPTError
from vpt.experiments.executors import Engine, RayEngine, serially
from vpt.experiments.trial import Config, Failure, Trial

APART, TOGETHER, RAY = "apart", "together", "ray"


def trials(options: Mapping[str, Any], batch: int, number: int) -> list[Trial]:
    """Trials of so many images a step that differ in rate and seed."""
    name = options["backbone"]
    model = {"backbone": name, "weights": "pretrained" if weights_file(name).is_file() else "random", "num_tokens": 10}
    steps = -(-options["images"] // batch)
    trainer = {"max_epochs": 1, "limit_train_batches": steps, "limit_val_batches": 0}
    trainer |= {"devices": 1, "precision": options["precision"]}
    data = {"class_path": "vpt.data.DigitsDataModule", "init_args": {"train": "train800", "batch_size": batch}}
    found = []
    for place in range(number):
        args = {"class_path": "vpt.tasks.PromptTuning", "init_args": model | {"base_lr": 0.01 * (place + 1)}}
        config: Config = {"seed_everything": place, "trainer": trainer, "model": args, "data": data}
        found.append(Trial(str(place), config))
    return found


def ways(number: int, device: str) -> dict[str, Engine]:
    """How so many trials are run."""
    found: dict[str, Engine] = {APART: serially, TOGETHER: partial(serially, together=number)}
    if device == "cuda":
        cpus = max(1, (os.cpu_count() or 1) // number)
        found[RAY] = RayEngine(None, cpus, 1 / number, number)
    return found


def measure(options: Mapping[str, Any], batch: int, numbers: Sequence[int], rounds: int, device: str) -> list[Row]:
    """A row for each number of trials: how many of them an hour, each way, medians of the rounds."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    seconds: dict[tuple[int, str], list[float]] = {}
    for round_ in range(rounds + 1):  # the first to warm up
        for number in numbers if round_ or device == "cuda" else numbers[:1]:
            for way, engine in ways(number, device).items():
                with tempfile.TemporaryDirectory() as folder:
                    start = clock()
                    found = engine(trials(options, batch, number), Path(folder))
                    taken = clock() - start
                if failed := [each.reason for each in found.values() if isinstance(each, Failure)]:
                    raise VPTError(failed[0])
                if round_:
                    seconds.setdefault((number, way), []).append(taken)
    return [
        {**options, "batch": batch, "trials": number, "machine": machine(device)}
        | {way: 3600 * number / statistics.median(seconds[number, way]) for way in ways(number, device)}
        for number in numbers
    ]


def blocks(out: Path = RESULTS) -> dict[str, str]:
    """What is there, as Markdown."""
    rows = _kept(out).rows()
    if not rows:
        return {}
    on_ray = any(RAY in row for row in rows)
    lines = []
    for row in rows:
        speeds = [f"{row[way]:.0f}" if way in row else "–" for way in (APART, TOGETHER, *[RAY] * on_ray)]
        lines.append([row["backbone"], row["batch"], row["trials"], *speeds, f"{row[TOGETHER] / row[APART]:.2f}"])
    head = ["backbone", "batch", "trials", "one after another, trials/hour", "together"]
    return {
        "together": markdown([*head, *["on Ray, shares of a card"] * on_ray, "together / one after another"], lines)
    }


def _kept(out: Path) -> Records:
    return Records(out / "together.jsonl", "backbone", "batch", "trials", "precision")


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, keeps and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_nano_patch8_64")
    parser.add_argument("--batches", type=int, nargs="+", default=[10, 64])
    parser.add_argument("--together", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--images", type=int, default=128, help="that a trial trains on")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--print", action="store_true", help="measure nothing, print what is there")
    args = parser.parse_args(argv)
    if not args.print:
        torch.set_num_threads(args.threads)
        hush()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        options = {name: getattr(args, name) for name in ("backbone", "images", "precision")}
        with _cluster(device):
            for batch in args.batches:
                _kept(args.out).put(*measure(options, batch, args.together, args.rounds, device))
    print(*blocks(args.out).values(), sep="\n\n")


@contextmanager
def _cluster(device: str) -> Iterator[None]:
    """Ray's processes, which stay from one round to the next, where a card is shared."""
    if device != "cuda":
        yield
        return
    import ray

    ray.init("local", log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    try:
        yield
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
