"""One strength, one for each layer, one for each image, and how to choose: tables of docs/robustness.md.

    python -m benchmarks.strengths --root $VPT_DATA [--methods recipe ...] [--seeds 42 ...] [--threads 1]
    python -m benchmarks.strengths --print

Each method of `benchmarks.robustness_runs` is tuned on PACS' photos at the rate that val200 chose there, and evaluated
at several α on validation and test photos, on validation photos under corruptions, and on the three shifts. A finished
training is a line of OUT/strengths.jsonl, and an interrupted run continues.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations, product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, get_args

import numpy as np
import torch

from benchmarks.records import RESULTS, Records, Row, markdown
from benchmarks.robustness_runs import (
    METHODS,
    PACS_RATES,
    SEEDS,
    SHIFTS,
    WEIGHTS,
    Place,
    _pacs,
    _pacs_anchor,
    _pacs_fit,
    _read,
    fit,
    select,
    trials,
)
from vpt.data import default_root
from vpt.errors import ConfigError
from vpt.metrics.accuracy import top1
from vpt.metrics.logits import predictions
from vpt.models.delta_format import read_delta, write_delta
from vpt.robustness import RobustnessResult, run
from vpt.robustness.evaluation_sets import CLEAN, VAL, VAL_CORRUPTED
from vpt.robustness.layer_strengths import Objective, learn
from vpt.robustness.per_image import answers, models
from vpt.robustness.soups.averaging import mean as plain_mean
from vpt.robustness.soups.model_soups import stock, uniform
from vpt.robustness.test_time import Adaptation

AVERAGES = ("uniform soup of three", "mean without matching", "Model Stock of two", "Model Stock of three")
ENSEMBLE = "mean of outputs of three"
PACS_PENALTY = 0.1  # of its probe
REGULARISED: dict[str, dict[str, Any]] = {
    "from the probe, answers kept": {"probe": True, "keep_answers": {"rate": 1.0, "severity": 3}},
    "from the probe": {"probe": True},
    "SPD": {"start_decay": {"rule": "spd", "rate": 1.0}},
    "L2 to the start": {"start_decay": {"rule": "l2", "rate": 10.0}},
    "PACE": {"pace": {"rate": 1.0, "sigma": 1.0}},
}
ONLY = {"PACE": ("lora",)}
"""Methods that a way is defined for, where it is not for all."""
SEARCH = 100
"""Evaluations of learned strengths, of the first seed."""
RUNS = ("deep", "full", "lora", "shallow", "recipe")
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
LINES = (0.0, 0.5)
"""LiNeS: the strength of the first layer; the last has 1."""
TEMPERATURES = (0.1, 0.3, 1.0, 3.0)
FIXED = 0.5
ADAPT_BATCH = 20
"""Images that a model adapts to at once."""
PHOTO = 0.99
"""What is asked for on photos where a table says so."""


def run_all(place: Place, methods: Sequence[str], seeds: Sequence[int]) -> None:
    """Makes what is missing."""
    kept = Records(place.out / "strengths.jsonl", "method", "seed")
    for seed in seeds:
        for method in methods:
            if kept.find(method, seed) is None:
                kept.put(_measured(place, method, seed))
    averages = Records(place.out / "averages.jsonl", "method")
    for method in methods:
        if averages.find(method) is None and all(kept.find(method, seed) for seed in SEEDS):
            averages.put({"method": method, "sets": _averaged(place, method)})


def run_searches(place: Place, methods: Sequence[str]) -> None:
    """Learns strengths for the first seed of each method, on corrupted validation photos."""
    found = Records(place.out / "learned_strengths.jsonl", "method", "objective")
    for method in methods:
        for objective in get_args(Objective):
            if found.find(method, objective) is None:
                found.put(_learned(place, method, objective))


def _name(place: Place, method: str, seed: int) -> str:
    tried = [trials(place.out, "pacs").find(f"pacs-{method}-{rate:g}-{SEEDS[0]}") for rate in PACS_RATES[method]]
    return f"pacs-{method}-{select([each for each in tried if each is not None]):g}-{seed}"


def _trained(place: Place, method: str, seed: int) -> Path:
    name = _name(place, method, seed)
    _pacs_fit(place, method, float(name.split("-", 2)[2].rpartition("-")[0]), seed)
    return place.delta(name)


def _averaged(place: Place, method: str) -> Row:
    """By way of averaging three runs: accuracy on each set at strengths 0.5 and 1."""
    deltas = [_trained(place, method, seed) for seed in SEEDS]
    anchor, weights, folder = _pacs_anchor(place), str(place.weights), place.build / "averages" / method
    found: Row = {}
    for way in AVERAGES:
        out = folder / f"{way.replace(' ', '-')}.safetensors"
        if not out.is_file():
            if way.startswith("Model Stock"):
                try:
                    stock(deltas[: 2 if way.endswith("two") else 3], out, anchor, weights)
                except ConfigError:
                    continue
            elif way.startswith("uniform"):
                uniform(deltas, out)
            elif METHODS[method].options.get("deltas") or method in ("deep", "shallow"):
                (header, first), *others = [read_delta(path) for path in deltas]
                write_delta(out, header | {"info": {}}, plain_mean([first, *(tensors for _, tensors in others)]))
            else:
                continue
        result = _run(place, out, out.with_suffix(""), SEEDS[0], (0.5, 1.0))
        found[way] = {each.set: [r.top1 for r in result.rows if r.set == each.set] for each in result.rows}
    singles = [_evaluated(place, _name(place, method, seed), seed, ALPHAS) for seed in SEEDS]
    both: dict[str, list[float]] = {}
    for alpha in (0.5, 1.0):
        for rows in zip(*([r for r in result.rows if r.alpha == alpha] for result in singles), strict=True):
            records = [result.record(row) for result, row in zip(singles, rows, strict=True)]
            logits = np.mean([record.logits for record in records], axis=0)
            both.setdefault(rows[0].set, []).append(top1(logits, records[0].label))
    return found | {ENSEMBLE: both}


def run_regularised(place: Place, methods: Sequence[str], seeds: Sequence[int]) -> None:
    """Trains each method with what keeps it near its start."""
    found = Records(place.out / "regularised.jsonl", "method", "way", "seed")
    for method, seed, way in product(methods, seeds, REGULARISED):
        if found.find(method, way, seed) is not None or method not in ONLY.get(way, methods):
            continue
        name, options = _name(place, method, seed), dict(REGULARISED[way])
        rate = float(name.split("-", 2)[2].rpartition("-")[0])
        start = PACS_PENALTY if options.pop("probe", False) else None
        own, begun = f"{name}-{way.replace(' ', '-').replace(',', '')}", time.monotonic()
        fit(place, own, method, _pacs(place, seed), rate, seed, head=start, more=options)
        seconds = time.monotonic() - begun
        result = _run(place, place.delta(own), place.build / "regularised" / own, seed, ALPHAS)
        row: Row = {"method": method, "way": way, "seed": seed, "alphas": list(ALPHAS)}
        found.put(row | {"top1": _of_alpha(result)["top1"], "seconds": round(seconds, 1)})


def run_adapted(place: Place, methods: Sequence[str], seeds: Sequence[int]) -> None:
    """Lets every run adapt to the unlabelled test images."""
    found = Records(place.out / "adapted.jsonl", "method", "way", "seed")
    for seed, way, method in product(seeds, get_args(Adaptation), methods):
        if found.find(method, way, seed) is not None:
            continue
        delta, data = _trained(place, method, seed), _read(_pacs(place, seed))
        images, out = 20 if place.quick else None, place.build / "adapted" / f"{method}-{way}-{seed}"
        begun = time.monotonic()
        options: dict[str, Any] = {"batch_size": ADAPT_BATCH, "weights": str(place.weights), "bf16": True, "adapt": way}
        result = run(delta, data, (1.0,), out, None, images, (), **options)
        sets, n = {row.set: round(row.top1, 6) for row in result.rows}, sum(row.n for row in result.rows)
        seconds = round((time.monotonic() - begun) / n, 5)
        found.put({"method": method, "way": way, "seed": seed, "sets": sets, "seconds_per_image": seconds})


def _learned(place: Place, method: str, objective: Objective) -> Row:
    delta, seed = _trained(place, method, SEEDS[0]), SEEDS[0]
    folder = place.build / "learned" / f"{method}-{objective}"
    options: dict[str, Any] = {"weights": str(place.weights), "bf16": True, "batch_size": 25}
    options |= {"evaluations": 13 if place.quick else SEARCH, "max_images": 20 if place.quick else None}
    data, start = _read(_pacs(place, seed)), time.monotonic()
    found = learn(delta, data, folder / "strengths.json", _pacs_anchor(place), objective, corrupted=True, **options)
    seconds = time.monotonic() - start
    result = _run(place, delta, folder, seed, (1.0,), found.strengths)
    sets = {row.set: row.top1 for row in result.rows}
    row = {"method": method, "objective": objective, "seed": seed, "evaluations": options["evaluations"]}
    return row | {"seconds": round(seconds, 1), **asdict(found), "sets": sets}


def _measured(place: Place, method: str, seed: int) -> Row:
    name = _name(place, method, seed)
    _trained(place, method, seed)
    result = _evaluated(place, name, seed, ALPHAS)
    row: Row = {"method": method, "seed": seed, "run": name, "alphas": list(ALPHAS)}
    row |= _of_alpha(result) | {"images": _of_images(result)}
    lines = {}
    for first in LINES:
        line = _evaluated(place, name, seed, (1.0,), (first, 1.0))
        lines[f"{first:g}"] = {each.set: round(each.top1, 6) for each in line.rows}
    return row | {"lines": lines, "n": {each.set: each.n for each in result.rows}}


def _evaluated(
    place: Place, name: str, seed: int, alphas: Sequence[float], strengths: Sequence[float] | None = None
) -> RobustnessResult:
    out = place.build / "strengths" / name / ("one" if strengths is None else f"{strengths[0]:g}")
    return _run(place, place.delta(name), out, seed, alphas, strengths)


def _run(
    place: Place,
    delta: Path,
    out: Path,
    seed: int,
    alphas: Sequence[float],
    strengths: Sequence[float] | None = None,
) -> RobustnessResult:
    images = 20 if place.quick else None
    anchor, weights = _pacs_anchor(place), str(place.weights)
    options: dict[str, Any] = {"batch_size": 16, "weights": weights, "bf16": True, "strengths": strengths}
    return run(delta, _read(_pacs(place, seed)), alphas, out, anchor, images, (), **options)


def _of_alpha(result: RobustnessResult) -> Row:
    """By set the accuracy at each α, the loss on validation images, and the answers that seeds may agree on."""
    found: dict[str, Any] = {"top1": {}, "nll": {}, "answers": []}
    for row in result.rows:
        found["top1"].setdefault(row.set, []).append(round(row.top1, 6))
        if row.kind in (VAL, VAL_CORRUPTED):
            record = result.record(row)
            found["nll"].setdefault(row.set, []).append(round(predictions(record.logits, record.label).nll, 6))
            if row.kind == VAL_CORRUPTED:
                found["answers"].append(" ".join(map(str, record.logits.argmax(axis=1))))
    return found


def _of_images(result: RobustnessResult) -> Row:
    """By temperature and set the accuracy with a strength for each image: of mixed answers, and of mixed models."""
    by_set: dict[str, dict[float, Any]] = {}
    for row in result.rows:
        by_set.setdefault(row.set, {})[row.alpha] = result.record(row)
    found: Row = {}
    for temperature in TEMPERATURES:
        both: dict[str, dict[str, float]] = {"answers": {}, "models": {}}
        for name, records in by_set.items():
            label = records[0.0].label
            logits = {alpha: record.logits for alpha, record in records.items()}
            both["answers"][name] = round(top1(answers(logits[0.0], logits[1.0], temperature), label), 6)
            both["models"][name] = round(top1(models(logits, temperature), label), 6)
        found[f"{temperature:g}"] = both
    return found


RULES = ("fixed α = 0.5", "α = 1", "val accuracy", "val NLL", "corrupted accuracy", "corrupted NLL", "agreement")


def chosen(rule: str, row: Row, others: Sequence[Row]) -> int:
    """The position of the α that a rule takes, without a look at the test sets."""
    alphas = row["alphas"]
    middle = [abs(alpha - FIXED) for alpha in alphas]
    if rule.startswith("fixed"):
        return int(np.argmin(middle))
    if rule == "α = 1":
        return len(alphas) - 1
    values = {
        "val accuracy": row["top1"][VAL],
        "val NLL": [-value for value in row["nll"][VAL]],
        "corrupted accuracy": row["top1"][VAL_CORRUPTED],
        "corrupted NLL": [-value for value in row["nll"][VAL_CORRUPTED]],
        "agreement": _agreement([row, *others]),
    }[rule]
    return max(range(len(alphas)), key=lambda at: (values[at], -middle[at]))


def _agreement(rows: Sequence[Row]) -> list[float]:
    """Of the seeds of one method: the share of corrupted validation photos on which two of them agree, at each α."""
    found = []
    for at in range(len(rows[0]["alphas"])):
        said = [np.array(row["answers"][at].split()) for row in rows]
        found.append(mean(float((one == other).mean()) for one, other in combinations(said, 2)) if len(rows) > 1 else 0)
    return found


def shifted(sets: Mapping[str, Any], at: int | None = None) -> float:
    """The mean over the shifts, in percent."""
    return 100 * mean(float(sets[name] if at is None else sets[name][at]) for name in SHIFTS)


def blocks(out: Path = RESULTS) -> dict[str, str]:
    """What is there, as Markdown."""
    rows = Records(out / "strengths.jsonl").rows()
    if not rows:
        return {}
    made = {"strengths": _table(rows), "strength rules": _rules(rows)}
    if averages := Records(out / "averages.jsonl").rows():
        made["averages"] = _averages(averages)
    if regularised := Records(out / "regularised.jsonl").rows():
        made["regularised"] = _regularised(regularised, rows)
    if adapted := Records(out / "adapted.jsonl").rows():
        made["adapted"] = _adapted(adapted, rows)
    if learned := Records(out / "learned_strengths.jsonl").rows():
        made["learned strengths"] = _searches(learned, rows)
    return made


def _averages(rows: Sequence[Row]) -> str:
    by_method = {row["method"]: row["sets"] for row in rows}
    methods = [method for method in RUNS if method in by_method]
    lines = []
    for at, alpha in enumerate((0.5, 1.0)):
        for way in (*AVERAGES, ENSEMBLE):
            cells = [by_method[method].get(way) for method in methods]
            told = ["–" if sets is None else f"{100 * sets[CLEAN][at]:.1f} / {shifted(sets, at):.1f}" for sets in cells]
            lines.append([f"{way}, α = {alpha:g}", *told])
    return markdown(["photos / shifts", *(METHODS[method].title for method in methods)], lines)


def _regularised(rows: Sequence[Row], runs: Sequence[Row]) -> str:
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        every = [{**row, "way": "plain"} for row in runs] + list(rows)
        for way in ("plain", *REGULARISED):
            own = [row for row in every if (row["method"], row["way"]) == (method, way)]
            first = [row for row in own if row["seed"] == SEEDS[0]]
            if own:
                cells = [_both(each) if each else "–" for each in (first, own if len(own) == len(SEEDS) else ())]
                lines.append([METHODS[method].title, way, *cells])
    return markdown(["photos / shifts at α = 1", "training", "seed 42", "three seeds"], lines)


def _adapted(rows: Sequence[Row], runs: Sequence[Row]) -> str:
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        plain = [row for row in runs if row["method"] == method]
        lines.append([METHODS[method].title, "none", str(len(plain)), _both(plain), "–"])
        for way in get_args(Adaptation):
            own = [row for row in rows if (row["method"], row["way"]) == (method, way)]
            if own:
                both = _spread_of([(row["sets"][CLEAN], shifted(row["sets"])) for row in own])
                first = next(row for row in own if row["seed"] == SEEDS[0])
                cost = f"{1000 * first['seconds_per_image']:.0f}"
                lines.append([METHODS[method].title, way, str(len(own)), both, cost])
    head = ["α = 1", "adapted at test time by", "seeds", "photos / shifts", "ms an image, seed 42"]
    return markdown(head, lines, 2)


def _both(rows: Iterable[Row]) -> str:
    return _spread_of([(row["top1"][CLEAN][-1], shifted(row["top1"], -1)) for row in rows])


def _spread_of(found: Sequence[tuple[float, float]]) -> str:
    """Shares of photos and percent under shift of some runs."""
    photos, shifts = zip(*found, strict=True)
    return f"{100 * mean(photos):.1f} / {_spread(shifts)}"


def _searches(rows: Sequence[Row], runs: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        run_row = next(each for each in runs if (each["method"], each["seed"]) == (row["method"], row["seed"]))
        last = f"{100 * run_row['top1'][CLEAN][-1]:.1f} / {shifted(run_row['top1'], -1):.1f}"
        found = f"{100 * row['sets'][CLEAN]:.1f} / {shifted(row['sets']):.1f}"
        strengths = " ".join(f"{each:.1f}" for each in row["strengths"])
        title = METHODS[row["method"]].title
        lines.append([title, row["objective"], f"{row['alpha']:g}", last, found, strengths, f"{row['seconds']:.0f}"])
    head = ["seed 42", "objective", "best single α by it", "photos / shifts at α = 1", "learned", "strengths", "s"]
    return markdown(head, lines)


def _ways(row: Row) -> Iterator[tuple[str, float, float]]:
    """Each way of combining both ends: accuracy on photos and under shift, in percent."""
    for at, alpha in enumerate(row["alphas"]):
        yield f"α = {alpha:g}", 100 * row["top1"][CLEAN][at], shifted(row["top1"], at)
    for first, sets in row["lines"].items():
        yield f"LiNeS, {first} to 1", 100 * sets[CLEAN], shifted(sets)
    for temperature, both in row["images"].items():
        for kind, name in (("answers", "by image, answers"), ("models", "by image, models")):
            yield f"{name}, T = {temperature}", 100 * both[kind][CLEAN], shifted(both[kind])


def _table(rows: Sequence[Row]) -> str:
    methods = [method for method in RUNS if any(row["method"] == method for row in rows)]
    cells: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        for way, photo, shift in _ways(row):
            cells.setdefault(way, {}).setdefault(row["method"], []).append((photo, shift))
    lines = []
    for way, by_method in cells.items():
        line = [way]
        for method in methods:
            photos, shifts = zip(*by_method[method], strict=True)
            line.append(f"{mean(photos):.1f} / {_spread(shifts)}")
        lines.append(line)
    return markdown(["photos / shifts", *(METHODS[method].title for method in methods)], lines)


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def _rules(rows: Sequence[Row]) -> str:
    """Regret of each rule under shift, over all trained runs: what the best of the measured α has more, in points."""
    lines = []
    generator = np.random.default_rng(0)
    for rule in RULES:
        regrets, photos = [], []
        for row in rows:
            others = [each for each in rows if each["method"] == row["method"] and each["seed"] != row["seed"]]
            at = chosen(rule, row, others)
            curve = [shifted(row["top1"], each) for each in range(len(row["alphas"]))]
            regrets.append(max(curve) - curve[at])
            photos.append(100 * row["top1"][CLEAN][at])
        drawn = generator.choice(regrets, (10_000, len(regrets))).mean(axis=1)
        low, high = np.quantile(drawn, (0.025, 0.975))
        lines.append(
            [rule, f"{mean(regrets):.1f}", f"{low:.1f} to {high:.1f}", f"{max(regrets):.1f}", f"{mean(photos):.1f}"]
        )
    head = ["rule", "mean regret", "95 %", "largest", "photos"]
    return markdown(head, lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(default_root()))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--build", type=Path, default=Path("build/robustness"))
    parser.add_argument("--methods", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), choices=list(SEEDS))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--print", action="store_true", help="run nothing, print what is there")
    parser.add_argument("--search", nargs="*", choices=list(RUNS), help="then learn strengths of the first seed")
    parser.add_argument("--regularised", nargs="*", choices=list(RUNS), help="then train with what forgets less")
    parser.add_argument("--adapted", nargs="*", choices=list(RUNS), help="then adapt at test time")
    parser.add_argument("--quick", action="store_true", help="a rehearsal: two batches, 20 images a set")
    args = parser.parse_args(argv)
    if not args.print:
        torch.set_num_threads(args.threads)
        place = Place(args.root, args.root / WEIGHTS, args.out, args.build, args.quick)
        run_all(place, args.methods, args.seeds)
        run_searches(place, args.search or ())
        run_regularised(place, args.regularised or (), args.seeds)
        run_adapted(place, args.adapted or (), args.seeds)
    print(*blocks(args.out).values(), sep="\n\n")


if __name__ == "__main__":
    main()
