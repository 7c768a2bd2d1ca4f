"""Speed of reading images: the first epoch, later epochs from the cache, and a plain torchvision pipeline.

    VPT_DATA=FOLDER python -m benchmarks.data [--task caltech101] [--batch 64] [--rounds 5]
    python -m benchmarks.data --print

Without VPT_DATA the images are generated. All pipelines do the same to each image (shorter side 248, bicubic, centre
crop 224) and are measured in turn, A B C A B C ...; medians are compared. Only the plain one makes float32.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms as T  # type: ignore[import-untyped]
from torchvision.datasets import ImageFolder  # type: ignore[import-untyped]

from benchmarks.records import RESULTS, Records, Row, machine, markdown
from vpt.backbones import create_backbone
from vpt.data import FolderDataModule, ImageDataModule, VTABDataModule
from vpt.data.cache import image_cache
from vpt.experiments.profile import interleaved
from vpt.models import TunedModel

SIZE = 224


def generate(folder: Path, count: int) -> None:
    """A task of JPEG files of 400 × 300 pixels, smooth as photos are."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        coarse.resize((400, 300), Image.Resampling.BICUBIC).save(folder / "images" / f"{number}.jpg", quality=90)
    lines = "".join(f"images/{number}.jpg\t{number % 10}\n" for number in range(count))
    for name in ("train800", "train800val200", "val200", "test"):
        (folder / f"{name}.txt").write_text(lines)


def as_class_folders(data: ImageDataModule, home: Path, folder: Path) -> Path:
    """Links the training images into the layout of ImageFolder."""
    split = data.split("train")
    for position, (path, label) in enumerate(zip(split.paths, split.labels, strict=True)):
        link = folder / f"{label:04d}" / f"{position}{Path(path).suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((home / path).resolve())
    return folder


def read(loader: Iterable[Any]) -> None:
    """One epoch in which nothing is done with a batch."""
    for _ in loader:
        pass


def pipelines(make: Callable[[], ImageDataModule], folder: Path, batch: int) -> dict[str, Callable[[], None]]:
    """An epoch of each."""
    steps = [T.Resize(248, T.InterpolationMode.BICUBIC), T.CenterCrop(SIZE), T.ToTensor()]
    plain = ImageFolder(str(folder), T.Compose(steps))
    cores = len(os.sched_getaffinity(0))

    def first() -> None:
        image_cache.clear()
        read(make().train_dataloader())

    data = make()
    return {
        "first epoch": first,
        "cached epoch": lambda: read(data.train_dataloader()),
        "cached, image by image": lambda: read(DataLoader(data.split("train"), batch, shuffle=True)),
        "plain, 0 workers": lambda: read(DataLoader(plain, batch, shuffle=True)),
        f"plain, {cores} workers": lambda: read(DataLoader(plain, batch, shuffle=True, num_workers=cores)),
    }


def share_of_training(data: ImageDataModule, backbone: str) -> Row:
    """Seconds that a training epoch of VPT-deep waits for the loader, and all of its seconds."""
    model = TunedModel(create_backbone(backbone, "random"), data.num_classes, [{"name": "prompt", "num_tokens": 10}])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    waited, start = 0.0, time.perf_counter()
    batches = iter(data.train_dataloader())
    while True:
        before = time.perf_counter()
        batch = next(batches, None)
        waited += time.perf_counter() - before
        if batch is None:
            break
        loss: Any = nn.functional.cross_entropy(model(batch["image"]), batch["label"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    return {"backbone": backbone, "batch": data.batch_size, "loader_s": waited, "epoch_s": seconds,
            "loader/epoch": waited / seconds}  # fmt: skip


SHAPES: dict[str, tuple[list[int], int | None]] = {
    "224 × 224, RGB": ([224, 224], None),
    "192 × 384, RGB": ([192, 384], None),
    "224 × 224, 12 channels": ([224, 224], 12),
}
"""Images in a cache: their size, and channels unless they are RGB."""


def by_shape(folder: Path, size: float, batch: int, rounds: int) -> dict[str, float]:
    """Bytes per second of an epoch from the cache, of generated images that have about so many bytes there."""
    random, runs, sizes = np.random.default_rng(0), [], []
    for place, (shape, channels) in enumerate(SHAPES.values()):
        pixel = 3 if channels is None else 4 * channels
        count = round(size / (pixel * shape[0] * shape[1]))
        for number in range(count + 4):  # two of each class beside the training images
            part = "train" if number < count else "val" if number < count + 2 else "test"
            home = folder / str(place) / part / f"class{number % 2}"
            home.mkdir(parents=True, exist_ok=True)
            if channels is None:
                Image.fromarray(random.integers(0, 256, (75, 100, 3), np.uint8)).save(home / f"{number}.png")
            else:
                np.save(home / f"{number}.npy", random.integers(0, 4000, (channels, 75, 100), np.uint16))
        own = max(1, round(batch * 3 * SIZE**2 / (pixel * shape[0] * shape[1])))  # as many bytes in a batch
        data = FolderDataModule(folder / str(place), image_size=shape, channels=channels, batch_size=own)
        sizes.append(len(data.split("train")) * pixel * shape[0] * shape[1])
        runs.append(partial(read, data.train_dataloader()))
    seconds = interleaved(runs, rounds)
    return {name: size / each for name, size, each in zip(SHAPES, sizes, seconds, strict=True)}


def blocks(out: Path = RESULTS) -> dict[str, str]:
    """What is there as Markdown, of caltech101 if that is among it."""
    found = _kept(out).find("caltech101") or next(iter(_kept(out).rows()), None)
    if found is None:
        return {}
    speed, training = found["images_per_s"], found["training"]
    rows = [
        [name.replace("plain", "ImageFolder"), f"{value:,.0f}", f"{value / speed['plain, 0 workers']:.2f}"]
        for name, value in speed.items()
    ]
    shapes = found.get("shapes_bytes_per_s", {})
    square = next(iter(shapes.values()), 1.0)
    lines = [[name, f"{value / 1e9:.1f}", f"{value / square:.2f}"] for name, value in shapes.items()]
    waited = f"{100 * training['loader/epoch']:.2f} %"
    made = {"data shapes": markdown(["epoch from the cache", "GB/s", "ratio to square RGB"], lines)} if shapes else {}
    return made | {
        "data": markdown(["reading", "images/s", "speed-up over ImageFolder, 0 workers"], rows),
        "data cache": f"{found['images']:,} training images of {found['task']} in batches of {found['batch']}; "
        f"{found['cache_bytes_per_1000_images'] / 1e6:.1f} MB of cache for 1,000 images of {SIZE} × {SIZE}; an epoch "
        f"of VPT-deep on {training['backbone']} waits {waited} of its time for images from the cache.",
    }


def _kept(out: Path) -> Records:
    return Records(out / "data.jsonl", "task")


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, keeps and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="caltech101", help="below VPT_DATA")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=1000, help="generated without VPT_DATA")
    parser.add_argument("--training-batch", type=int, default=10, help="as in configs/vtab")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--print", action="store_true", help="measure nothing, print what is there")
    args = parser.parse_args(argv)
    if not args.print:
        result = measure(args)
        _kept(args.out).put(result)
        print(result, file=sys.stderr)
    print(*blocks(args.out).values(), sep="\n\n")


def measure(args: argparse.Namespace) -> Row:
    """All pipelines on one task."""
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["VPT_CACHE"] = f"{scratch}/cache"
        root, task = Path(os.environ.get("VPT_DATA", scratch)), args.task
        if "VPT_DATA" not in os.environ:
            task = "generated"
            generate(root / task, args.images)

        def make(batch: int = args.batch) -> VTABDataModule:
            return VTABDataModule(task, root=root, preset="timm", image_size=SIZE, batch_size=batch)

        folder = as_class_folders(make(), root / task, Path(scratch) / "folder")
        runs = pipelines(make, folder, args.batch)
        count = len(make().split("train"))
        speed = [count / seconds for seconds in interleaved(list(runs.values()), args.rounds)]
        files, size = image_cache.usage()
        shapes = by_shape(Path(scratch) / "shapes", 2e8, args.batch, args.rounds)
        return {
            "machine": machine("cpu"),
            "task": task,
            "images": count,
            "batch": args.batch,
            "images_per_s": dict(zip(runs, speed, strict=True)),
            "cache_bytes_per_1000_images": size * 1000 / count / files,
            "shapes_bytes_per_s": shapes,
            "training": share_of_training(make(args.training_batch), args.backbone),
        }


if __name__ == "__main__":
    main()
