"""The demo and the comparison of segmentation methods, read from what their own commands leave behind.

python -m benchmarks.examples --demo runs/demo                    # after `make demo`
python -m benchmarks.examples --segmentation runs/shape_scenes    # after the commands of docs/segmentation.md
python -m benchmarks.examples --print
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.records import RESULTS, Records, Row, markdown
from vpt.robustness.evaluation_result import RESULT_FILE
from vpt.run_record import RUN_FILE

DEMO = {"linear": "linear probe", "vpt_deep": "VPT-deep, 10 tokens"}
SCENES = {"frozen": "frozen, head only", "prompt": "VPT-deep, 10 prompts", "full": "full fine-tuning"}
"""By folder of the run."""


def read_demo(folder: Path, out: Path) -> None:
    """Keeps what `make demo` has found."""
    for method, title in DEMO.items():
        run = json.loads((folder / "digits" / method / "version_0" / RUN_FILE).read_text())
        _demo(out).put(
            {
                "table": "accuracy",
                "name": title,
                "trained": run["parameters"]["trainable"],
                "epochs": run["epochs"],
                "n": run["read"]["test"],
                "test": run["metrics"]["test/acc"],
            }
        )
    result = folder / "digits" / "vpt_deep" / "version_0" / "robustness" / RESULT_FILE
    shifts: dict[str, Row] = {}
    for row in (row for row in json.loads(result.read_text())["rows"] if row["kind"] != "val-corrupted"):
        name = row["set"] if row["severity"] is None else f"{row['kind'].replace('_', ' ')}, severity {row['severity']}"
        kept = shifts.setdefault(name, {"table": "shift", "name": name, "n": row["n"], "top1": {}})
        kept["top1"][f"{row['alpha']:g}"] = row["top1"]
    _demo(out).put(*shifts.values())


def read_segmentation(folder: Path, out: Path) -> None:
    """Keeps what the runs on generated scenes have found."""
    for method, title in SCENES.items():
        run = json.loads((folder / method / "version_0" / RUN_FILE).read_text())
        metrics, rate = run["metrics"], run["hyperparameters"]["base_lr"]
        before = _scenes(out).find(title) or {"tried": {}}
        _scenes(out).put(
            {
                "method": title,
                "trained": run["parameters"]["trainable"],
                "base_lr": rate,
                "miou": metrics["test/miou"],
                "pixel_acc": metrics["test/pixel_acc"],
                "val": metrics["val/miou"],
                "iou": {key.rpartition("/")[2]: value for key, value in metrics.items() if key.startswith("test/iou/")},
                "tried": before["tried"] | {f"{rate:g}": metrics["val/miou"]},
            }
        )


def blocks(out: Path = RESULTS) -> dict[str, str]:
    """What is there, as Markdown."""
    found = _demo(out).rows()
    rows = [
        [row["name"], f"{row['trained']:,}", row["epochs"], _percent(row["test"])]
        for row in found
        if row["table"] == "accuracy"
    ]
    made = {"demo": markdown(["method", "trainable parameters", "epochs", "test top-1"], rows)}
    shifts = [row for row in found if row["table"] == "shift"]
    if shifts:
        alphas = list(shifts[0]["top1"])
        rows = [[row["name"], *map(_percent, row["top1"].values())] for row in shifts]
        corrupted = [row["top1"] for row in shifts if "severity" in row["name"]]
        label = f"mean of the {len(corrupted)} corruptions above"
        rows.append([label, *(_percent(fmean(top1[alpha] for top1 in corrupted)) for alpha in alphas)])
        head = [f"top-1, n = {shifts[0]['n']}", f"α = {alphas[0]}", *alphas[1:]]
        made["demo shift"] = markdown(head, rows)
    return made | _segmentation(_scenes(out).rows())


def _segmentation(found: Sequence[Row]) -> dict[str, str]:
    if not found:
        return {}
    rows = [
        [
            row["method"],
            f"{row['trained']:,}",
            row["base_lr"],
            *(_percent(row[k]) for k in ("miou", "pixel_acc", "val")),
        ]
        for row in found
    ]
    head = ["method", "trainable parameters", "`base_lr`", "test mIoU", "pixel accuracy", "val mIoU"]
    classes = [[row["method"], *(f"{100 * value:.0f}" for value in row["iou"].values())] for row in found]
    tried = [
        [row["method"], ", ".join(f"{rate} ({_percent(val)})" for rate, val in row["tried"].items())] for row in found
    ]
    return {
        "scenes": markdown(head, rows),
        "scenes classes": markdown(["test IoU", *found[0]["iou"]], classes),
        "scenes rates": markdown(["method", "`base_lr` (val mIoU)"], tried, 2),
    }


def _percent(share: Any) -> str:
    return f"{100 * share:.1f}"


def _demo(out: Path) -> Records:
    return Records(out / "demo.jsonl", "table", "name")


def _scenes(out: Path) -> Records:
    return Records(out / "segmentation.jsonl", "method")


def main(argv: Sequence[str] | None = None) -> None:
    """Keeps what is given, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, metavar="FOLDER", help="of `make demo`")
    parser.add_argument("--segmentation", type=Path, metavar="FOLDER", help="of the three runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--print", action="store_true", help="print what is there, which is done anyway")
    args = parser.parse_args(argv)
    if args.demo is not None:
        read_demo(args.demo, args.out)
    if args.segmentation is not None:
        read_segmentation(args.segmentation, args.out)
    print(*blocks(args.out).values(), sep="\n\n")


if __name__ == "__main__":
    main()
