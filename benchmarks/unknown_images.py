"""Images of none of the known classes: which score tells them apart; and what a calibration promises, and what holds.

    python -m benchmarks.unknown_images --root $VPT_DATA [--threads 1]
    python -m benchmarks.unknown_images --print

Three times a fifth of the classes of caltech101 is left out of training and validation. Unknown are the test images of
these classes, the photos of PACS (whose giraffes and horses no class has, but whose elephants one has) and photographs
of ImageNet's classes (some of which caltech101 has too); known are the test images of the other classes. A fitted model
is a delta file under --build, and what was measured on it a line of a record: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from benchmarks.records import RESULTS, Records, Row, markdown
from vpt.cli import main as vpt_main
from vpt.data import FolderDataModule, VTABDataModule, default_root
from vpt.data.images import LeftOut, find_images
from vpt.metrics import ood_detection as ood
from vpt.models.delta_file import load_classifier
from vpt.models.prediction import answers
from vpt.robustness.calibrate import calibrate

NAME = "vit_tiny_patch16_224"
WEIGHTS = f"weights/{NAME}.augreg_in21k_ft_in1k.safetensors"
CONFIGS = Path(__file__).parents[1] / "configs"
FOLDS = 3
METHODS = {
    "linear": ["--model.solver=lbfgs", "--trainer.max_epochs=1"],
    "lora": ["--model.base_lr=0.0512", "--trainer.max_epochs=4"],
}
"""LoRA's rate is the one that docs/protocol.md chose for caltech101."""
UNKNOWN = {"classes left out": None, "PACS, photos": "pacs7_photo", "photographs": "flickr_in1k_1000"}
NEIGHBOURS = (1, 5, 20)
SCORES = ("MSP", "energy", "Mahalanobis", *(f"{k} nearest" for k in NEIGHBOURS))


def write_table(root: Path, fold: int, table: Path) -> list[Path]:
    """Lists the images of the known classes as a table; returns the test images of the unknown ones."""
    names = VTABDataModule("caltech101", root=root).class_names
    rows, unknown = [], []
    for split, name in (("train", "train800"), ("val", "val200"), ("test", "test")):
        for line in (root / "caltech101" / f"{name}.txt").read_text().splitlines():
            path, label = line.rsplit(maxsplit=1)
            place = root / "caltech101" / path
            if int(label) % 5 == fold:
                unknown += [place] if split == "test" else []
            else:
                rows.append((place, names[int(label)], split))
    trained = {name for _, name, split in rows if split == "train"}
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *(row for row in rows if row[1] in trained)])
    return unknown


def train(root: Path, table: Path, method: str, out: Path) -> Path:
    """Trains a model on a table, once, and returns its delta file."""
    if not (found := sorted(out.rglob("delta.safetensors"))):
        config = table.with_name("config.yaml")
        data = {"class_path": "FolderDataModule", "init_args": {"root": str(table), "batch_size": 10}}
        model = {"class_path": "DeltaTuning", "init_args": {"backbone": NAME, "weights": str(root / WEIGHTS)}}
        config.write_text(yaml.safe_dump({"seed_everything": 0, "model": model, "data": data}))
        overlay = CONFIGS / "method" / f"{method}.yaml"
        args = ["fit", "-c", str(config), "-c", str(overlay), *METHODS[method], f"--trainer.default_root_dir={out}"]
        if vpt_main([*args, "--trainer.precision=bf16-mixed"]) != 0:
            raise SystemExit(1)
        found = sorted(out.rglob("delta.safetensors"))
    return found[0]


def read(delta: Path, images: Any) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Logits and features of images."""
    parts = [(logits, features) for _, logits, features in answers(load_classifier(delta), images, 50)]
    return np.concatenate([each[0] for each in parts]), np.concatenate([each[1] for each in parts])


def measure(root: Path, build: Path, method: str, fold: int) -> Row:
    """Detection of each kind of unknown images by each score, and what the calibration promises of known ones."""
    table = build / f"fold{fold}" / "known.csv"
    unknown = {"classes left out": write_table(root, fold, table)}
    for title, folder in UNKNOWN.items():
        if folder is not None:
            listed = root / folder / "test.txt"
            lines = listed.read_text().splitlines() if listed.is_file() else []
            paths = [root / folder / line.rsplit(maxsplit=1)[0] for line in lines]
            unknown[title] = paths or list(map(Path, find_images(root / folder / "images", LeftOut())))
    delta = train(root, table, method, table.parent / method)
    data = FolderDataModule(table)
    told = calibrate(delta, data, delta.with_name("calibrated.safetensors"), test=True)
    train_split, test = data.split("train"), data.split("test")
    logits, features = read(delta, [Path(path) for path in test.paths])
    _, fitted = read(delta, [Path(path) for path in train_split.paths])
    means, whitening = ood.fit_mahalanobis(fitted, train_split.labels)

    def scores(logits: NDArray[Any], features: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
        found = [ood.msp(logits), ood.energy(logits), ood.mahalanobis(features, means, whitening)]
        found += [ood.nearest_neighbours(features, fitted, k) for k in NEIGHBOURS]
        return dict(zip(SCORES, found, strict=True))

    known = scores(logits, features)
    rows = {}
    for title, paths in unknown.items():
        strange = scores(*read(delta, paths))
        rows[title] = {name: vars(ood.detection(known[name], strange[name])) for name in SCORES}
    counts = {"known": len(test.labels), **{title: len(paths) for title, paths in unknown.items()}}
    return {"method": method, "fold": fold, "images": counts, "detection": rows, "calibration": told}


def _kept(out: Path) -> Records:
    return Records(out / "unknown_images.jsonl", "method", "fold")


def blocks(out: Path = RESULTS) -> dict[str, str]:
    """What is there, as Markdown; how to measure it where nothing is."""
    rows = _kept(out).rows()
    made = {"unknown images": _detection, "promises": _promises}
    return {name: table(rows) if rows else "(python -m benchmarks.unknown_images)" for name, table in made.items()}


def _detection(rows: Sequence[Row]) -> str:
    """AUROC and FPR95 in percent, means over folds of the values and of the ends of their 95 % intervals."""

    def cell(found: Sequence[Row], what: str) -> str:
        ends = [mean(100 * each[f"{what}_interval"][end] for each in found) for end in (0, 1)]
        return f"{mean(100 * each[what] for each in found):.1f} ({ends[0]:.1f} to {ends[1]:.1f})"

    cells = []
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        for title in UNKNOWN if own else ():
            for score in SCORES:
                found = [row["detection"][title][score] for row in own]
                cells.append([method, title, score, cell(found, "auroc"), cell(found, "fpr95")])
    return markdown(["method", "unknown", "score", "AUROC", "FPR95"], cells, 3)


def _promises(rows: Sequence[Row]) -> str:
    """What was asked for and what test images gave, each the mean of the folds."""
    cells = []
    for kind, name, values in (
        ("max_risk", "at most wrong", ("answered", "wrong")),
        ("coverage_lac", "coverage, LAC", ("covered", "size")),
        ("coverage_aps", "coverage, APS", ("covered", "size")),
        ("false_alarms", "false alarms", ("unknown",)),
    ):
        for method in METHODS:
            own = [row["calibration"]["test"][kind] for row in rows if row["method"] == method]
            for rate in own[0] if own else ():
                found = [each[rate] for each in own if each[rate] is not None]
                if not found:
                    cells.append([method, f"{name} {float(rate):.0%}", "not promised by so few images"])
                    continue
                told = []
                for value in values:
                    share = mean(each[value][0] for each in found if each[value] is not None)
                    told.append(f"{share:.2f} classes" if value == "size" else f"{100 * share:.1f} % {value}")
                cells.append([method, f"{name} {float(rate):.0%}", f"{', '.join(told)} ({len(found)} of {len(own)})"])
    return markdown(["method", "asked for", "test images of known classes"], cells, 3)


def main(args: Sequence[str] | None = None) -> None:
    """Measures what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=default_root())
    parser.add_argument("--build", type=Path, default=Path("build/unknown_images"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--print", action="store_true", help="measure nothing")
    options = parser.parse_args(args)
    if options.threads:
        torch.set_num_threads(options.threads)
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    if not options.print:
        for method, fold in _missing(options.out):
            _kept(options.out).put(measure(options.root, options.build.resolve(), method, fold))
    for title, block in blocks(options.out).items():
        print(f"{title}\n\n{block}\n")


def _missing(out: Path) -> Iterator[tuple[str, int]]:
    for fold in range(FOLDS):
        for method in METHODS:
            if _kept(out).find(method, fold) is None:
                yield method, fold


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
