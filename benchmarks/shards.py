"""Speed of a first epoch from folders, tar shards and Parquet, beside torchvision's ImageFolder: table of docs/data.md.

    python -m benchmarks.shards --root $VPT_DATA [--task caltech101] [--rounds 5]
    python -m benchmarks.shards --print

The training images of a task are packed three ways. Every way reads each image once, in random order, decodes it and
scales it (shorter side 248, bicubic, centre crop 224); nothing is kept from round to round. All are measured in turn.
The floor is the JPEG decoding of Pillow alone, from bytes that are in memory, by one core.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms as T  # type: ignore[import-untyped]
from torchvision.datasets import ImageFolder  # type: ignore[import-untyped]

from benchmarks.data import SIZE, read
from benchmarks.records import RESULTS, Records, Row, machine, markdown
from vpt.data import FolderDataModule, VTABDataModule, default_root
from vpt.data.cache import image_cache
from vpt.experiments.profile import interleaved

SHARDS, GROUP, BATCH = 4, 100, 64
PACKED = ("folder", "tar", "parquet")
PLAIN = "ImageFolder"


def pack(task: str, root: Path, home: Path) -> list[Path]:
    """Writes the training images as class folders, tar shards and Parquet, and lists the files."""
    split = VTABDataModule(task, root=root, preset="timm").split("train")
    files = [root / task / path for path in split.paths]
    labels = [f"{label:04d}" for label in split.labels.tolist()]
    for name in ("folder/train", "tar", "parquet"):
        (home / name).mkdir(parents=True)
    for number, (file, label) in enumerate(zip(files, labels, strict=True)):
        target = home / "folder/train" / label / f"{number:06d}{file.suffix}"
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    for shard in range(SHARDS):
        rows = range(shard, len(files), SHARDS)
        with tarfile.open(home / f"tar/train-{shard:04d}.tar", "w") as archive:
            for number in rows:
                archive.add(files[number], f"{number:06d}{files[number].suffix}")
                said = tarfile.TarInfo(f"{number:06d}.cls")
                said.size = len(labels[number])
                archive.addfile(said, io.BytesIO(labels[number].encode()))
        images = [{"bytes": files[number].read_bytes(), "path": files[number].name} for number in rows]
        table = pa.table({"image": images, "label": [labels[number] for number in rows]})
        pq.write_table(table, home / f"parquet/train-{shard:05d}-of-{SHARDS:05d}.parquet", row_group_size=GROUP)
    return files


def ways(home: Path, files: Sequence[Path]) -> dict[str, Callable[[], None]]:
    """A first epoch of each."""
    cores = len(os.sched_getaffinity(0))
    contents = [file.read_bytes() for file in files]
    steps = [T.Resize(248, T.InterpolationMode.BICUBIC), T.CenterCrop(SIZE), T.ToTensor()]
    plain = ImageFolder(str(home / "folder/train"), T.Compose(steps))

    def packed(name: str) -> Callable[[], None]:
        def run() -> None:
            image_cache.clear()
            read(_data(home, name).train_dataloader())

        return run

    def decode() -> None:
        for content in contents:
            Image.open(io.BytesIO(content)).convert("RGB").load()

    found = {name: packed(name) for name in PACKED}
    found[f"{PLAIN}, {cores} workers"] = lambda: read(DataLoader(plain, BATCH, shuffle=True, num_workers=cores))
    return found | {"decoding in memory, one core": decode}


def measure(task: str, root: Path, rounds: int) -> Row:
    """All ways, in images a second."""
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["VPT_CACHE"] = f"{scratch}/cache"
        home = Path(scratch)
        files = pack(task, root, home)
        runs = ways(home, files)
        shares = [*(len(_train(home, name)) for name in PACKED), len(files), len(files)]
        seconds = interleaved(list(runs.values()), rounds)
        speed = {name: n / each for name, n, each in zip(runs, shares, seconds, strict=True)}
        size = sum(file.stat().st_size for file in files) / len(files)
        return {"task": task, "images": len(files), "bytes": round(size), "images_per_s": speed} | {
            "machine": machine("cpu")
        }


def _data(home: Path, name: str) -> FolderDataModule:
    return FolderDataModule(home / name, preset="timm", image_size=SIZE, batch_size=BATCH)


def _train(home: Path, name: str) -> Sequence[str]:
    """The images that an epoch reads: what is held out to validate on is not among them."""
    return _data(home, name).split("train").paths


def blocks(out: Path = RESULTS) -> dict[str, str]:
    """What is there, as Markdown."""
    rows = Records(out / "shards.jsonl").rows()
    if not rows:
        return {}
    found = rows[0]["images_per_s"]
    plain = next(value for name, value in found.items() if name.startswith(PLAIN))
    lines = [[name, f"{value:,.0f}", f"{value / plain:.2f}"] for name, value in found.items()]
    title = f"first epoch of {rows[0]['images']:,} images of {rows[0]['bytes'] / 1000:.0f} kB"
    return {"shards": markdown([title, "images/s", f"ratio to {PLAIN}"], lines)}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, keeps and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(default_root()))
    parser.add_argument("--task", default="caltech101", help="below the root")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--print", action="store_true", help="measure nothing, print what is there")
    args = parser.parse_args(argv)
    if not args.print:
        Records(args.out / "shards.jsonl", "task").put(measure(args.task, args.root, args.rounds))
    print(*blocks(args.out).values(), sep="\n\n")


if __name__ == "__main__":
    main()
