"""What happens to tuned models when the data shift: the tables of docs/robustness.md, on real weights and images.

    python -m benchmarks.robustness_tables --root $VPT_DATA [--parts imagenet pacs own_head fewshot] [--threads 1]
    python -m benchmarks.robustness_tables --print

Validation images choose, test images are read once, as each table says. A finished trial is a line of
OUT/robustness_PART.jsonl, so that an interrupted run continues where it stopped and loses one trial at most; delta
files and records stay under --build.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

import torch

from benchmarks import robustness_runs as runs
from benchmarks.records import RESULTS, Row, markdown
from benchmarks.robustness_runs import (
    HEAD_RATES,
    HEAD_SEVERITY,
    IMAGENET,
    METHODS,
    PACS_PROBE,
    PACS_RATES,
    SEEDS,
    SHIFTS,
    SHOT_MEAN,
    SHOT_PRESETS,
    SHOT_RATES,
    SHOT_STEPS,
    SHOTS,
    WEIGHTS,
    Place,
)
from vpt.data import corruptions, default_root
from vpt.metrics.accuracy import wilson
from vpt.reports.style import save_figure, style
from vpt.robustness.evaluation_result import FIXED_ALPHA

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = (0.0, 0.3, 0.5, 0.7, 1.0)
"""α in the tables of the weights' own head; the figure has all."""
SCORES = {"top1": "top-1", "ece": "ECE"}
Found = Mapping[str, Row]
"""The trials of a part that are there, by name."""


def percent(shares: Sequence[float]) -> str:
    """Mean and standard deviation over seeds of shares, in percent."""
    spread = f" ± {100 * stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{100 * mean(shares):.1f}{spread}"


def interval(share: float, n: int) -> str:
    """The 95 % Wilson interval of an accuracy, in percent."""
    low, high = wilson(round(share * n), n)
    return f"({100 * low:.1f}–{100 * high:.1f})"


def chosen(rows: Sequence[Row]) -> float:
    """α by validation accuracy; of several the one nearest to 0.5, then the smaller (`vpt.robustness.choose_alpha`)."""
    val = [row for row in rows if row["kind"] == "val"]
    best = min(val, key=lambda row: (-row["top1"], abs(row["alpha"] - FIXED_ALPHA), row["alpha"]))
    return float(best["alpha"])


def accuracy(rows: Sequence[Row], alpha: float) -> tuple[float, float]:
    """Accuracy on the photos, and the mean over the three shifts."""
    at = {row["set"]: row["top1"] for row in rows if row["alpha"] == alpha}
    return at["clean"], mean(at[shift] for shift in SHIFTS)


def _sweeps(found: Found, part: str, method: str) -> list[Row]:
    return [found[name] for seed in SEEDS if (name := f"{part}-{method}-sweep-{seed}") in found]


def pacs(found: Found) -> dict[str, str]:
    """Six methods trained on photos, tested on paintings, cartoons and sketches."""
    head = ["α = 0 (probe)", "α = 0.5", "α chosen on val200", "α = 1"]
    rows, means = [], dict[str, dict[str, float]]()
    for method in PACS_RATES:
        trials = _sweeps(found, "pacs", method)
        if not trials:
            rows.append([METHODS[method].title, "–", "0", *[""] * 9])
            continue
        picked = [chosen(trial["rows"]) for trial in trials]
        at = {
            label: [accuracy(t["rows"], own if alpha is None else alpha) for t, own in zip(trials, picked, strict=True)]
            for label, alpha in (("0", 0.0), ("fixed", FIXED_ALPHA), ("val", None), ("1", 1.0))
        }
        cells = [percent([pair[which] for pair in pairs]) for which in (0, 1) for pairs in at.values()]
        alphas = ", ".join(f"{alpha:g}" for alpha in picked)
        rows.append([METHODS[method].title, f"{trials[0]['rate']:g}", f"{len(trials)}", alphas, *cells])
        for label, pairs in at.items():
            for which, kind in enumerate(("ID", "OOD")):
                means.setdefault(f"{kind}, α {label}", {})[method] = mean(pair[which] for pair in pairs)
    scores = (f"{kind} {each}" for kind in ("ID", "OOD") for each in head)
    columns = ["method", "learning rate", "seeds", "α chosen on val200", *scores]
    made = {
        "pacs protocol": "PACS, ViT-Ti/16 AugReg: trained on 800 photos (preset square, 4 epochs, AdamW, batch 10, "
        "bf16-mixed); learning rate (of two) chosen on val200 with seed 42, α on val200 for each seed; no model was "
        "trained on val200. Test evaluated once: photo n = 420, OOD the mean of art_painting, cartoon and sketch, "
        "n = 420 each. α = 0: exact linear probe. Top-1 %, mean ± std of seeds.",
        "pacs": markdown(columns, rows),
    }
    if PACS_PROBE in found:
        probe = found[PACS_PROBE]
        inside, outside = (f"{100 * share:.1f}" for share in accuracy(probe["rows"], 1.0))
        made["pacs probe"] = f"Linear probe, exact (penalty {probe['rate']:g}, no seed): ID {inside}, OOD {outside}."
    return made | _shifts(found) | _winners(means)


def _shifts(found: Found) -> dict[str, str]:
    """Each shift on its own at fixed α."""
    lines = []
    for method in PACS_RATES:
        trials = _sweeps(found, "pacs", method)
        for alpha in (FIXED_ALPHA, 1.0) if trials else ():
            at = [{r["set"]: r["top1"] for r in t["rows"] if r["alpha"] == alpha} for t in trials]
            cells = [percent([each[name] for each in at]) for name in ("clean", *SHIFTS)]
            lines.append([METHODS[method].title, str(len(trials)), f"{alpha:g}", *cells])
    return {"pacs shifts": markdown(["method", "seeds", "α", "photo", *SHIFTS], lines)} if lines else {}


def _winners(means: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    lines = []
    for question, found in means.items():
        if question.endswith("α 0"):
            continue
        top = max(found.values())
        names = " and ".join(METHODS[name].title for name, value in found.items() if abs(value - top) < 1e-9)
        lines.append(f"- {question}: {names}, {100 * top:.1f} (of {len(found)} methods)")
    return {"pacs best": "\n".join(lines)} if lines else {}


def short(found: Found) -> str:
    """The part on PACS in five columns."""
    rows = []
    if PACS_PROBE in found:
        inside, outside = accuracy(found[PACS_PROBE]["rows"], 1.0)
        rows.append(["linear probe (α = 0)", "–", f"{100 * inside:.1f}", "–", f"{100 * outside:.1f}"])
    for method in ("recipe", "lora", "shallow", "lpft", "deep", "full"):
        if trials := _sweeps(found, "pacs", method):
            at = [[accuracy(trial["rows"], alpha) for trial in trials] for alpha in (FIXED_ALPHA, 1.0)]
            cells = [percent([pair[which] for pair in pairs]) for which in (0, 1) for pairs in at]
            rows.append([METHODS[method].title, *cells])
    return markdown(["method", "photos, α = 0.5", "α = 1", "shifts, α = 0.5", "α = 1"], rows)


def imagenet(found: Found) -> dict[str, str]:
    """The classifier that the weights were published with, on photos, shapes, textures and corruptions."""
    rows = []
    for row in found[IMAGENET]["rows"] if IMAGENET in found else ():
        name, severity = (
            (row["set"], "–") if row["severity"] is None else (corruptions.title(row["kind"]), row["severity"])
        )
        name = "flickr_in1k_1000" if name == "clean" else name
        share = f"{100 * row['top1']:.1f} {interval(row['top1'], row['n'])}"
        rows.append([name, severity, f"{row['n']:,}", share, f"{100 * row['ece']:.1f}"])
    return {
        "imagenet protocol": "ViT-Ti/16 AugReg with its pretrained ImageNet-1k head, no training, no seed (preset "
        f"timm: crop 0.9), fp32. Photos and their corruptions ({_parameters(found)}) among 1,000 classes; "
        "shape_texture16 among 16 by mean probability. Top-1 % with 95 % Wilson interval; ECE in % (15 bins of equal "
        "width).",
        "imagenet": markdown(["set", "severity", "n", "top-1", "ECE"], rows),
    }


def _parameters(found: Found) -> str:
    rows = [row for trial in found.values() for row in trial.get("rows", ()) if row["severity"] is not None]
    new = all(row.get("corruptions") == corruptions.PUBLISHED for row in rows)
    return f"parameters of {'ImageNet-C' if new else 'vpt 0.1'}"


def own_head(found: Found) -> dict[str, str]:
    """From the pretrained classifier to tuned models: a line for each method and set, a column for some α."""
    made = {
        "own head protocol": "ViT-Ti/16 AugReg, its pretrained ImageNet-1k head (all 1,000 classes) at α = 0. "
        "flickr_in1k_1000 split in half within classes by hashes of the names, seed 0: 400 to train on, 100 to choose "
        "learning rate (of two) and α, 500 to test; preset timm, 4 epochs, AdamW, batch 10, bf16-mixed. Full: all "
        "weights interpolated; VPT-deep: gate, head interpolated. "
        f"Corruptions ({_parameters(found)}) at severity {HEAD_SEVERITY} among 1,000 "
        "classes; shape_texture16 among 16 by mean probability. Top-1 %: mean ± std of seeds, in brackets the 95 % "
        "Wilson interval of n images at the mean."
    }
    for method in HEAD_RATES:
        if trials := _sweeps(found, "own-head", method):
            made[f"own head {method}"] = _curves(METHODS[method].title, trials)
    return made


def _curves(title: str, trials: Sequence[Row]) -> str:
    alphas = [alpha for alpha in SHOWN if any(row["alpha"] == alpha for row in trials[0]["rows"])]
    picked = ", ".join(f"{chosen(trial['rows']):g}" for trial in trials)
    name = f"{title}, learning rate {trials[0]['rate']:g}, {len(trials)} seeds; α chosen on validation: {picked}"
    lines = []
    for each in dict.fromkeys(row["set"] for row in trials[0]["rows"]):
        at = [[r for t in trials for r in t["rows"] if (r["set"], r["alpha"]) == (each, alpha)] for alpha in alphas]
        cells = []
        for rows in at:
            shares = [row["top1"] for row in rows]
            cells.append(f"{percent(shares)} {interval(mean(shares), rows[0]['n'])}")
        lines.append([each, at[-1][0]["n"], *cells])
    return markdown([name, "n", *(f"α = {alpha:g}" for alpha in alphas)], lines)


def fewshot(found: Found) -> dict[str, str]:
    """Accuracy and calibration by the number of training images of each class."""
    made = {
        "few shots protocol": "Few shots, ViT-Ti/16 AugReg: nested stratified subsets of train800, seed = subset seed; "
        f"AdamW, batch 10, bf16-mixed, at least {runs.EPOCHS} epochs and {SHOT_STEPS} steps, learning rates "
        "as chosen with 800 images; whole test set, last epoch. Linear: exact head. Joint trains prompts and backbone "
        "together, so its backbone is not frozen. %, mean ± std of seeds (their number in brackets unless 3)."
    }
    for task, counts in SHOTS.items():
        first = (f"fewshot-{task}-{method}-1-{SEEDS[0]}" for method in SHOT_RATES[task])
        n = next((found[name]["rows"][0]["n"] for name in first if name in found), 0)
        for score, title in SCORES.items():
            lines = []
            for method in (*SHOT_RATES[task], SHOT_MEAN):
                cells = [_cell(_shots(found, task, method, shots, score)) for shots in counts]
                lines.append([METHODS[method].title, *cells])
            name = f"{task}, n = {n:,}, preset {SHOT_PRESETS[task]}: {title} by shots"
            made[f"few shots {task} {score}"] = markdown([name, *map(str, counts)], lines)
    return made


def _shots(found: Found, task: str, method: str, shots: int, score: str) -> list[float]:
    """The score of each seed that is there."""
    names = (f"fewshot-{task}-{method}-{shots}-{seed}" for seed in SEEDS)
    return [found[name]["rows"][0][score] for name in names if name in found]


def _cell(values: list[float]) -> str:
    if not values:
        return "–"
    return percent(values) + ("" if len(values) == len(SEEDS) else f" ({len(values)})")


def band(axis: Axes, method: str, curve: Mapping[float, Sequence[float]]) -> None:
    """Draws one method's mean in percent, with a band of one standard deviation over seeds, in its colour."""
    middle = [100 * mean(values) for values in curve.values()]
    spread = [100 * stdev(values) if len(values) > 1 else 0.0 for values in curve.values()]
    low, high = ([m + sign * s for m, s in zip(middle, spread, strict=True)] for sign in (-1, 1))
    axis.plot(list(curve), middle, color=METHODS[method].colour, lw=1.5, marker=".", ms=4, label=METHODS[method].title)
    axis.fill_between(list(curve), low, high, alpha=0.15, color=METHODS[method].colour, lw=0)


def alpha_curves(trials: Mapping[str, Sequence[Row]], panels: Mapping[str, Sequence[str]]) -> Figure:
    """Accuracy at every α: trials of each method, and by title of a panel the sets whose mean it shows."""
    from matplotlib.figure import Figure

    columns = 3 if len(panels) <= 6 else 5
    rows = -(-len(panels) // columns)
    with style():
        figure = Figure(figsize=(2.9 * columns if columns == 3 else 11.5, 2.5 * rows + 0.6), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, (title, sets) in zip(axes, panels.items(), strict=False):
            for method, own in trials.items():
                if own:
                    band(axis, method, _curve(own, sets))
            axis.set(title=title, xlabel="α", ylabel="top-1 (%)")
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, max(1, len(labels))), frameon=False)
    return figure


def _curve(trials: Sequence[Row], sets: Sequence[str]) -> dict[float, list[float]]:
    """Mean accuracy over the sets of each seed, by α."""
    curve: dict[float, list[float]] = {}
    for trial in trials:
        for alpha in sorted({row["alpha"] for row in trial["rows"]}):
            shown = [row["top1"] for row in trial["rows"] if row["alpha"] == alpha and row["set"] in sets]
            curve.setdefault(alpha, []).append(mean(shown))
    return curve


def pacs_figure(found: Found) -> Figure:
    """Accuracy at every α on the photos, on each shift and on their mean."""
    panels = {"photo (in distribution)": ("clean",), "mean of the shifts": SHIFTS} | {each: (each,) for each in SHIFTS}
    return alpha_curves({method: _sweeps(found, "pacs", method) for method in PACS_RATES}, panels)


def own_head_figure(found: Found) -> Figure:
    """Accuracy at every α on the other half of the photos, on shapes and textures, and on corruptions."""
    trials = {method: _sweeps(found, "own-head", method) for method in HEAD_RATES}
    rows = [row for own in trials.values() for trial in own for row in trial["rows"]]
    sets = dict.fromkeys(row["set"] for row in rows if row["kind"] not in ("val", "val-corrupted"))
    return alpha_curves(trials, {"photos" if each == "clean" else each: (each,) for each in sets})


def fewshot_figure(found: Found) -> Figure:
    """Accuracy and ECE by the number of training images of each class."""
    from matplotlib.figure import Figure

    with style():
        drawn = Figure(figsize=(8.6, 6.6), layout="constrained")
        axes = drawn.subplots(len(SHOTS), len(SCORES), squeeze=False)
        for row, (task, counts) in zip(axes, SHOTS.items(), strict=True):
            for axis, (score, title) in zip(row, SCORES.items(), strict=True):
                for method in (*SHOT_RATES[task], SHOT_MEAN):
                    curve: dict[float, list[float]] = {
                        shots: each for shots in counts if (each := _shots(found, task, method, shots, score))
                    }
                    if curve:
                        band(axis, method, curve)
                axis.set_xscale("log", base=2)
                axis.set_xticks(counts, [str(shots) for shots in counts])
                axis.minorticks_off()
                axis.set(title=task, xlabel="training images of each class", ylabel=f"{title} (%)")
        handles, labels = axes[-1][0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return drawn


RUN: dict[str, Callable[[Place], None]] = {
    "imagenet": runs.run_imagenet,
    "pacs": runs.run_pacs,
    "own_head": runs.run_own_head,
    "fewshot": runs.run_fewshot,
}
TABLES = {"imagenet": imagenet, "pacs": pacs, "own_head": own_head, "fewshot": fewshot}
FIGURES = {"pacs": pacs_figure, "own_head": own_head_figure, "fewshot": fewshot_figure}


def _found(out: Path, part: str) -> Found:
    return {row["trial"]: row for row in runs.trials(out, part).rows()}


def blocks(out: Path = RESULTS) -> dict[str, str]:
    """What is there, as Markdown."""
    made = {name: text for part, tables in TABLES.items() for name, text in tables(_found(out, part)).items()}
    return made | {"robustness": short(_found(out, "pacs"))}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing, prints the tables and draws the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(default_root()))
    parser.add_argument("--weights", type=Path, help=f"default: ROOT/{WEIGHTS}")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--build", type=Path, default=Path("build/robustness_tables"), help="delta files and records")
    parser.add_argument("--figures", type=Path, default=Path("docs"), help="folder of the figures")
    parser.add_argument("--parts", nargs="+", default=list(RUN), choices=list(RUN))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--print", action="store_true", help="run nothing, print and draw what is there")
    parser.add_argument(
        "--quick", action="store_true", help="a rehearsal under BUILD/quick: two batches, 20 images a set, three α"
    )
    args = parser.parse_args(argv)
    if not args.print:
        torch.set_num_threads(args.threads)
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    out, build = (args.build / "quick/results", args.build / "quick") if args.quick else (args.out, args.build)
    figures = args.build / "quick" if args.quick else args.figures
    place = Place(args.root, args.weights or args.root / WEIGHTS, out, build, args.quick)
    for part in args.parts:
        if not args.print:
            RUN[part](place)
        found = _found(out, part)
        print(f"## {part}", *TABLES[part](found).values(), sep="\n\n", end="\n\n", flush=True)
        if part in FIGURES:
            print(f"figure: {save_figure(FIGURES[part](found), figures / f'robustness_{part}.png')}\n", flush=True)


if __name__ == "__main__":
    main()
