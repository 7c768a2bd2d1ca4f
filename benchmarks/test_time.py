"""Adapting at test time under corruptions, beside the model as it is: table of docs/robustness.md.

    python -m benchmarks.test_time --root $VPT_DATA [--threads 1]
    python -m benchmarks.test_time --print

The weights' own ImageNet classifier answers 200 photos, clean and under five corruptions at two severities, in batches
of 25 and bfloat16; each way in a process of its own, whose peak memory is noted. A finished way is a line of
OUT/test_time.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.records import RESULTS, Records, Row, markdown
from benchmarks.robustness_runs import WEIGHTS, Photos, Place, _own_head
from vpt.data import default_root
from vpt.data.corruptions import BASIC, PUBLISHED
from vpt.robustness import run

WAYS = {"none": "as it is", "entropy": "entropy minimisation", "foa": "FOA", "fozo": "FOZO"}
SEVERITIES = (3, 5)
IMAGES, BATCH = 200, 25


class Clean(Photos):
    """The photos alone."""

    def shift_names(self) -> list[str]:
        """None: corruptions are the shift."""
        return []


def measured(place: Place, way: str) -> Row:
    """Answers all sets in this process."""
    data = Clean(str(place.root), halves=True)
    head, out = _own_head(place, data), place.build / "test_time" / way
    before, start = _peak(), time.monotonic()
    options: dict[str, Any] = {"weights": str(place.weights), "adapt": None if way == "none" else way, "bf16": True}
    images = 20 if place.quick else IMAGES
    result = run(head, data, (1.0,), out, None, images, SEVERITIES, 10 if place.quick else BATCH, **options)
    seconds = (time.monotonic() - start) / sum(row.n for row in result.rows)
    sets = {row.set: round(row.top1, 6) for row in result.rows}
    told = {"way": way, "n": images, "sets": sets, "protocol": result.protocol.get("adapt"), "corruptions": PUBLISHED}
    return told | {"seconds_per_image": round(seconds, 5), "megabytes": round(_peak() - before)}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def blocks(out: Path = RESULTS) -> dict[str, str]:
    """What is there, as Markdown."""
    rows = {row["way"]: row for row in Records(out / "test_time.jsonl").rows()}
    lines = []
    for way, name in WAYS.items():
        if (row := rows.get(way)) is None:
            continue
        at = [mean(row["sets"][f"{kind}-{severity}"] for kind in BASIC) for severity in SEVERITIES]
        cells = [f"{100 * value:.1f}" for value in (row["sets"]["clean"], *at)]
        lines.append([name, *cells, f"{1000 * row['seconds_per_image']:.0f}", f"{row['megabytes']:,}"])
    head = [f"mean of five corruptions, severity {severity}" for severity in SEVERITIES]
    titles = [f"n = {IMAGES}, top-1 in %", "clean", *head, "ms an image", "MiB above the loaded model"]
    return {"test time": markdown(titles, lines)} if lines else {}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(default_root()))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--build", type=Path, default=Path("build/robustness"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", choices=list(WAYS), help="this way, in this process, as a line of JSON")
    parser.add_argument("--print", action="store_true", help="run nothing, print what is there")
    parser.add_argument("--quick", action="store_true", help="a rehearsal: 20 images a set")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    place = Place(args.root, args.root / WEIGHTS, args.out, args.build, args.quick)
    if args.only is not None:
        print(json.dumps(measured(place, args.only)))
        return
    kept = Records(args.out / "test_time.jsonl", "way")
    for way in () if args.print else WAYS:
        if kept.find(way) is None:
            again = [sys.executable, "-m", "benchmarks.test_time", "--only", way, "--root", str(args.root)]
            again += ["--build", str(args.build), "--threads", str(args.threads), *["--quick"] * args.quick]
            found = subprocess.run(again, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603 - this program
            kept.put(json.loads(found.stdout.splitlines()[-1]))
    print(*blocks(args.out).values(), sep="\n\n")


if __name__ == "__main__":
    main()
