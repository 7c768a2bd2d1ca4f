"""Plain JPEG files decoded by simplejpeg (`pip install 'vpt[jpeg]'`) and by Pillow, interleaved medians.

    VPT_DATA=FOLDER python -m benchmarks.decoding [--photos 300] [--rounds 5]
    python -m benchmarks.decoding --print

Photographs of caltech101 and flickr_in1k_1000 of that folder, both ways to the same array of RGB.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from benchmarks.records import RESULTS, Records, Row, machine, markdown
from vpt.data import images
from vpt.data.images import LeftOut, decode_rgb, find_images

SETS = ("caltech101", "flickr_in1k_1000")


def decoded(paths: Sequence[Path], fast: bool) -> list[NDArray[np.uint8]]:
    """The pixels of all images."""
    with patch.object(images, "_simplejpeg", images._simplejpeg if fast else lambda: None):
        return [np.asarray(decode_rgb(path)) for path in paths]


def measure(folder: Path, name: str, photos: int, rounds: int) -> Row:
    """Milliseconds an image of both, and how many images differ in a pixel."""
    paths = [
        path for path in map(Path, find_images(folder / name, LeftOut())) if path.suffix.lower() in (".jpg", ".jpeg")
    ]
    paths = paths[:photos]
    ways: dict[str, Callable[[], list[NDArray[np.uint8]]]] = {
        "Pillow": lambda: decoded(paths, False),
        "simplejpeg": lambda: decoded(paths, True),
    }
    pairs = zip(*(way() for way in ways.values()), strict=True)  # this warms the file cache, too
    differing = sum(not np.array_equal(one, other) for one, other in pairs)
    spent: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, call in ways.items():
            start = time.perf_counter()
            call()
            spent[way].append(1000 * (time.perf_counter() - start) / len(paths))
    medians = {way: statistics.median(each) for way, each in spent.items()}
    return {"images": name, "photos": len(paths), "ms": medians, "differing": differing, "machine": machine("cpu")}


def _kept(out: Path) -> Records:
    return Records(out / "decoding.jsonl", "images")


def blocks(out: Path = RESULTS) -> dict[str, str]:
    """What is there, as Markdown."""
    rows = [
        [
            *(row["images"], row["photos"]),
            *(f"{row['ms'][way]:.2f}" for way in ("Pillow", "simplejpeg")),
            f"{row['ms']['simplejpeg'] / row['ms']['Pillow']:.2f}",
            row["differing"],
        ]
        for row in _kept(out).rows()
    ]
    head = ["images", "JPEG files", "Pillow (ms a file)", "simplejpeg", "ratio", "files that differ in a pixel"]
    return {"decoding": markdown(head, rows)} if rows else {}


def main(args: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--print", action="store_true", help="measure nothing")
    options = parser.parse_args(args)
    if not options.print:
        folder = Path(os.environ["VPT_DATA"])
        _kept(options.out).put(*(measure(folder, name, options.photos, options.rounds) for name in SETS))
    for block in blocks(options.out).values():
        print(block)


if __name__ == "__main__":
    main()
