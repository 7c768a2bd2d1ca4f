"""What the parts of `benchmarks.robustness_tables` share: methods, training, measuring, and results kept in files."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Final, cast

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray

from vpt.data import ImageDataModule
from vpt.metrics.summary import summary
from vpt.models import save_delta
from vpt.robustness import Record, run
from vpt.robustness.evaluation import records
from vpt.tasks import ClassificationTask, DeltaTuning, FineTuning, LinearProbe, PromptTuning
from vpt.tasks.callbacks import protocol

BACKBONE = "vit_tiny_patch16_224"
WEIGHTS = "weights/vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
SEEDS = (42, 44, 82)
EPOCHS = 4
BATCH = 10
BF16: Final = "bf16-mixed"
"""Training, and measuring what was trained, under autocast: half the time where the processor has bfloat16."""
GRID = tuple(step / 10 for step in range(11))
SCORES = ("top1", "top1_low", "top1_high", "nll", "ece")
PENALTIES = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]

Trial = dict[str, Any]
Scored = Callable[[str, Record], list[tuple[str, NDArray[Any], NDArray[np.int64]]]]
"""From a set's name and record to names, logits and labels of what is scored."""
_PROMPT = {"name": "prompt", "num_tokens": 10}


@dataclass(frozen=True)
class Method:
    """A way to adapt the backbone; options are those of the task."""

    title: str
    task: type[ClassificationTask]
    options: dict[str, Any]

    @property
    def solved(self) -> bool:
        """Whether the head is the exact minimum, which no seed of training changes."""
        return self.options.get("solver") == "lbfgs"


METHODS = {
    "linear": Method("linear probe, exact", LinearProbe, {"solver": "lbfgs"}),
    "full": Method("full fine-tuning", FineTuning, {}),
    "lpft": Method("LP-FT", FineTuning, {}),
    "lora": Method(
        "LoRA, rank 8 on q, v", DeltaTuning, {"deltas": [{"name": "lora", "rank": 8, "targets": ["q", "v"]}]}
    ),
    "shallow": Method("VPT-shallow, 10 tokens", PromptTuning, {"num_tokens": 10, "deep": False}),
    "deep": Method("VPT-deep, 10 tokens", PromptTuning, {"num_tokens": 10}),
    "joint": Method("joint: VPT-deep + full (not frozen)", DeltaTuning, {"deltas": [_PROMPT, {"name": "full"}]}),
}


@dataclass(frozen=True)
class Place:
    """Where things are, and whether this is only a rehearsal: two batches of training, 20 images a set, three α."""

    root: Path
    weights: Path
    out: Path
    build: Path
    quick: bool

    @property
    def alphas(self) -> tuple[float, ...]:
        """Where curves are evaluated."""
        return (0.0, 0.5, 1.0) if self.quick else GRID

    def read(self, name: str) -> Trial | None:
        """A finished trial, or None."""
        path = self.out / f"{name}.json"
        return dict(json.loads(path.read_text())) if path.is_file() else None

    def kept(self, name: str, make: Callable[[], Trial]) -> Trial:
        """Reads a finished trial, or makes it and keeps it."""
        if (found := self.read(name)) is not None:
            return found
        start = time.monotonic()
        trial = make()
        trial |= {"seconds": round(time.monotonic() - start, 1), "threads": torch.get_num_threads()}
        self.out.mkdir(parents=True, exist_ok=True)
        part = self.out / f"{name}.part"
        part.write_text(json.dumps(trial) + "\n")
        part.replace(self.out / f"{name}.json")
        print(f"{time.strftime('%H:%M')} {name}: {trial['seconds']} s", file=sys.stderr, flush=True)
        return trial


def fit(
    place: Place,
    name: str,
    method: Method,
    data: ImageDataModule,
    rate: float | list[float],
    seed: int,
    epochs: int = EPOCHS,
    head: Path | None = None,
) -> Trial:
    """Trains, writes the delta file to the build folder, and says how it went; `rate` is AdamW's, or penalties."""
    L.seed_everything(seed, verbose=False)
    own = {"l2": rate} if isinstance(rate, list) else {"base_lr": rate * 256 / BATCH}
    task = method.task(
        backbone=BACKBONE,
        weights=str(place.weights),
        num_classes=data.num_classes,
        optimizer="adamw",
        init_head=None if head is None else str(head),
        **method.options | own,
    )
    trainer = L.Trainer(
        max_epochs=epochs,
        precision=BF16,
        accelerator="auto",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        limit_train_batches=2 if place.quick else 1.0,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=epochs,
    )
    trainer.fit(task, datamodule=data)
    task.model.info = protocol(trainer, task)
    save_delta(delta_file(place, name), task.model)
    return {
        "rate": float(trainer.callback_metrics.get("train/l2", rate[0])) if isinstance(rate, list) else rate,
        "seed": seed,
        "epochs": epochs,
        "batch": BATCH,
        "precision": BF16,
        "preset": data.preset.name,
        "train_n": len(data.split("train")),
        "val_n": len(data.split("val")),
        "val": float(trainer.callback_metrics["val/acc"]),
        "trainable": task.model.parameter_counts()[0],
    }


def delta_file(place: Place, name: str) -> Path:
    """Where the tensors of a trial are; never committed."""
    return place.build / f"{name}.safetensors"


def measure(
    place: Place,
    name: str,
    delta: Path,
    data: ImageDataModule,
    alphas: Sequence[float] = (1.0,),
    anchor: Path | None = None,
    severities: Sequence[int] = (),
    bf16: bool = True,
    scored: Scored = lambda name, record: [(name, record.scored, record.label)],
) -> list[Trial]:
    """Scores a delta file on all sets; the records stay in the build folder, where an interrupted one continues."""
    images = 20 if place.quick else None
    weights = str(place.weights)
    out = place.build / name
    result = run(delta, data, alphas, out, anchor, images, severities, batch_size=16, weights=weights, bf16=bf16)
    rows: list[Trial] = []
    for row in result.rows:
        for title, logits, labels in scored(row.set, records.read(out / "records" / str(row.record))):
            found = summary(logits, labels)
            numbers = {key: round(cast("float", found[key]), 6) for key in SCORES}
            where = {"set": title, "kind": row.kind, "severity": row.severity, "alpha": row.alpha, "n": len(labels)}
            rows.append({**where, **numbers})
    return rows


def select(trials: Sequence[Trial]) -> float:
    """The rate with the best validation accuracy; of several the smallest."""
    return float(min(trials, key=lambda trial: (-trial["val"], trial["rate"]))["rate"])


def percent(shares: Sequence[float]) -> str:
    """Mean and standard deviation over seeds of shares, in percent."""
    spread = f" ± {100 * stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{100 * mean(shares):.1f}{spread}"


def interval(row: Trial) -> str:
    """Accuracy in percent with its 95 % Wilson interval."""
    return f"{100 * row['top1']:.1f} ({100 * row['top1_low']:.1f}–{100 * row['top1_high']:.1f})"
