"""Distils AugReg ViT-Ti/16 at 224 px into a backbone that ships, resumably, on one processor core.

The student sees each view at 64 px and learns the teacher's tokens of the same view at 224 px: the CLS feature, the
patch tokens averaged to its own grid, and the logits of the frozen head. `students.py` tells what it starts from.

Usage: ``VPT_DATA=... python datasets/weights/distill.py --student NAME``. Run again after an interruption, it goes on.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from curve import draw
from probe import accuracy
from rich.progress import track
from safetensors.torch import save_file
from sources import TASKS, features, normalize, plain_images, teacher
from students import STUDENTS, Student, tokens
from torch import Tensor, nn
from views import Views, load_views, make_views

from vpt.backbones.bundled import weights_file

BATCH = 32
LEARNING_RATE = 1e-3
PARTS = 5  # of a pass, each followed by a measurement and a checkpoint
SHIFT = 3  # pixels


def jitter(images: Tensor) -> Tensor:
    """Shifts, brightens and roughens normalised images (B, 3, 64, 64) a little, so that no view is seen twice alike."""
    down, right = (int(v) for v in torch.randint(-SHIFT, SHIFT + 1, (2,)))
    moved = F.pad(images, (SHIFT,) * 4, mode="reflect").roll((down, right), (2, 3))[..., SHIFT:-SHIFT, SHIFT:-SHIFT]
    gain = 1 + 0.1 * torch.randn(len(images), 1, 1, 1)
    offset = 0.1 * torch.randn(len(images), 1, 1, 1)
    return moved * gain + offset + 0.03 * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images)


@dataclass(frozen=True)
class Target:
    """The teacher's side of the loss: its frozen head, and the standard deviation (192,) of each kind of token.

    Where the student ``averages`` its tokens, the patch tokens are moved to have the CLS feature as their mean.
    """

    head: nn.Module
    averages: bool
    cls: Tensor
    patches: Tensor

    @classmethod
    def of(cls, views: Views, averages: bool) -> Target:
        """Measures the tokens of the training views."""
        patches = _patches(views[torch.arange(0, len(views.cls), 8)], averages)
        return cls(teacher().head, averages, views.cls.float().std(0), patches.flatten(0, 1).std(0))

    def loss(self, cls: Tensor, patches: Tensor, views: Views) -> tuple[Tensor, Tensor]:
        """Loss of the student's feature (B, 192) and tokens (B, 64, 192), and the feature's mean cosine similarity."""
        wanted = views.cls.float()
        cosine = F.cosine_similarity(cls, wanted).mean()
        feature = F.smooth_l1_loss(cls / self.cls, wanted / self.cls)
        spatial = F.smooth_l1_loss(patches / self.patches, _patches(views, self.averages) / self.patches)
        said, meant = self.head(cls).log_softmax(1), self.head(wanted).log_softmax(1)
        logits = F.kl_div(said, meant, log_target=True, reduction="batchmean")
        return feature + (1 - cosine) + 0.5 * spatial + 0.25 * logits, cosine


def _patches(views: Views, averages: bool) -> Tensor:
    """What the student's 8 × 8 tokens should be, (N, 64, 192)."""
    patches = views.patches.float()
    return patches - patches.mean(1, keepdim=True) + views.cls.float()[:, None] if averages else patches


@torch.inference_mode()
def measure(student: nn.Module, target: Target, held_out: Views) -> dict[str, float]:
    """Loss and cosine similarity on views of held-out sources."""
    sums = torch.zeros(2)
    for part in (held_out[rows] for rows in torch.split(torch.arange(len(held_out.cls)), BATCH)):
        loss, cosine = target.loss(*tokens(student, normalize(part.images)), part)
        sums += len(part.cls) * torch.stack([loss, cosine])
    return dict(zip(("held_out_loss", "held_out_cosine"), (sums / len(held_out.cls)).tolist(), strict=True))


def quick_probe(student: nn.Module) -> dict[str, float]:
    """Accuracy on val200 of a linear probe trained on train800, with a fixed strength."""
    found = {}
    for task in TASKS:
        splits = [plain_images(task, name, 64) for name in ("train800", "val200")]
        train, val = ((features(student, images), labels) for images, labels in splits)
        found[f"val200_{task}"] = accuracy(train, val, strength=1e-2)
    return found


@dataclass
class Run:
    """A distillation under way: what a checkpoint holds."""

    student: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    history: list[dict[str, float]]

    @classmethod
    def start(cls, student: Student, steps: int) -> Run:
        """A fresh run, a pass of which takes ``steps``: the rate rises, stays, falls to zero over the cooldown.

        Until the fall begins nothing depends on the number of passes, so that a run can be resumed to last longer.
        """
        torch.manual_seed(0)
        model = student.start()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
        end, fall = student.passes * steps, student.cooldown * steps
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: max(0.0, min((step + 1) / student.warmup, 1.0, (end - step) / fall))
        )
        return cls(model, optimizer, scheduler, [])

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


def train_part(run: Run, target: Target, views: Views, precision: torch.dtype) -> float:
    """Trains on the next of the `PARTS` of a pass, each pass in its own random order; returns the mean loss."""
    run.student.train()
    turn, part = divmod(len(run.history), PARTS)
    order = torch.randperm(len(views.cls), generator=torch.Generator().manual_seed(turn))[part::PARTS]
    total = 0.0
    for rows in track(torch.split(order, BATCH), f"part {len(run.history)}"):
        batch = views[rows]
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            cls, patches = tokens(run.student, jitter(normalize(batch.images)))
        loss, _ = target.loss(cls.float(), patches.float(), batch)
        run.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(run.student.parameters(), 1.0)
        run.optimizer.step()
        run.scheduler.step()
        total += len(rows) * loss.item()
    return total / len(order)


def distil(student: Student, work: Path, checkpoint: Path) -> Run:
    """Trains ``student`` on the views in ``work``, saving ``checkpoint`` after each part."""
    views = load_views(work, student.rounds)
    training, held_out = views[~views.held_out], views[views.held_out]
    target = Target.of(training, student.averages)
    steps = PARTS * -(-len(training.cls) // (PARTS * BATCH))  # of a pass; the last batch of a part may be smaller
    run = Run.start(student, steps)
    if checkpoint.exists():
        run.resume(checkpoint)
    while (parts := len(run.history) + 1) <= student.passes * PARTS:
        began = time.process_time()
        row = {"passes": parts / PARTS, "train_loss": train_part(run, target, training, student.precision)}
        run.student.eval()
        row |= measure(run.student, target, held_out)
        row |= quick_probe(run.student) if parts % PARTS == 0 else {}
        run.history.append(row | {"cpu_seconds": time.process_time() - began})
        run.save(checkpoint)
        print({key: round(value, 4) for key, value in run.history[-1].items()}, flush=True)
    return run


def ship(run: Run, weights: Path, table: Path) -> None:
    """Writes the weights as fp16 safetensors, and the curve as CSV and PNG."""
    weights.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.half().contiguous() for key, value in run.student.state_dict().items()}
    save_file(state, weights, metadata={"format": "pt", "license": "apache-2.0"})
    pd.DataFrame(run.history).to_csv(table, index=False, float_format="%.4g", lineterminator="\n")
    draw(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", choices=STUDENTS, default="vit_nano_patch8_64", help="backbone to distil")
    parser.add_argument("--work", type=Path, default=Path("build/distill"), help="folder for views and checkpoints")
    parser.add_argument("--rounds", type=int, help="rounds of 2,300 views, if not the student's own")
    parser.add_argument("--passes", type=int, help="passes over the views, if not the student's own")
    parser.add_argument("--out", type=Path, help="where the weights go, if not into the package")
    parser.add_argument("--table", type=Path, help="where the curve goes, if not beside this script")
    options = parser.parse_args()
    torch.set_num_threads(1)
    name, student = options.student, STUDENTS[options.student]
    given = {key: value for key in ("rounds", "passes") if (value := getattr(options, key)) is not None}
    student = replace(student, **given)
    options.work.mkdir(parents=True, exist_ok=True)
    make_views(options.work, student.rounds)
    run = distil(student, options.work, options.work / f"{name}.pt")
    table = Path(__file__).with_name(f"{name}.csv")
    ship(run, options.out or weights_file(name), options.table or table)


if __name__ == "__main__":
    main()
