"""Tables of generated pictures with several labels each, or numbers, that a nano backbone can learn."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = ("red", "green", "blue")


def colour_table(folder: Path, images: int = 60, scale: float = 1.0, offset: float = 0.0) -> Path:
    """Pictures of stripes: ``tags`` are the colours that occur, and a column of 0 and 1 for each.

    ``light`` is offset + scale · mean brightness, ``share`` how many stripes are red.
    """
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "tags", *COLOURS, "light", "share", "split"])
        for number in range(images):
            there = random.random(3) < 0.5
            pixels = random.integers(0, 20, (32, 32, 3), dtype=np.uint8)  # no two alike
            for stripe in range(8):
                shown = np.flatnonzero(there)
                if len(shown):
                    pixels[4 * stripe : 4 * stripe + 4, :, shown[stripe % len(shown)]] = random.integers(80, 256)
            Image.fromarray(pixels).save(folder / f"{number}.png")
            split = ("train", "train", "val", "test")[number % 4]
            names = [name for name, is_there in zip(COLOURS, there, strict=True) if is_there]
            light, share = offset + scale * float(pixels.mean()) / 255, float((pixels[:, 0, 0] >= 80).mean())
            writer.writerow([f"{number}.png", "|".join(names), *map(int, there), light, share, split])
    return folder / "table.csv"
