"""Tuned on one domain of PACS, measured on the other three, all four ways: a table of docs/robustness.md.

    python -m benchmarks.domains --root $VPT_DATA [--methods recipe ...] [--seeds 42 ...] [--threads 1]
    python -m benchmarks.domains --print

The question of ImageNet-RIB (Hwang et al., 2024) on what is at hand: 420 images of each domain, of which 294 are
trained on and 84 tested, and all 420 of every other domain are its shifts. Rates are those that val200 chose for
photos, so that no image of this table chose anything. A finished training is a line of OUT/domains.jsonl.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.records import RESULTS, Records, Row, markdown
from benchmarks.robustness_runs import (
    BATCH,
    METHODS,
    PACS_RATES,
    SEEDS,
    WEIGHTS,
    Place,
    _read,
    fit,
    select,
    trials,
)
from vpt.data import ImageDataModule, default_root
from vpt.data.datasets.published_files import hold_out
from vpt.data.list_files import read_list
from vpt.data.splits import listed_split
from vpt.data.transforms import get_preset
from vpt.robustness import run
from vpt.robustness.evaluation_sets import CLEAN

DOMAINS = {"photo": "test", "art_painting": "shift_art_painting", "cartoon": "shift_cartoon", "sketch": "shift_sketch"}
"""And the lists of pacs7_photo that they are."""
RUNS = ("deep", "full", "lora", "shallow", "recipe")
PRESET, PENALTY, EPOCHS = "square", 0.1, 8
ALPHAS = (0.5, 1.0)
CLASSES = 7


class Domain(ImageDataModule):
    """420 images of one domain of PACS in three parts, and all of the others as shifts."""

    def __init__(self, root: str, domain: str, seed: int = 0, image_size: int = 224) -> None:
        """Reads the lists: 84 images to test, 42 to validate and 294 to train on."""
        folder = Path(root) / "pacs7_photo"
        lists = {name: read_list(folder / f"{file}.txt", folder) for name, file in DOMAINS.items()}
        tuned, test = hold_out(lists.pop(domain), 5)
        train, val = hold_out(tuned, 8)
        parts = {"train": train, "val": val, "test": test, **lists}
        splits = {
            name: listed_split(f"pacs7_{domain}/{name}", part, get_preset(PRESET), image_size)
            for name, part in parts.items()
        }
        names = [str(label) for label in range(CLASSES)]
        super().__init__(f"pacs7_{domain}", names, splits, PRESET, image_size, BATCH, 0, seed, "none", None)


def _section(place: Place, domain: str, seed: int) -> dict[str, Any]:
    args = {"root": str(place.root), "domain": domain, "seed": seed, "image_size": 224}
    return {"class_path": "benchmarks.domains.Domain", "init_args": args}


def run_domains(place: Place, methods: Sequence[str], seeds: Sequence[int]) -> None:
    """Makes what is missing: of every domain the exact probe, which is α = 0 of the others, then each method."""
    kept = Records(place.out / "domains.jsonl", "domain", "method", "seed")
    for seed, method, domain in product(seeds, methods, DOMAINS):
        if kept.find(domain, method, seed) is None:
            kept.put({"domain": domain, "method": method, "seed": seed, **_measured(place, domain, method, seed)})


def _measured(place: Place, domain: str, method: str, seed: int) -> Row:
    train = partial(fit, place, epochs=EPOCHS)
    probe, name, section = f"{domain}-linear", f"{domain}-{method}-{seed}", _section(place, domain, seed)
    fit(place, probe, "linear", _section(place, domain, SEEDS[0]), [PENALTY], SEEDS[0], 1)
    tried = [trials(RESULTS, "pacs").find(f"pacs-{method}-{rate:g}-{SEEDS[0]}") for rate in PACS_RATES[method]]
    rate = select([each for each in tried if each is not None])
    found = train(name, method, section, rate, seed)
    out, images = place.build / "domains" / name, 20 if place.quick else None
    options: dict[str, Any] = {"batch_size": 16, "weights": str(place.weights), "bf16": True}
    alphas = (0.0, *ALPHAS)
    result = run(place.delta(name), _read(section), alphas, out, place.delta(probe), images, (), **options)
    sets = dict.fromkeys(("test", *(other for other in DOMAINS if other != domain)))
    top1 = {each: [round(row.top1, 6) for row in result.rows if row.set == _named(each)] for each in sets}
    return {"rate": rate, "epochs": EPOCHS, "train_n": found["train_n"], "alphas": list(alphas), "top1": top1}


def _named(name: str) -> str:
    return CLEAN if name == "test" else name


def blocks(out: Path = RESULTS) -> dict[str, str]:
    """What is there, as Markdown."""
    rows = Records(out / "domains.jsonl").rows()
    if not rows:
        return {}
    methods = [method for method in RUNS if any(row["method"] == method for row in rows)]
    lines = [["linear probe, exact", "–", *(_cell(_own(rows, methods[0], domain), 0) for domain in DOMAINS), "0"]]
    for method in methods:
        for at, alpha in enumerate(ALPHAS, 1):
            own = {domain: _own(rows, method, domain) for domain in DOMAINS}
            gains = [mean(gain(row, at) for row in same) for same in zip(*own.values(), strict=False)]
            spread = f" ± {stdev(gains):.1f}" if len(gains) > 1 else ""
            cells = [_cell(found, at) for found in own.values()]
            last = f"{mean(gains):+.1f}{spread}" if gains else "–"
            lines.append([METHODS[method].title, f"{alpha:g}", *cells, last])
    head = [f"trained on {domain}" for domain in DOMAINS]
    return {"domains": markdown(["own test / other three domains", "α", *head, "over the probe under shift"], lines)}


def _own(rows: Sequence[Row], method: str, domain: str) -> list[Row]:
    found = [row for row in rows if (row["method"], row["domain"]) == (method, domain)]
    return sorted(found, key=lambda row: SEEDS.index(row["seed"]))


def shifted(row: Row, at: int) -> float:
    """Mean over the other three domains, in percent."""
    return 100 * mean(float(values[at]) for name, values in row["top1"].items() if name != "test")


def gain(row: Row, at: int) -> float:
    """What tuning gains over the probe under shift, in points (ImageNet-RIB's robustness improvement)."""
    return shifted(row, at) - shifted(row, 0)


def _cell(rows: Sequence[Row], at: int) -> str:
    if not rows:
        return "–"
    shifts = [shifted(row, at) for row in rows]
    spread = f" ± {stdev(shifts):.1f}" if len(rows) > 1 and at else ""
    return f"{100 * mean(row['top1']['test'][at] for row in rows):.1f} / {mean(shifts):.1f}{spread}"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(default_root()))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--build", type=Path, default=Path("build/robustness"))
    parser.add_argument("--methods", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), choices=list(SEEDS))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--print", action="store_true", help="run nothing, print what is there")
    parser.add_argument("--quick", action="store_true", help="a rehearsal: two batches, 20 images a set")
    args = parser.parse_args(argv)
    if not args.print:
        torch.set_num_threads(args.threads)
        run_domains(Place(args.root, args.root / WEIGHTS, args.out, args.build, args.quick), args.methods, args.seeds)
    print(*blocks(args.out).values(), sep="\n\n")


if __name__ == "__main__":
    main()
