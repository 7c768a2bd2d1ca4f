"""Distils AugReg ViT-Ti/16 at 224 px into `vit_nano_patch8_64`, resumably, on one processor core.

The student starts from every second block of the teacher, sees each view at 64 px, and learns the teacher's tokens of
the same view at 224 px: the CLS feature, the patch tokens averaged to its own grid, and the logits of the frozen head.

Usage: ``VPT_DATA=... python datasets/weights/distill.py``. Run again after an interruption, it goes on.
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from curve import draw
from probe import accuracy
from rich.progress import track
from safetensors.torch import save_file
from sources import TASKS, cls_features, normalize, plain_images, teacher
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import VisionTransformer
from torch import Tensor, nn
from views import Views, load_views, make_views

from vpt.backbones.nano import WEIGHTS

BATCH = 64
LEARNING_RATE = 1e-3
WARMUP = 100  # steps
SHIFT = 3  # pixels


def make_student() -> VisionTransformer:
    """Builds the student from the teacher: blocks 1, 3, ..., 11, embeddings resampled to patches of 8 in 64 pixels."""
    student = timm.create_model("vit_nano_patch8_64")
    state = {}
    for key, value in teacher().state_dict().items():
        prefix, _, rest = key.partition(".")
        if prefix == "blocks":
            block, _, name = rest.partition(".")
            if int(block) % 2 == 1:
                state[f"blocks.{int(block) // 2}.{name}"] = value
        elif prefix != "head":
            state[key] = value
    state["patch_embed.proj.weight"] = resample_patch_embed(state["patch_embed.proj.weight"], [8, 8])
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [8, 8])
    student.load_state_dict(state)
    return student


def jitter(images: Tensor) -> Tensor:
    """Shifts, brightens and roughens normalised images (B, 3, 64, 64) a little, so that no view is seen twice alike."""
    down, right = (int(v) for v in torch.randint(-SHIFT, SHIFT + 1, (2,)))
    moved = F.pad(images, (SHIFT,) * 4, mode="reflect").roll((down, right), (2, 3))[..., SHIFT:-SHIFT, SHIFT:-SHIFT]
    gain = 1 + 0.1 * torch.randn(len(images), 1, 1, 1)
    offset = 0.1 * torch.randn(len(images), 1, 1, 1)
    return moved * gain + offset + 0.03 * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images)


@dataclass(frozen=True)
class Target:
    """The teacher's side of the loss: its frozen head, and the mean and deviation (192,) of each kind of token."""

    head: nn.Module
    cls: tuple[Tensor, Tensor]
    patches: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, views: Views) -> Target:
        """Measures the tokens of the training views."""
        kinds = (views.cls.float(), views.patches[::8].float().flatten(0, 1))
        return cls(teacher().head, *((kind.mean(0), kind.std(0)) for kind in kinds))

    def loss(self, tokens: Tensor, views: Views) -> tuple[Tensor, Tensor]:
        """Loss of the student's normed tokens (B, 65, 192), and the mean cosine similarity of its CLS features."""
        cls, wanted = tokens[:, 0], views.cls.float()
        cosine = F.cosine_similarity(cls, wanted).mean()
        feature = F.smooth_l1_loss(cls / self.cls[1], wanted / self.cls[1])
        patches = F.smooth_l1_loss(tokens[:, 1:] / self.patches[1], views.patches.float() / self.patches[1])
        said, meant = self.head(cls).log_softmax(1), self.head(wanted).log_softmax(1)
        logits = F.kl_div(said, meant, log_target=True, reduction="batchmean")
        return feature + (1 - cosine) + 0.5 * patches + 0.25 * logits, cosine


@torch.inference_mode()
def measure(student: VisionTransformer, target: Target, held_out: Views) -> dict[str, float]:
    """Held-out loss and cosine similarity, and a linear probe trained on train800 and scored on val200."""
    student.eval()
    rows = torch.split(torch.arange(len(held_out.cls)), BATCH)
    sums = torch.zeros(2)
    for part in (held_out[row] for row in rows):
        loss, cosine = target.loss(student.forward_features(normalize(part.images)), part)
        sums += len(part.cls) * torch.stack([loss, cosine])
    found = dict(zip(("held_out_loss", "held_out_cosine"), (sums / len(held_out.cls)).tolist(), strict=True))
    for task in TASKS:
        splits = []
        for name in ("train800", "val200"):
            images, labels = plain_images(task, name, 64)
            splits.append((cls_features(student, images), labels))
        found[f"val200_{task}"] = accuracy(splits[0], splits[1], strength=1e-2)
    return found


@dataclass
class Run:
    """A distillation under way: what a checkpoint holds."""

    student: VisionTransformer
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    history: list[dict[str, float]]

    @classmethod
    def start(cls, steps: int) -> Run:
        """A fresh run of ``steps`` steps: linear warm-up, then a cosine to zero."""
        torch.manual_seed(0)
        student = make_student()
        optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, WARMUP)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - WARMUP))
        scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, decay], [WARMUP])
        return cls(student, optimizer, scheduler, [])

    def save(self, path: Path) -> None:
        """Writes the checkpoint in one move, the random state included."""
        state: dict[str, Any] = {key: getattr(self, key).state_dict() for key in ("student", "optimizer", "scheduler")}
        torch.save({**state, "history": self.history, "random": torch.get_rng_state()}, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)

    def resume(self, path: Path) -> None:
        """Goes on where the checkpoint at ``path`` stopped."""
        state = torch.load(path, weights_only=True)
        for key in ("student", "optimizer", "scheduler"):
            getattr(self, key).load_state_dict(state[key])
        self.history = state["history"]
        torch.set_rng_state(state["random"])


def train_epoch(run: Run, target: Target, views: Views) -> float:
    """One pass over the training views in random order; returns the mean loss."""
    run.student.train()
    order = torch.split(torch.randperm(len(views.cls)), BATCH)
    total = 0.0
    for rows in track(order, f"epoch {len(run.history)}"):
        part = views[rows]
        tokens = run.student.forward_features(jitter(normalize(part.images)))
        loss, _ = target.loss(tokens, part)
        run.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(run.student.parameters(), 1.0)
        run.optimizer.step()
        run.scheduler.step()
        total += len(rows) * loss.item()
    return total / len(views.cls)


def distil(work: Path, rounds: int, epochs: int) -> Run:
    """Trains for ``epochs`` passes over ``rounds`` rounds of views, saving ``checkpoint.pt`` after each."""
    views = load_views(work, rounds)
    training, held_out = views[~views.held_out], views[views.held_out]
    target = Target.of(training)
    run = Run.start(steps=epochs * -(-len(training.cls) // BATCH))
    if (work / "checkpoint.pt").exists():
        run.resume(work / "checkpoint.pt")
    while len(run.history) < epochs:
        began = time.monotonic()
        row = {"epoch": len(run.history) + 1.0, "train_loss": train_epoch(run, target, training)}
        row |= measure(run.student, target, held_out) | {"seconds": time.monotonic() - began}
        run.history.append(row)
        run.save(work / "checkpoint.pt")
        print({key: round(value, 4) for key, value in row.items()}, flush=True)
    return run


def ship(run: Run, weights: Path, table: Path) -> None:
    """Writes the weights as fp16 safetensors, and the curve as CSV and PNG."""
    weights.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.half().contiguous() for key, value in run.student.state_dict().items()}
    save_file(state, weights, metadata={"format": "pt", "license": "apache-2.0"})
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, run.history[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{value:.4g}" for key, value in row.items()} for row in run.history)
    draw(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/distill"), help="folder for views and checkpoint")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of 2,300 views")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the views")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where the weights go")
    table = Path(__file__).with_name("curve.csv")
    parser.add_argument("--table", type=Path, default=table, help="where the curve goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    make_views(options.work, options.rounds)
    ship(distil(options.work, options.rounds, options.epochs), options.out, options.table)


if __name__ == "__main__":
    main()
