"""Four ways to adapt ViT-Ti/16, on real images: the accuracy table of the README.

    python -m benchmarks.real_tasks --root $VPT_DATA

For each task and method the learning rate is chosen by the last-epoch accuracy on val200 after training on train800
(ties: the smaller rate); the method is then trained on train800val200 with three seeds, and the test split is read
once per seed, after the last epoch. Where the head is solved for exactly, the rate is the penalty and there is nothing
that a seed could change, so one trial is final. Every finished trial is kept as one JSON file, so an interrupted run
continues where it stopped and a finished one only prints its table.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch

from vpt.data import VTABDataModule, default_root
from vpt.tasks import ClassificationTask, FineTuning, LinearProbe, PromptTuning

BACKBONE = "vit_tiny_patch16_224"
WEIGHTS = "weights/vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
PRESETS = {"signdigits10": "timm", "caltech101": "square"}
"""Caltech-101 follows VTAB-1k (whole image, squashed); hand signs are cropped as the weights were evaluated."""
SEEDS = (42, 44, 82)
BATCH = 10


@dataclass(frozen=True)
class Method:
    """A row of the table: the rates are AdamW's at batch 10, or the penalty of a head that is solved for."""

    title: str
    task: type[ClassificationTask]
    epochs: int
    rates: tuple[float, ...]
    options: dict[str, Any]

    @property
    def solved(self) -> bool:
        """Whether the head is the exact minimum, which no seed changes."""
        return self.options.get("solver") == "lbfgs"

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those of the final trials."""
        return SEEDS[:1] if self.solved else SEEDS


METHODS = {
    "linear": Method("linear probe", LinearProbe, 20, (1e-3, 3e-3, 1e-2, 3e-2), {"weight_decay": 0.1}),
    "linear_lbfgs": Method("linear probe, L-BFGS", LinearProbe, 1, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), {"solver": "lbfgs"}),
    "deep": Method("VPT-deep, 10 tokens", PromptTuning, 4, (2e-3, 4e-3, 8e-3), {"num_tokens": 10}),
    "shallow": Method("VPT-shallow, 10 tokens", PromptTuning, 4, (2e-3, 4e-3, 8e-3), {"num_tokens": 10, "deep": False}),
    "full": Method("full fine-tuning", FineTuning, 4, (3e-5, 1e-4, 3e-4, 1e-3), {}),
}


@dataclass(frozen=True)
class Trial:
    """One training run."""

    data: str
    method: str
    train: str
    rate: float
    seed: int

    @property
    def file(self) -> str:
        """Where its result is kept."""
        return f"{self.data}-{self.method}-{self.train}-{self.rate:g}-{self.seed}.json"


def run(trial: Trial, root: Path, weights: Path, out: Path) -> dict[str, Any]:
    """Trains one trial, or reads its result if it is there."""
    path = out / trial.file
    if path.is_file():
        result: dict[str, Any] = json.loads(path.read_text())
        return result
    method = METHODS[trial.method]
    L.seed_everything(trial.seed, verbose=False)
    data = VTABDataModule(
        trial.data,
        root=str(root),
        train=trial.train,
        preset=PRESETS[trial.data],
        image_size=224,
        batch_size=BATCH,
        seed=trial.seed,
    )
    rate = {"l2": trial.rate} if method.solved else {"base_lr": trial.rate * 256 / BATCH}
    task = method.task(
        backbone=BACKBONE,
        weights=str(weights),
        num_classes=data.num_classes,
        optimizer="adamw",
        **method.options | rate,
    )
    trainer = L.Trainer(
        max_epochs=method.epochs,
        accelerator="auto",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
        limit_val_batches=1.0 if trial.train == "train800" else 0,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=method.epochs,
    )
    start = time.monotonic()
    trainer.fit(task, datamodule=data)
    result = asdict(trial) | {
        "preset": data.preset.name,
        "epochs": method.epochs,
        "batch": BATCH,
        "seconds": round(time.monotonic() - start, 1),
    }
    if trial.train == "train800":
        result["val"] = float(trainer.callback_metrics["val/acc"])
    else:
        trainer.test(task, datamodule=data, verbose=False)
        result |= {"test": float(trainer.callback_metrics["test/acc"]), "n": data.describe()["counts"]["test"]}
    result |= {"trainable": task.model.parameter_counts()[0], "threads": torch.get_num_threads()}
    out.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result))
    part.replace(path)
    return result


def row(data: str, name: str, root: Path, weights: Path, out: Path) -> str:
    """Selects, trains and tests one method on one task; returns its row of the table."""
    method = METHODS[name]
    trials = [run(Trial(data, name, "train800", rate, SEEDS[0]), root, weights, out) for rate in method.rates]
    best = max(trials, key=lambda trial: (trial["val"], -trial["rate"]))
    finals = [run(Trial(data, name, "train800val200", best["rate"], seed), root, weights, out) for seed in method.seeds]
    tests = [100 * final["test"] for final in finals]
    spread = f" ± {statistics.stdev(tests):.1f}" if len(tests) > 1 else ""
    minutes = statistics.mean(final["seconds"] for final in finals) / 60
    return (
        f"| {data} | {method.title} | {finals[0]['trainable']:,} | {method.epochs} | {best['rate']:g} "
        f"| {100 * best['val']:.1f} | **{statistics.mean(tests):.1f}{spread}** "
        f"| {finals[0]['n']:,} | {minutes:.1f} |"
    )


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(default_root()))
    parser.add_argument("--weights", type=Path, help=f"default: ROOT/{WEIGHTS}")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/real_tasks"))
    parser.add_argument("--tasks", nargs="+", default=list(PRESETS), choices=list(PRESETS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    weights = args.weights or args.root / WEIGHTS
    print("| task | method | trained | epochs | rate | val200 | test, mean ± std of 3 seeds | n | minutes |")
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|", flush=True)
    for data in args.tasks:
        for name in args.methods:
            print(row(data, name, args.root, weights, args.out), flush=True)


if __name__ == "__main__":
    main()
