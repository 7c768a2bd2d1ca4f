"""Part (d): from the weights' own classifier to fine-tuned models, end to end and by the gate of prompts."""

from __future__ import annotations

from functools import partial
from statistics import mean
from typing import TYPE_CHECKING

from benchmarks.robustness_figures import alpha_curves
from benchmarks.robustness_pacs import chosen
from benchmarks.robustness_photos import Photos, own_head_file
from benchmarks.robustness_trials import METHODS, SEEDS, Place, Trial, delta_file, fit, measure, percent, select
from vpt.metrics.accuracy import wilson

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATES = {"full": (3e-5, 1e-4), "deep": (1e-3, 4e-3)}
SEVERITY = 3
SHOWN = (0.0, 0.3, 0.5, 0.7, 1.0)
"""α in the table; the figure has all."""


def execute(place: Place) -> None:
    """Chooses each method's rate with the first seed, and measures every α of every seed."""
    for seed in SEEDS:
        for method, rates in RATES.items():
            rate = select([place.kept(_trial(method, each), partial(_fit, place, method, each)) for each in rates])
            place.kept(_sweep_name(method, seed), partial(_sweep, place, method, rate, seed))


def _trial(method: str, rate: float) -> str:
    return f"own-head-{method}-val-{rate:g}-{SEEDS[0]}"


def _sweep_name(method: str, seed: int) -> str:
    return f"own-head-{method}-sweep-{seed}"


def _fit(place: Place, method: str, rate: float, seed: int = SEEDS[0]) -> Trial:
    data = Photos(place, halves=True, seed=seed)
    head = own_head_file(place, data)
    return fit(place, _name(method, rate, seed), METHODS[method], data, rate, seed, head=head)


def _name(method: str, rate: float, seed: int) -> str:
    return f"own-head-{method}-{rate:g}-{seed}"


def _sweep(place: Place, method: str, rate: float, seed: int) -> Trial:
    data, name = Photos(place, halves=True), _name(method, rate, seed)
    delta = delta_file(place, name)
    if not delta.is_file():
        _fit(place, method, rate, seed)
    head = own_head_file(place, data)
    rows = measure(place, name, delta, data, place.alphas, head, (SEVERITY,), scored=data.scored)
    return {"method": method, "rate": rate, "seed": seed, "rows": rows}


def table(place: Place) -> str:
    """What is there, as Markdown: a line for each method and set, a column for some α."""
    lines = [
        "ViT-Ti/16 AugReg, its own ImageNet-1k head (all 1,000 classes) at α = 0. flickr_in1k_1000 halved within "
        "classes by hashes of the names, seed 0: 400 to train on, 100 to choose rate (of two) and α, 500 to test; "
        "preset timm, 4 epochs, AdamW, batch 10, bf16-mixed. Full: weights end to end; VPT-deep: gate, head beside it. "
        f"Corruptions at severity {SEVERITY} among 1,000 classes; shape_texture16 among 16 by mean probability. Top-1 "
        "%: mean ± std of seeds, in brackets the 95 % Wilson interval of n images at the mean.",
    ]
    for method in RATES:
        trials = [trial for seed in SEEDS if (trial := place.read(_sweep_name(method, seed)))]
        if trials:
            lines += ["", *_curves(METHODS[method].title, trials)]
    return "\n".join(lines)


def figure(place: Place) -> Figure:
    """Accuracy at every α on the other half of the photos, on shapes and textures, and on corruptions."""
    names = {method: [_sweep_name(method, seed) for seed in SEEDS] for method in RATES}
    trials = [trial for each in names.values() for name in each if (trial := place.read(name))]
    sets = dict.fromkeys(row["set"] for trial in trials for row in trial["rows"] if row["kind"] != "val")
    return alpha_curves(place, names, {"photos" if each == "clean" else each: (each,) for each in sets})


def _curves(title: str, trials: list[Trial]) -> list[str]:
    alphas = [alpha for alpha in SHOWN if any(row["alpha"] == alpha for row in trials[0]["rows"])]
    picked = ", ".join(f"{chosen(trial['rows']):g}" for trial in trials)
    name = f"{title}, rate {trials[0]['rate']:g}, {len(trials)} seeds; α by validation: {picked}"
    lines = [f"| {name} | n | " + " | ".join(f"α = {alpha:g}" for alpha in alphas) + " |"]
    lines += ["|---|--:|" + "--:|" * len(alphas)]
    for each in dict.fromkeys(row["set"] for row in trials[0]["rows"]):
        at = {
            alpha: [r for t in trials for r in t["rows"] if (r["set"], r["alpha"]) == (each, alpha)] for alpha in alphas
        }
        cells = " | ".join(_cell(rows) for rows in at.values())
        lines.append(f"| {each} | {at[1.0][0]['n']} | {cells} |")
    return lines


def _cell(rows: list[Trial]) -> str:
    shares = [row["top1"] for row in rows]
    low, high = wilson(round(mean(shares) * rows[0]["n"]), rows[0]["n"])
    return f"{percent(shares)} ({100 * low:.1f}–{100 * high:.1f})"
