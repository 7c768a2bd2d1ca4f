"""All scores of one or several evaluated models as plain values: what tables, figures and JSON are made of."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from vpt.data.corruptions import title
from vpt.errors import ConfigError
from vpt.image_size import size_text
from vpt.metrics.accuracy import correct, difference, top1
from vpt.metrics.calibration import equal_width, temperature
from vpt.metrics.effective_robustness import POPULATIONS, effective_robustness
from vpt.metrics.logits import matched, positions, predictions
from vpt.metrics.summary import summary
from vpt.reports.page import Values
from vpt.reports.robustness_shifts import agreements, together
from vpt.reports.robustness_unknown import detected
from vpt.robustness.alpha_curve import accuracy_curve
from vpt.robustness.evaluation_result import FIXED_ALPHA, RobustnessResult, Row
from vpt.robustness.evaluation_sets import CLEAN, SHIFT, VAL, VAL_CORRUPTED
from vpt.robustness.logit_records import Record
from vpt.run_record import identity

FORMAT = "vpt-report/1"
COMPARED = (1.0, FIXED_ALPHA)
"""α at which models are compared image by image: neither is chosen by looking."""

_REFERENCE = "imagenet_1k"  # the data on whose accuracy the baselines of effective robustness depend
_DRAWN = (0.0, FIXED_ALPHA, 1.0)  # of reliability diagrams
_CURVE_POINTS = 201
_AVERAGED = ("top1", "mean_per_class", "worst_class", "nll", "brier", "ece", "ece_equal_mass", "aurc", "risk_at_80")


def report(folders: Sequence[Path]) -> Values:
    """Scores the records of evaluations (`vpt.robustness.run`) on the same data; no image is classified again.

    Returns plain values for JSON. Shares lie in [0, 1], differences are first minus second.

    - ``data``: name and fingerprint.
    - ``models``: what each is, its protocol, α chosen on validation images or why none is.
    - ``rows``: model × set × α with protocol and all scores (:func:`vpt.metrics.summary.summary`); the temperature is
      fitted on the validation images of the same model and α.
    - ``averages``: model × corruption × α, means over severities, then over all corruptions and over the 15 of
      ImageNet-C; ``kinds`` says over which.
    - ``shifts``: model × α or a strength for each image: all shifts together (`vpt.reports.robustness_shifts`).
    - ``headline``: model × set: top-1 at α = 0, fixed 0.5, chosen on validation, 1, and as "oracle" the best.
    - ``reliability``: bins of the clean set at α = 0, 0.5 and 1.
    - ``curves``: exact curves over α where only the head differs.
    - ``differences``: paired bootstrap at α = 1 and 0.5; ``not_compared`` says which pairs have other images.
    - ``effective``: effective robustness, where a set has a baseline population.
    - ``agreement``: accuracy under shift by agreement on the line, of three models and more
      (`vpt.reports.robustness_shifts`); ``no_agreement`` says where there is no line.
    - ``unknown``: AUROC for images of unknown classes (`vpt.reports.robustness_unknown`), where some were scored.

    Raises:
        ConfigError: A folder is named twice, or the models were evaluated on different data.
        DataError: An evaluation or a record is missing, unfinished or damaged.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("A folder is named twice: name each evaluation once.")
    models = dict(zip(model_names(folders), [RobustnessResult.read(folder) for folder in folders], strict=True))
    _check_data(models)
    rows = [row for name, model in models.items() for row in _rows(name, model)]
    _mark(rows)
    averages = [row for name, model in models.items() for row in _averages(name, model, rows)]
    differences, not_compared = _differences(models)
    lines, no_lines = agreements(models, COMPARED)
    data = next(iter(models.values())).protocol["data"]
    return {
        "format": FORMAT,
        "data": {"name": data["name"], "fingerprint": data["fingerprint"]},
        "models": [_model(name, model) for name, model in models.items()],
        "headline": [line for name, model in models.items() for line in _headline(name, model, rows, averages)],
        "rows": rows,
        "averages": averages,
        "shifts": [row for name, model in models.items() for row in together(name, model)],
        "reliability": [bins for name, model in models.items() for bins in _reliability(name, model)],
        "curves": [curve for name, model in models.items() for curve in _curves(name, model)],
        "differences": differences,
        "not_compared": not_compared,
        "effective": [row for name, model in models.items() for row in effective_rows(name, model)],
        "agreement": lines,
        "no_agreement": no_lines,
        "unknown": [row for name, model in models.items() for row in detected(name, model)],
    }


def model_names(folders: Sequence[Path]) -> list[str]:
    """Names models by what tells their folders apart, e.g. ``"linear"`` for ``runs/linear/version_0/robustness``."""
    parts = [folder.resolve().parts for folder in folders]
    if len(parts) == 1:
        own = [part for part in parts[0][1:] if part != "robustness" and not part.startswith("version_")]
        return [own[-1] if own else "model"]
    first = 0
    while len({part[first] for part in parts}) == 1 and all(len(part) > first + 1 for part in parts):
        first += 1
    rest = [part[first:] for part in parts]
    while len({part[-1:] for part in rest}) == 1 and all(len(part) > 1 for part in rest):
        rest = [part[:-1] for part in rest]
    return ["/".join(part) for part in rest]


def _check_data(models: dict[str, RobustnessResult]) -> None:
    first, *others = models.values()
    ours = _tested(first)
    for other in others:
        if ours != (theirs := _tested(other)):
            raise ConfigError(
                f"{first.out} is on {first.protocol['data']['name']} ({identity(ours)[:12]}) and {other.out} on "
                f"{other.protocol['data']['name']} ({identity(theirs)[:12]}), other images: report them apart."
            )
        if None not in (first.corruptions, other.corruptions) and first.corruptions != other.corruptions:
            raise ConfigError(
                f"The corruptions under {first.out} have the parameters of {first.corruptions} and those under "
                f"{other.out} of {other.corruptions}: report them apart, or evaluate again."
            )


def _tested(result: RobustnessResult) -> Any:
    """Which images a model was tested on; what was trained on may differ."""
    data = result.protocol["data"]
    return {key: value for key, value in data.get("fingerprints", {"": data["fingerprint"]}).items() if key != "train"}


def _model(name: str, result: RobustnessResult) -> Values:
    protocol = result.protocol
    not_exact = _why_not_exact(protocol)
    return {
        "model": name,
        "backbone": protocol["backbone"]["name"],
        "weights": protocol["backbone"]["weights_id"],
        "backbone_fingerprint": protocol["backbone"]["fingerprint"],
        "delta_sha256": protocol["delta"]["sha256"],
        "specs": protocol["delta"]["specs"],
        "way": protocol["way"],
        "head": protocol["head"],
        "corruptions": result.corruptions,
        "preset": protocol["data"]["preset"],
        "image_size": size_text(protocol["data"]["image_size"]),
        "logits": protocol["logits"],
        "complete": protocol["data"]["complete"],
        "strengths": protocol.get("strengths"),
        "adapt": (protocol.get("adapt") or {}).get("method"),
        "alphas": sorted({row.alpha for row in result.rows}),
        "chosen_alpha": result.chosen_alpha,
        "why_none_chosen": result.not_chosen,
        "exact_curve": not_exact is None,
        "why_no_exact_curve": not_exact,
    }


def _why_not_exact(protocol: Mapping[str, Any]) -> str | None:
    if protocol["way"] != "head":
        return "More than the head differs between α = 0 and 1."
    if protocol["logits"] == "float32":
        return None
    return "Its records are float16, too coarse for exact intervals of α: evaluate again without --half."


def _rows(name: str, result: RobustnessResult) -> Iterator[Values]:
    fitted = {row.alpha: temperature(*result.record(row).matched) for row in result.rows if row.kind == VAL}
    for row in result.rows:
        record = result.record(row)
        own: Values = {"model": name, "set": row.set, "kind": row.kind, "severity": row.severity, "alpha": row.alpha}
        own |= {"n": row.n, "protocol": _protocol(row, record.protocol), "marks": []}
        yield own | summary(*record.matched, temperature=fitted.get(row.alpha))


def _protocol(row: Row, protocol: Mapping[str, Any]) -> Values:
    data, groups = protocol["data"], protocol["groups"]
    split = row.set if row.kind in (VAL, SHIFT) else VAL if row.kind == VAL_CORRUPTED else "test"
    sha256 = hashlib.sha256(json.dumps(groups).encode()).hexdigest()
    return {
        "weights": protocol["backbone"]["weights_id"],
        "delta_sha256": protocol["delta"]["sha256"],
        "alpha": row.alpha,
        "way": protocol["way"],
        "preset": data["preset"],
        "image_size": size_text(data["image_size"]),
        "mask": None if groups is None else {"classes": len(groups), "sha256": sha256},
        "list": protocol["list"],
        "listed": data["counts"].get(split),
        "seed": protocol["seed"],
        "partial": data["complete"] is False,
        "half": protocol["logits"] == "float16",
        "bf16": protocol["precision"] == "bf16",
        "interpolated_logits": row.record is None,
        "adapt": protocol.get("adapt"),
    }


def _mark(rows: list[Values]) -> None:
    """Says beside each number what sets it apart, and from which other numbers."""
    for row in rows:
        protocol = row["protocol"]
        same = [other for other in rows if other["set"] == row["set"]]
        marks = {
            "partial data": protocol["partial"],
            f"{row['n']} of {protocol['listed']} drawn": protocol["seed"] is not None,
            "float16": protocol["half"],
            "bf16": protocol["bf16"],
            "precision differs": len({other["protocol"]["bf16"] for other in same}) > 1,
            "class mask": protocol["mask"] is not None,
            f"adapted at test time ({(protocol['adapt'] or {}).get('method')})": protocol["adapt"] is not None,
            title(row["kind"]): title(row["kind"]) != row["kind"],
            "preset differs": len({other["protocol"]["preset"] for other in same}) > 1,
            "image size differs": len({other["protocol"]["image_size"] for other in same}) > 1,
            "n differs": len({other["n"] for other in same}) > 1,
        }
        row["marks"] = [mark for mark, holds in marks.items() if holds]


def _averages(name: str, result: RobustnessResult, rows: list[Values]) -> Iterator[Values]:
    scored = {(row["set"], row["alpha"]): row for row in rows if row["model"] == name}
    for label, group, _ in result.groups():
        if group[0].severity is None:
            continue
        for alpha in sorted({row.alpha for row in group}):
            chosen = [scored[row.set, row.alpha] for row in group if row.alpha == alpha]
            means = {key: fmean(row[key] for row in chosen) for key in _AVERAGED}
            own = {"model": name, "set": label, "alpha": alpha, "sets": len(chosen), "n": chosen[0]["n"]}
            kinds = list(dict.fromkeys(row.kind for row in group))
            yield own | {"kinds": kinds, "marks": chosen[0]["marks"]} | means


def _headline(name: str, result: RobustnessResult, rows: list[Values], averages: list[Values]) -> Iterator[Values]:
    plain = [row for row in rows if row["model"] == name and row["severity"] is None]
    own = [*plain, *(row for row in averages if row["model"] == name)]
    chosen = result.chosen_alpha
    for label in dict.fromkeys(row["set"] for row in own):
        at = {row["alpha"]: _cell(row) for row in own if row["set"] == label}
        first = next(row for row in own if row["set"] == label)
        best = (
            max(at.values(), key=lambda cell: cell["top1"])
            if len(at) > 1 and label not in (VAL, VAL_CORRUPTED)
            else None
        )
        yield {
            "model": name,
            "set": label,
            "n": first["n"],
            "preset": result.protocol["data"]["preset"],
            "marks": first["marks"],
            "zero": at.get(0.0),
            "fixed": at.get(FIXED_ALPHA),
            "chosen_on_val": None if chosen is None else at.get(chosen),
            "tuned": at.get(1.0),
            "oracle": best,
        }


def _cell(row: Values) -> Values:
    return {"alpha": row["alpha"], "top1": row["top1"], "low": row.get("top1_low"), "high": row.get("top1_high")}


def _reliability(name: str, result: RobustnessResult) -> Iterator[Values]:
    for row in result.rows:
        if row.kind == CLEAN and row.alpha in _DRAWN:
            said = predictions(*result.record(row).matched)
            bins = equal_width(said.confidence, said.correct)
            values = {key: [float(value) for value in array] for key, array in asdict(bins).items()}
            yield {"model": name, "alpha": row.alpha, "ece": bins.error} | values


def _curves(name: str, result: RobustnessResult) -> Iterator[Values]:
    rows = result.rows
    if _why_not_exact(result.protocol) or len({row.alpha for row in rows}) == 1:
        return
    alphas = np.linspace(0, 1, _CURVE_POINTS)
    for row in {row.set: row for row in rows if row.kind in (CLEAN, SHIFT)}.values():
        start, end = result.ends(row)
        groups = end.protocol["groups"]
        labels = end.label if groups is None else positions(end.label, groups)
        curve = accuracy_curve(start.logits, end.logits, labels, groups)
        values = {"alpha": alphas.tolist(), "top1": curve.accuracy(alphas).tolist()}
        yield {"model": name, "set": row.set, "n": row.n} | values | {"oracle": curve.best}


def _differences(models: dict[str, RobustnessResult]) -> tuple[list[Values], list[str]]:
    found, refused = [], []
    for (first, ours), (second, theirs) in combinations(models.items(), 2):
        if adapted := [name for name, each in ((first, ours), (second, theirs)) if each.protocol.get("adapt")]:
            refused.append(f"{first} and {second}: {adapted[0]} was adapted to the test images.")
            continue
        rows = {(row.set, row.alpha): row for row in theirs.rows}
        for row in ours.rows:
            other = rows.get((row.set, row.alpha))
            if other is None or row.alpha not in COMPARED or row.kind not in (CLEAN, SHIFT):
                continue
            one, two = ours.record(row), theirs.record(other)
            if not one.same_images(two):
                refused.append(f"{first} and {second} on {row.set}: {_other_images(one, two)}")
                continue
            values = asdict(difference(correct(one.scored, one.label), correct(two.scored, two.label)))
            found.append({"first": first, "second": second, "set": row.set, "alpha": row.alpha} | values)
    return found, list(dict.fromkeys(refused))


def _other_images(one: Record, two: Record) -> str:
    what = "labels" if np.array_equal(one.index, two.index) else "images"
    ours, theirs = (f"{record.protocol['set']!r} ({len(record.label)} images)" for record in (one, two))
    return (
        f"The records of sets {ours} and {theirs} hold different {what}: compare two models on one list, both "
        "evaluated with the same max_images and seed."
    )


def effective_rows(name: str, result: RobustnessResult) -> Iterator[Values]:
    """Compares accuracies under shift with what the accuracy on ImageNet predicts, in percentage points.

    A row for each population (`POPULATIONS`) that the set has a baseline of. Nothing is given unless the clean set is
    ImageNet's validation set, in full precision. A baseline is extrapolated where that accuracy lies below all models
    it was fitted on.
    """
    if result.protocol["data"]["name"] != _REFERENCE or result.protocol["logits"] != "float32":
        return
    if result.protocol.get("adapt") is not None:  # the line is of models that saw no test image
        return
    clean = {row.alpha: row for row in result.rows if row.kind == CLEAN}
    shifts = [row for row in result.rows if row.kind == SHIFT]
    for row, population in ((r, p) for r in shifts for p, known in POPULATIONS.items() if r.set in known):
        groups, validation = result.record(row).protocol["groups"], result.record(clean[row.alpha])
        accuracy = top1(*matched(validation.logits, validation.label, groups))
        baseline = POPULATIONS[population][row.set]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the row says so itself
            points = effective_robustness(row.set, row.top1, {baseline.reference: accuracy}, population)
        yield {
            "model": name,
            "set": row.set,
            "alpha": row.alpha,
            "accuracy": row.top1,
            "population": population,
            "reference": baseline.reference,
            "reference_accuracy": accuracy,
            "points": points,
            "extrapolated": accuracy < baseline.begins,
        }
