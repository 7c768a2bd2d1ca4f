"""Part (d): from the weights' own classifier to fine-tuned models, end to end and by the gate of prompts."""

from __future__ import annotations

from functools import partial

from benchmarks.robustness_photos import Photos, own_head_file
from benchmarks.robustness_trials import METHODS, SEEDS, Place, Trial, delta_file, fit, interval, measure, select

RATES = {"full": (3e-5, 1e-4), "deep": (1e-3, 4e-3)}
SEVERITY = 3


def execute(place: Place) -> None:
    """Tries the rates of each method with the first seed, and measures the chosen one at every α."""
    for method, rates in RATES.items():
        names = {rate: f"own-head-{method}-val-{rate:g}-{SEEDS[0]}" for rate in rates}
        tried = [place.kept(name, partial(_fit, place, method, rate)) for rate, name in names.items()]
        rate = select(tried)
        place.kept(f"own-head-{method}-sweep-{SEEDS[0]}", partial(_sweep, place, method, rate))


def _fit(place: Place, method: str, rate: float) -> Trial:
    data = Photos(place, halves=True, seed=SEEDS[0])
    head = own_head_file(place, data)
    return fit(place, _name(method, rate), METHODS[method], data, rate, SEEDS[0], head=head)


def _name(method: str, rate: float) -> str:
    return f"own-head-{method}-{rate:g}-{SEEDS[0]}"


def _sweep(place: Place, method: str, rate: float) -> Trial:
    data = Photos(place, halves=True)
    delta = delta_file(place, _name(method, rate))
    if not delta.is_file():
        _fit(place, method, rate)
    head = own_head_file(place, data)
    rows = measure(place, _name(method, rate), delta, data, place.alphas, head, (SEVERITY,), data.scored)
    return {"method": method, "rate": rate, "seed": SEEDS[0], "rows": rows}


def table(place: Place) -> str:
    """What is there, as Markdown: a line for each method and set, a column for each α."""
    trials = [trial for method in RATES if (trial := place.read(f"own-head-{method}-sweep-{SEEDS[0]}"))]
    lines = [
        "ViT-Ti/16 AugReg, its own ImageNet-1k head (all 1,000 classes) at α = 0. flickr_in1k_1000 halved within "
        "classes by hashes of the names, seed 0: 400 to train on, 100 to choose rate (of two) and α, 500 to test; "
        "preset timm, 4 epochs, AdamW, batch 10, bf16-mixed, one seed (42). Full: weights end to end; VPT-deep: gate, head beside "
        f"it. Corruptions at severity {SEVERITY} among 1,000 classes; shape_texture16 among 16 by mean probability. "
        "Top-1 % with 95 % Wilson interval.",
    ]
    if not trials:
        return lines[0]
    alphas = sorted({row["alpha"] for row in trials[0]["rows"]})
    lines += ["", "| method | set | n | " + " | ".join(f"α = {alpha:g}" for alpha in alphas) + " |"]
    lines += ["|---|---|--:|" + "--:|" * len(alphas)]
    for trial in trials:
        title = f"{METHODS[trial['method']].title}, rate {trial['rate']:g}"
        for name in dict.fromkeys(row["set"] for row in trial["rows"]):
            rows = {row["alpha"]: row for row in trial["rows"] if row["set"] == name}
            cells = " | ".join(interval(rows[alpha]) for alpha in alphas)
            lines.append(f"| {title} | {name} | {rows[1.0]['n']} | {cells} |")
    return "\n".join(lines)
