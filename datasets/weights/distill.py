"""Distils AugReg ViT-Ti/16 at 224 px into `vit_nano_patch8_64`, resumably, on one processor core.

The student starts from six blocks of the teacher, sees each view at 64 px, and learns the teacher's tokens of the same
view at 224 px: the CLS feature, the patch tokens averaged to its own grid, and the logits of the frozen head.

Usage: ``VPT_DATA=... python datasets/weights/distill.py``. Run again after an interruption, it goes on.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
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

BATCH = 32
LEARNING_RATE = 1e-3
WARMUP = 100  # steps
COOLDOWN = 1  # pass over the views
PARTS = 5  # of a pass, each followed by a measurement and a checkpoint
SHIFT = 3  # pixels
# Dropped one at a time, these six hurt the cosine similarity of the CLS features to the teacher's least. After 40 steps
# they led every second block by 0.62 to 0.56.
KEPT_BLOCKS = (0, 1, 2, 4, 6, 7)


def make_student() -> VisionTransformer:
    """Builds the student from the teacher: `KEPT_BLOCKS`, and embeddings resampled to patches of 8 in 64 pixels."""
    student = timm.create_model("vit_nano_patch8_64")
    state = {}
    for key, value in teacher().state_dict().items():
        prefix, _, rest = key.partition(".")
        if prefix == "blocks":
            block, _, name = rest.partition(".")
            if int(block) in KEPT_BLOCKS:
                state[f"blocks.{KEPT_BLOCKS.index(int(block))}.{name}"] = value
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
    """The teacher's side of the loss: its frozen head, and the standard deviation (192,) of each kind of token."""

    head: nn.Module
    cls: Tensor
    patches: Tensor

    @classmethod
    def of(cls, views: Views) -> Target:
        """Measures the tokens of the training views."""
        return cls(teacher().head, views.cls.float().std(0), views.patches[::8].float().flatten(0, 1).std(0))

    def loss(self, tokens: Tensor, views: Views) -> tuple[Tensor, Tensor]:
        """Loss of the student's normed tokens (B, 65, 192), and the mean cosine similarity of its CLS features."""
        cls, wanted = tokens[:, 0], views.cls.float()
        cosine = F.cosine_similarity(cls, wanted).mean()
        feature = F.smooth_l1_loss(cls / self.cls, wanted / self.cls)
        patches = F.smooth_l1_loss(tokens[:, 1:] / self.patches, views.patches.float() / self.patches)
        said, meant = self.head(cls).log_softmax(1), self.head(wanted).log_softmax(1)
        logits = F.kl_div(said, meant, log_target=True, reduction="batchmean")
        return feature + (1 - cosine) + 0.5 * patches + 0.25 * logits, cosine


@torch.inference_mode()
def measure(student: VisionTransformer, target: Target, held_out: Views) -> dict[str, float]:
    """Loss and cosine similarity on views of held-out sources."""
    sums = torch.zeros(2)
    for part in (held_out[rows] for rows in torch.split(torch.arange(len(held_out.cls)), BATCH)):
        loss, cosine = target.loss(student.forward_features(normalize(part.images)), part)
        sums += len(part.cls) * torch.stack([loss, cosine])
    return dict(zip(("held_out_loss", "held_out_cosine"), (sums / len(held_out.cls)).tolist(), strict=True))


def quick_probe(student: VisionTransformer) -> dict[str, float]:
    """Accuracy on val200 of a linear probe trained on train800, with a fixed strength."""
    found = {}
    for task in TASKS:
        splits = [plain_images(task, name, 64) for name in ("train800", "val200")]
        train, val = ((cls_features(student, images), labels) for images, labels in splits)
        found[f"val200_{task}"] = accuracy(train, val, strength=1e-2)
    return found


@dataclass
class Run:
    """A distillation under way: what a checkpoint holds."""

    student: VisionTransformer
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    history: list[dict[str, float]]

    @classmethod
    def start(cls, steps: int, cooldown: int) -> Run:
        """A fresh run of ``steps`` steps: the rate rises, stays, falls to zero over the last ``cooldown``.

        Until the fall begins nothing depends on ``steps``, so that a run can be resumed to last longer.
        """
        torch.manual_seed(0)
        student = make_student()
        optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: max(0.0, min((step + 1) / WARMUP, 1.0, (steps - step) / cooldown))
        )
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


def train_part(run: Run, target: Target, views: Views) -> float:
    """Trains on the next of the `PARTS` of a pass, each pass in its own random order; returns the mean loss."""
    run.student.train()
    turn, part = divmod(len(run.history), PARTS)
    order = torch.randperm(len(views.cls), generator=torch.Generator().manual_seed(turn))[part::PARTS]
    total = 0.0
    for rows in track(torch.split(order, BATCH), f"part {len(run.history)}"):
        batch = views[rows]
        loss, _ = target.loss(run.student.forward_features(jitter(normalize(batch.images))), batch)
        run.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(run.student.parameters(), 1.0)
        run.optimizer.step()
        run.scheduler.step()
        total += len(rows) * loss.item()
    return total / len(order)


def distil(work: Path, rounds: int, passes: int) -> Run:
    """Trains for ``passes`` passes over ``rounds`` rounds of views, saving ``checkpoint.pt`` after each part."""
    views = load_views(work, rounds)
    training, held_out = views[~views.held_out], views[views.held_out]
    target = Target.of(training)
    steps = PARTS * -(-len(training.cls) // (PARTS * BATCH))  # of a pass; the last batch of a part may be smaller
    run = Run.start(passes * steps, COOLDOWN * steps)
    if (work / "checkpoint.pt").exists():
        run.resume(work / "checkpoint.pt")
    while (parts := len(run.history) + 1) <= passes * PARTS:
        began = time.process_time()
        row = {"passes": parts / PARTS, "train_loss": train_part(run, target, training)}
        run.student.eval()
        row |= measure(run.student, target, held_out)
        row |= quick_probe(run.student) if parts % PARTS == 0 else {}
        run.history.append(row | {"cpu_seconds": time.process_time() - began})
        run.save(work / "checkpoint.pt")
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
    parser.add_argument("--work", type=Path, default=Path("build/distill"), help="folder for views and checkpoint")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of 2,300 views")
    parser.add_argument("--passes", type=int, default=3, help="passes over the views")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where the weights go")
    table = Path(__file__).with_name("curve.csv")
    parser.add_argument("--table", type=Path, default=table, help="where the curve goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    make_views(options.work, options.rounds)
    ship(distil(options.work, options.rounds, options.passes), options.out, options.table)


if __name__ == "__main__":
    main()
