"""What happens to tuned models when the data shift: the tables of the documentation, on real weights and images.

    python -m benchmarks.robustness_tables --root $VPT_DATA [--parts imagenet pacs own_head fewshot] [--threads 1]

Validation images choose, test images are read once, as each table says. Every finished trial is one small JSON file
under --out, so that an interrupted run continues where it stopped and loses one trial at most; delta files and records
stay under --build.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

import torch

from benchmarks import robustness_fewshot, robustness_imagenet, robustness_own_head, robustness_pacs
from benchmarks.robustness_trials import WEIGHTS, Place
from vpt.data import default_root
from vpt.reports.style import save_figure

PARTS = {
    "imagenet": robustness_imagenet,
    "pacs": robustness_pacs,
    "own_head": robustness_own_head,
    "fewshot": robustness_fewshot,
}
FIGURES = {
    "pacs": robustness_pacs.figure,
    "own_head": robustness_own_head.figure,
    "fewshot": robustness_fewshot.figure,
}


def main() -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(default_root()))
    parser.add_argument("--weights", type=Path, help=f"default: ROOT/{WEIGHTS}")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/robustness_tables"))
    parser.add_argument("--build", type=Path, default=Path("build/robustness_tables"), help="delta files and records")
    parser.add_argument("--figures", type=Path, default=Path("docs"), help="folder of the figures")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--print", action="store_true", help="run nothing, print what is there")
    parser.add_argument(
        "--quick", action="store_true", help="a rehearsal under BUILD/quick: two batches, 20 images a set, three α"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    out, build = (args.build / "quick/results", args.build / "quick") if args.quick else (args.out, args.build)
    figures = args.build / "quick" if args.quick else args.figures
    place = Place(args.root, args.weights or args.root / WEIGHTS, out, build, args.quick)
    for name in args.parts:
        part = PARTS[name]
        if not args.print:
            part.execute(place)
        print(f"## {name}\n\n{part.table(place)}\n", flush=True)
        if name in FIGURES:
            print(f"figure: {save_figure(FIGURES[name](place), figures / f'robustness_{name}.png')}\n", flush=True)


if __name__ == "__main__":
    main()
