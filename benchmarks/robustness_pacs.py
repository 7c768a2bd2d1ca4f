"""Part (a): six methods trained on the photos of PACS, from the linear probe to each of them in steps of α."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from benchmarks.robustness_figures import alpha_curves
from benchmarks.robustness_trials import (
    METHODS,
    PENALTIES,
    SEEDS,
    Place,
    Trial,
    delta_file,
    fit,
    measure,
    percent,
    select,
)
from vpt.data import VTABDataModule
from vpt.robustness.evaluation.result import FIXED_ALPHA

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATES = {
    "deep": (2e-3, 4e-3),
    "full": (1e-4, 3e-4),
    "lpft": (3e-5, 1e-4),
    "lora": (1e-3, 4e-3),
    "shallow": (4e-3, 8e-3),
}
PROBE = "pacs-linear"
SHIFTS = ("art_painting", "cartoon", "sketch")


def data(place: Place, seed: int) -> VTABDataModule:
    """Trained on train800 throughout, so that val200 may choose rate and α."""
    return VTABDataModule("pacs7_photo", place.root, "train800", preset="square", batch_size=10, seed=seed)


def execute(place: Place) -> None:
    """Makes what is missing: the probe, then every method with the first seed, then the other seeds."""
    first = SEEDS[0]
    place.kept(PROBE, lambda: _probe(place))
    for seed in SEEDS:
        for method, rates in RATES.items():
            tried = [
                place.kept(_name(method, rate, first), partial(_fit, place, method, rate, first)) for rate in rates
            ]
            place.kept(f"pacs-{method}-sweep-{seed}", partial(_sweep, place, method, select(tried), seed))


def _probe(place: Place) -> Trial:
    """The exact linear probe, which is α = 0 of all others; the penalty is chosen on val200."""
    images = data(place, SEEDS[0])
    trial = fit(place, PROBE, METHODS["linear"], images, PENALTIES, SEEDS[0], 1)
    return trial | {"rows": measure(place, PROBE, delta_file(place, PROBE), images)}


def _anchor(place: Place) -> Path:
    path = delta_file(place, PROBE)
    if not path.is_file():
        fit(place, PROBE, METHODS["linear"], data(place, SEEDS[0]), PENALTIES, SEEDS[0], 1)
    return path


def _name(method: str, rate: float, seed: int) -> str:
    return f"pacs-{method}-{rate:g}-{seed}"


def _fit(place: Place, method: str, rate: float, seed: int) -> Trial:
    head = _anchor(place) if method == "lpft" else None
    return fit(place, _name(method, rate, seed), METHODS[method], data(place, seed), rate, seed, head=head)


def _sweep(place: Place, method: str, rate: float, seed: int) -> Trial:
    name = _name(method, rate, seed)
    if not delta_file(place, name).is_file():
        _fit(place, method, rate, seed)
    rows = measure(place, name, delta_file(place, name), data(place, seed), place.alphas, _anchor(place))
    return {"method": method, "rate": rate, "seed": seed, "rows": rows}


def chosen(rows: Sequence[Trial]) -> float:
    """α by validation accuracy; of several the one nearest to 0.5, then the smaller (`vpt.robustness.choose_alpha`)."""
    val = [row for row in rows if row["kind"] == "val"]
    best = min(val, key=lambda row: (-row["top1"], abs(row["alpha"] - FIXED_ALPHA), row["alpha"]))
    return float(best["alpha"])


def accuracy(rows: Sequence[Trial], alpha: float) -> tuple[float, float]:
    """Accuracy on the photos, and the mean over the three shifts."""
    at = {row["set"]: row["top1"] for row in rows if row["alpha"] == alpha}
    return at["clean"], mean(at[shift] for shift in SHIFTS)


def table(place: Place) -> str:
    """What is there, as Markdown."""
    head = ["α = 0 (probe)", "α = 0.5", "α by val200", "α = 1"]
    lines = [
        "PACS, ViT-Ti/16 AugReg: trained on 800 photos (preset square, 4 epochs, AdamW, batch 10, bf16-mixed), rate of "
        "two by val200 with seed 42, α by val200 of each seed; no model saw val200. Test read once: photo n = 420, OOD "
        "the mean of art_painting, cartoon and sketch, n = 420 each. α = 0: exact linear probe. Top-1 %, mean ± std of "
        "seeds.",
        "",
        "| method | rate | seeds | α by val200 | "
        + " | ".join([f"ID {each}" for each in head] + [f"OOD {each}" for each in head])
        + " |",
        "|---|--:|--:|--:|" + "--:|" * 8,
    ]
    means: dict[str, dict[str, float]] = {}
    for method in RATES:
        trials = [trial for seed in SEEDS if (trial := place.read(f"pacs-{method}-sweep-{seed}"))]
        if not trials:
            lines.append(f"| {METHODS[method].title} | – | 0 |" + " |" * 9)
            continue
        picked = [chosen(trial["rows"]) for trial in trials]
        at = {
            label: [accuracy(t["rows"], own if alpha is None else alpha) for t, own in zip(trials, picked, strict=True)]
            for label, alpha in (("0", 0.0), ("fixed", FIXED_ALPHA), ("val", None), ("1", 1.0))
        }
        cells = [percent([pair[which] for pair in pairs]) for which in (0, 1) for pairs in at.values()]
        alphas = ", ".join(f"{alpha:g}" for alpha in picked)
        lines.append(
            f"| {METHODS[method].title} | {trials[0]['rate']:g} | {len(trials)} | {alphas} | {' | '.join(cells)} |"
        )
        for label, pairs in at.items():
            for which, kind in enumerate(("ID", "OOD")):
                means.setdefault(f"{kind}, α {label}", {})[method] = mean(pair[which] for pair in pairs)
    return "\n".join([*lines, *_probed(place), *_shifts(place), *_winners(means)])


def figure(place: Place) -> Figure:
    """Accuracy at every α on the photos, on each shift and on their mean."""
    names = {method: [f"pacs-{method}-sweep-{seed}" for seed in SEEDS] for method in RATES}
    panels = {"photo (in distribution)": ("clean",), "mean of the shifts": SHIFTS} | {each: (each,) for each in SHIFTS}
    return alpha_curves(place, names, panels)


def _probed(place: Place) -> list[str]:
    trial = place.read(PROBE)
    if trial is None:
        return []
    inside, outside = accuracy(trial["rows"], 1.0)
    text = f"Linear probe, exact (penalty {trial['rate']:g}, no seed): ID {100 * inside:.1f}, OOD {100 * outside:.1f}."
    return ["", text]


def _shifts(place: Place) -> list[str]:
    """Each shift on its own at fixed α."""
    lines = ["", "| method | seeds | α | photo | art_painting | cartoon | sketch |", "|---|--:|--:|--:|--:|--:|--:|"]
    for method in RATES:
        trials = [trial for seed in SEEDS if (trial := place.read(f"pacs-{method}-sweep-{seed}"))]
        for alpha in (FIXED_ALPHA, 1.0) if trials else ():
            found = [{r["set"]: r["top1"] for r in t["rows"] if r["alpha"] == alpha} for t in trials]
            cells = [percent([each[name] for each in found]) for name in ("clean", *SHIFTS)]
            lines.append(f"| {METHODS[method].title} | {len(trials)} | {alpha:g} | {' | '.join(cells)} |")
    return lines if len(lines) > 3 else []


def _winners(means: dict[str, dict[str, float]]) -> list[str]:
    lines = []
    for question, found in means.items():
        if question.endswith("α 0"):
            continue
        top = max(found.values())
        names = " and ".join(METHODS[name].title for name, value in found.items() if abs(value - top) < 1e-9)
        lines.append(f"- {question}: {names}, {100 * top:.1f} (of {len(found)} methods)")
    return ["", *lines] if lines else []
