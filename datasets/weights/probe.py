"""Linear probes of the shipped weights, of random ones, and of the teacher: prints the table of the README.

Usage: ``VPT_DATA=... python datasets/weights/probe.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import timm
import torch
from rich.progress import track
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sources import TASKS, features, plain_images, teacher
from students import STUDENTS
from torch import Tensor, nn

STRENGTHS = tuple(10.0**power for power in np.arange(-5.0, 2.5, 0.5))
Split = tuple[Tensor, list[int]]


def accuracy(train: Split, test: Split, strength: float) -> float:
    """Top-1 accuracy of logistic regression on standardised features; ``strength`` is the inverse of the L2 weight."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
    classifier.fit(train[0].numpy(), train[1])
    return float(classifier.score(test[0].numpy(), test[1]))


def probe(model: nn.Module, task: str, size: int) -> tuple[float, float]:
    """Trains on train800 and val200 together, which are the 1,000 images of train800val200.

    The strength is the one that scored best on val200 after training on train800.

    Returns:
        Test accuracy and the chosen strength.
    """
    splits = [plain_images(task, name, size) for name in ("train800", "val200", "test")]
    train, val, test = ((features(model, images), labels) for images, labels in splits)
    best = max(STRENGTHS, key=lambda strength: accuracy(train, val, strength))
    both = torch.cat([train[0], val[0]]), train[1] + val[1]
    return accuracy(both, test, best), best


def nano(name: str, seed: int | None) -> nn.Module:
    """A shipped model, or the same architecture at random init when a seed is given."""
    torch.manual_seed(seed or 0)
    model: nn.Module = timm.create_model(name, pretrained=seed is None)
    return model.eval()


def _row(builders: Sequence[Callable[[], nn.Module]], size: int) -> str:
    """One table row: mean over ``builders`` of the accuracy on each task, with the chosen strengths."""
    cells = []
    for task in TASKS:
        scores, strengths = zip(*(probe(build(), task, size) for build in builders), strict=True)
        spread = f" ± {np.std(scores):.3f}" if len(scores) > 1 else ""
        cells.append(f"{np.mean(scores):.3f}{spread} (C {', '.join(f'{c:.0e}' for c in strengths)})")
    return " | ".join(cells)


def main() -> None:
    torch.set_num_threads(1)
    rows: dict[str, tuple[list[Callable[[], nn.Module]], int]] = {}
    for name in STUDENTS:
        rows[f"{name}, shipped, 64 px"] = [partial(nano, name, None)], 64
        rows[f"{name}, random init (3), 64 px"] = [partial(nano, name, seed) for seed in range(3)], 64
    rows |= {f"teacher ViT-Ti/16, {size} px": ([partial(teacher, size)], size) for size in (64, 224)}
    lines = [f"| {name} | {_row(*row)} |" for name, row in track(rows.items(), "probing")]
    print(f"| backbone | {' | '.join(f'{task} test' for task in TASKS)} |\n|---|---|---|", *lines, sep="\n")


if __name__ == "__main__":
    main()
