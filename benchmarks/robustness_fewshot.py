"""Part (c): accuracy and calibration by the number of training images of each class."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.robustness_figures import band
from benchmarks.robustness_trials import BATCH, METHODS, SEEDS, Place, Trial, delta_file, fit, measure, percent
from vpt.data import VTABDataModule
from vpt.reports.style import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOTS = {"caltech101": (1, 2, 4), "signdigits10": (1, 2, 4, 8, 16, 32)}
PRESETS = {"caltech101": "square", "signdigits10": "timm"}
RATES = {
    "caltech101": {"linear": 1e-3, "full": 3e-4, "deep": 4e-3, "joint": 3e-4},
    "signdigits10": {"linear": 3e-2, "full": 1e-4, "deep": 4e-3, "joint": 1e-4},
}
"""What val200 chose after training on all of train800 (`benchmarks.real_tasks`); joint takes that of full."""
STEPS, EPOCHS = 100, 4
SCORES = {"top1": "top-1", "ece": "ECE"}


def execute(place: Place) -> None:
    """Makes what is missing, all methods of the first seed first."""
    for seed in SEEDS:
        for task, counts in SHOTS.items():
            for shots in counts:
                for method in RATES[task]:
                    make = partial(_trial, place, task, method, shots, seed)
                    place.kept(_name(task, method, shots, seed), make)


def _name(task: str, method: str, shots: int, seed: int) -> str:
    return f"fewshot-{task}-{method}-{shots}-{seed}"


def _trial(place: Place, task: str, method: str, shots: int, seed: int) -> Trial:
    data = VTABDataModule(
        task,
        place.root,
        "train800",
        preset=PRESETS[task],
        batch_size=BATCH,
        seed=seed,
        shots=shots,
        subset_seed=seed,
    )
    name = _name(task, method, shots, seed)
    steps = math.ceil(len(data.split("train")) / BATCH)
    epochs = 1 if METHODS[method].solved or place.quick else max(EPOCHS, math.ceil(STEPS / steps))
    rate = RATES[task][method]
    trial = fit(place, name, METHODS[method], data, [rate] if METHODS[method].solved else rate, seed, epochs)
    delta = delta_file(place, name)
    rows = measure(place, name, delta, data)
    delta.unlink()  # 22 MB each after full fine-tuning, and nothing reads it again
    return {"method": method, "shots": shots, **trial, "rows": rows}


def _found(place: Place, task: str, method: str, shots: int, score: str) -> list[float]:
    """The score of each seed that is there."""
    trials = [place.read(_name(task, method, shots, seed)) for seed in SEEDS]
    return [trial["rows"][0][score] for trial in trials if trial is not None]


def table(place: Place) -> str:
    """What is there, as Markdown."""
    lines = [
        "Few shots, ViT-Ti/16 AugReg: nested stratified subsets of train800, seed = subset seed; AdamW, batch 10, "
        f"bf16-mixed, at least {EPOCHS} epochs and {STEPS} steps, rates as chosen with 800 images; whole test set, "
        "last epoch. Linear: exact head. Joint trains prompts and backbone together and is no frozen-backbone method. "
        "%, mean ± std of seeds (their number in brackets unless 3).",
    ]
    for task, counts in SHOTS.items():
        for score, title in SCORES.items():
            n = next((t["rows"][0]["n"] for m in RATES[task] if (t := place.read(_name(task, m, 1, SEEDS[0])))), 0)
            head = " | ".join(f"{shots}" for shots in counts)
            lines += ["", f"| {task}, n = {n:,}, preset {PRESETS[task]}: {title} by shots | {head} |"]
            lines += ["|---|" + "--:|" * len(counts)]
            for method in RATES[task]:
                cells = [_cell(_found(place, task, method, shots, score)) for shots in counts]
                lines.append(f"| {METHODS[method].title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    if not values:
        return "–"
    return percent(values) + ("" if len(values) == len(SEEDS) else f" ({len(values)})")


def figure(place: Place) -> Figure:
    """Accuracy and ECE by the number of training images of each class."""
    from matplotlib.figure import Figure

    with style():
        drawn = Figure(figsize=(8.6, 6.6), layout="constrained")
        axes = drawn.subplots(len(SHOTS), len(SCORES), squeeze=False)
        for row, (task, counts) in zip(axes, SHOTS.items(), strict=True):
            for axis, (score, title) in zip(row, SCORES.items(), strict=True):
                for method in RATES[task]:
                    found: dict[float, list[float]] = {
                        shots: each for shots in counts if (each := _found(place, task, method, shots, score))
                    }
                    if found:
                        band(axis, method, found)
                axis.set_xscale("log", base=2)
                axis.set_xticks(counts, [str(shots) for shots in counts])
                axis.minorticks_off()
                axis.set(title=task, xlabel="training images of each class", ylabel=f"{title} (%)")
        handles, labels = axes[-1][0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return drawn
