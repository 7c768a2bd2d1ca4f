"""`predict` on photos against nothing but decoding them and forward passes, interleaved medians.

    VPT_DATA=FOLDER python -m benchmarks.prediction [--photos 200] [--rounds 3]
    python -m benchmarks.prediction --print

Photographs of flickr_in1k_1000 of that folder, ViT-Ti/16, batches of 64. The other side decodes and resizes one photo
after another, then passes the batch; `predict` decodes the next batches meanwhile.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.records import RESULTS, Records, Row, machine, markdown
from vpt.backbones import create_backbone
from vpt.data import PRESETS
from vpt.data.images import LeftOut, decode_rgb, find_images
from vpt.models import TunedModel

NAME = "vit_tiny_patch16_224"
WEIGHTS = f"weights/{NAME}.augreg_in21k_ft_in1k.safetensors"
BATCH = 64


def measure(root: Path, photos: int, rounds: int) -> Row:
    """Milliseconds a photo of both."""
    preset = PRESETS["square"]
    model = TunedModel(create_backbone(NAME, str(root / WEIGHTS)), 10, preset=preset.to_dict()).eval()
    paths = [Path(path) for path in find_images(root / "flickr_in1k_1000" / "images", LeftOut())[:photos]]

    def plain() -> None:
        for start in range(0, len(paths), BATCH):
            pixels = np.stack([preset(decode_rgb(path), 224) for path in paths[start : start + BATCH]])
            with torch.inference_mode():
                model(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())

    ways: dict[str, Callable[[], object]] = {"decoding and passes": plain, "predict": lambda: model.predict(paths)}
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):  # the first warms the file cache
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number:
                spent[name].append(1000 * (time.perf_counter() - start) / len(paths))
    medians = {name: statistics.median(each) for name, each in spent.items()}
    return {"photos": len(paths), "ms": medians, "threads": torch.get_num_threads(), "machine": machine("cpu")}


def _kept(out: Path) -> Records:
    return Records(out / "prediction.jsonl", "photos")


def blocks(out: Path = RESULTS) -> dict[str, str]:
    """What is there, as Markdown."""
    rows = []
    for row in _kept(out).rows():
        plain, ours = (row["ms"][name] for name in ("decoding and passes", "predict"))
        rows.append([row["photos"], row["threads"], f"{plain:.1f}", f"{ours:.1f}", f"{ours / plain:.2f}"])
    head = ["photos", "threads", "decoding and forward passes (ms a photo)", "`predict`", "ratio"]
    return {"prediction": markdown(head, rows, 0)} if rows else {}


def main(args: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--print", action="store_true", help="measure nothing")
    options = parser.parse_args(args)
    if not options.print:
        _kept(options.out).put(measure(Path(os.environ["VPT_DATA"]), options.photos, options.rounds))
    for block in blocks(options.out).values():
        print(block)


if __name__ == "__main__":
    main()
