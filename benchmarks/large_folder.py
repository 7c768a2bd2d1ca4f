"""Hundreds of thousands of pictures in folders of classes: how soon the first batch is there, memory, first epochs.

    python -m benchmarks.large_folder [--images 300000] [--classes 100] [--size 224]
    python -m benchmarks.large_folder --print

The folder holds hard links to a few hundred generated JPEG files of 400 × 300 pixels. Each side runs in a process of
its own with two workers: vpt's data module, and torchvision's ImageFolder with the same resizing. Batches are taken in
the shuffled order of an epoch, then the same images once more. Memory is that of the process and its
workers together (PSS), without what the imports take.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.records import RESULTS, Records, Row, machine, markdown

BATCH, WORKERS, DIFFERENT = 64, 2, 200
SIDES = ("vpt", "ImageFolder")


def generate(folder: Path, images: int, classes: int) -> Path:
    """Hard links to files that are smooth as photos are; no more than 50,000 to one."""
    random, root = np.random.default_rng(0), folder / "photos"
    for number in range(classes):
        (root / f"class_{number:04d}").mkdir(parents=True)
    copies = -(-images // (50_000 * DIFFERENT))
    for number in range(DIFFERENT):
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        for copy in range(copies):
            coarse.resize((400, 300), Image.Resampling.BICUBIC).save(folder / f"{number}-{copy}.jpg", quality=90)
    for number in range(images):
        source = folder / f"{number % DIFFERENT}-{number // DIFFERENT % copies}.jpg"
        os.link(source, root / f"class_{number % classes:04d}" / f"{number:07d}.jpg")
    return root


def loader_of(side: str, root: Path, size: int) -> Callable[[], DataLoader[Any]]:
    """Lists the folder; returns what gives a loader of its images, the same ones in the same order each time."""
    import torch

    if side == "vpt":
        from vpt.data import FolderDataModule

        data = FolderDataModule(root, image_size=size, batch_size=BATCH, num_workers=WORKERS, seed=0)
        return data.train_dataloader
    from torchvision import datasets, transforms  # type: ignore[import-untyped]

    steps = [transforms.Resize((size, size), transforms.InterpolationMode.BICUBIC), transforms.PILToTensor()]
    images: Dataset[Any] = datasets.ImageFolder(str(root), transforms.Compose(steps))

    def loader() -> DataLoader[Any]:
        order = torch.Generator().manual_seed(0)
        return DataLoader(images, BATCH, shuffle=True, num_workers=WORKERS, generator=order)

    return loader


def memory() -> float:
    """MiB of this process and those that it has started; what they share counts once, files that they map do not."""
    total = 0
    for process in (os.getpid(), *children()):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return total / 1024


def children() -> Iterator[int]:
    """Processes that this one has started."""
    for task in Path("/proc/self/task").iterdir():
        yield from map(int, (task / "children").read_text().split())


def measure_side(side: str, root: Path, size: int, batches: int) -> Row:
    """Seconds and memory of one side in this process; importing it is not counted."""
    import torchvision.datasets  # type: ignore[import-untyped]  # noqa: F401

    import vpt.data.datasets.folder  # noqa: F401

    before, start = memory(), time.perf_counter()
    make = loader_of(side, root, size)
    listed = time.perf_counter()
    loader = make()
    taken = iter(loader)
    next(taken)
    first = time.perf_counter()
    for _ in itertools.islice(taken, batches - 1):
        pass
    read = time.perf_counter()
    taken_mib = memory() - before
    del taken, loader
    again = iter(make())
    next(again)
    begun = time.perf_counter()
    for _ in itertools.islice(again, batches - 1):
        pass
    ended = time.perf_counter()
    images = BATCH * (batches - 1)
    return {
        "list_s": listed - start,
        "first_batch_s": first - start,
        "first_images_per_s": images / (read - first),
        "again_images_per_s": images / (ended - begun),
        "memory_mib": taken_mib,
    }


def measure(images: int, classes: int, size: int, batches: int) -> Row:
    """Both sides, one after the other, each in a process of its own."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = generate(Path(scratch), images, classes)
        for side in SIDES:
            command = [sys.executable, "-m", "benchmarks.large_folder", "--side", side, "--root", str(root)]
            command += ["--size", str(size), "--batches", str(batches)]
            place = {**os.environ, "VPT_CACHE": f"{scratch}/cache"}
            ended = subprocess.run(command, env=place, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603  # ours
            found[side] = json.loads(ended.stdout.splitlines()[-1])
    return {"images": images, "classes": classes, "size": size, "batches": batches, **found, "machine": machine("cpu")}


_ROWS = {
    "list_s": ("folder listed, s", ".1f"),
    "first_batch_s": ("first batch, s", ".1f"),
    "first_images_per_s": ("images/s, first read", ",.0f"),
    "again_images_per_s": ("images/s, read again", ",.0f"),
    "memory_mib": (f"memory with {WORKERS} workers, MiB", ",.0f"),
}


def blocks(out: Path = RESULTS) -> dict[str, str]:
    """What is there as Markdown, a column for each number of images and side."""
    found = Records(out / "large_folder.jsonl", "images").rows()
    if not found:
        return {}
    heads = [f"{row['images']:,} images, {side}" for row in found for side in SIDES]
    lines = [
        [title, *(format(row[side][key], form) for row in found for side in SIDES)]
        for key, (title, form) in _ROWS.items()
    ]
    return {"large folder": markdown(["", *heads], lines)}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, keeps and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300_000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batches", type=int, default=100, help=f"of {BATCH} images, read twice")
    parser.add_argument("--side", choices=SIDES, help="measure only this one, of the folder --root")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--print", action="store_true", help="measure nothing, print what is there")
    args = parser.parse_args(argv)
    if args.side:
        print(json.dumps(measure_side(args.side, args.root, args.size, args.batches)))
        return
    if not args.print:
        row = measure(args.images, args.classes, args.size, args.batches)
        Records(args.out / "large_folder.jsonl", "images").put(row)
        print(row, file=sys.stderr)
    print(*blocks(args.out).values(), sep="\n\n")


if __name__ == "__main__":
    main()
