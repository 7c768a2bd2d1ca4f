"""The page of `vpt tune`: what was found and what it cost, where the model errs, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.special import softmax

from vpt.atomic_write import write_json, write_text
from vpt.data import ImageDataset
from vpt.data.channels import false_colours
from vpt.experiments.tune import PROBE, Tuned, computing
from vpt.metrics.accuracy import Difference, difference, wilson
from vpt.metrics.calibration import equal_mass
from vpt.metrics.label_errors import suspicious
from vpt.metrics.logits import predictions
from vpt.models import load_classifier
from vpt.models.logistic_regression import out_of_fold
from vpt.models.prediction import batch_answers
from vpt.reports.page import Table, document, markdown, percent, pictures
from vpt.reports.style import NEUTRAL, confusion_figure, style
from vpt.robustness import RobustnessResult
from vpt.run_record import DELTA_FILE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Logits = NDArray[np.float32]
_PAIRS, _EACH, _SUSPECTS = 6, 4, 12
_L2 = 0.01
_TRUSTED = 0.8  # share of labels that the probe must give to speak of the others
_CAPTIONS = {
    "confusion": "How images of each class, a row, were classified.",
    "calibration": "Share of right answers over the mean probability, in bins of equally many images: on the line a "
    "model is as sure as it is right.",
    "attention": "What the class token, or the mean token, attends to in some of the images.",
}


def tune_report(
    tuned: Tuned,
    weights: str,
    out: Path,
    repeat: str,
    robustness: RobustnessResult | None = None,
    figures: Mapping[str, Figure] | None = None,
) -> list[str]:
    """Writes ``report.html``, ``report.md`` and ``report.json`` into a folder, and returns the advice.

    Figures are added to those of confusions and calibration. Without test images the page is of validation images,
    which have chosen the method: it says so.
    """
    data, tested = tuned.data, tuned.tests > 0
    split = data.split("test" if tested else "val")
    labels = np.asarray(split.labels)
    runs = (tuned.final, tuned.probe) if tested else (tuned.searched / tuned.winner, tuned.searched / PROBE)
    with computing(tuned.precision):
        own, probe = (batch_answers(load_classifier(run / DELTA_FILE, weights), split)[0] for run in runs)
    right, before = own.argmax(axis=1) == labels, probe.argmax(axis=1) == labels
    gain = None if tuned.winner == PROBE else difference(right, before)
    suspects = _suspects(tuned, weights)
    advice = _advice(tuned, gain, right, tested, len(suspects))
    where = f"{len(labels):,} {'test' if tested else 'validation'} images"
    notes = [f"{tuned.winner}: {_share(right)} of {where}."]
    if tuned.winner != PROBE:
        notes.append(f"The linear probe: {_share(before)}.")
    if not tested:
        notes.append("There are no test images: these validation images chose the method, which flatters its accuracy.")
    spent, discarded, given = (tuned.seconds[key] for key in ("all", "discarded", "given"))
    share = f"{100 * discarded / given:.0f} % of the {given:,.0f} s that were given"
    notes.append(f"Search and training took {spent:,.0f} s; what was discarded took {discarded:,.0f} s, {share}.")
    if tuned.precision != "32-true":
        notes.append("All of it was computed in bfloat16 (autocast).")
    notes += [*advice, f"To repeat the training: {repeat}"]
    tables = [_tried(tuned), *([] if robustness is None else [_corrupted(robustness)])]
    matrix = np.zeros((data.num_classes, data.num_classes), dtype=np.int64)
    np.add.at(matrix, (labels, own.argmax(axis=1)), 1)
    drawn = {"confusion": confusion_figure(matrix, data.class_names), "calibration": _reliability(own, labels)}
    drawn |= dict(figures or {})
    rest = "\n".join([*_confusions(own, labels, split, data.class_names), *_suspect_rows(tuned, suspects)])
    values = {
        "winner": tuned.winner,
        "split": "test" if tested else "val",
        "images": len(labels),
        "right": int(right.sum()),
        "probe_right": int(before.sum()),
        "tried": tuned.tried,
        "seconds": tuned.seconds,
        "suspects": [{"path": path, "label": label, "likely": likely} for _, _, path, label, likely in suspects],
        "advice": advice,
        "repeat": repeat,
    }
    write_json(out / "report.json", values)
    title = f"vpt tune: {data.name}"
    write_text(out / "report.md", markdown(title, notes, tables))
    write_text(out / "report.html", document(title, notes, tables, drawn, _CAPTIONS, rest))
    return advice


def _share(right: NDArray[np.bool_]) -> str:
    low, high = wilson(int(right.sum()), len(right))
    ends = f"95 %: {100 * low:.1f} to {100 * high:.1f}"
    return f"{100 * right.mean():.1f} % right ({int(right.sum()):,} of {len(right):,}; {ends})"


def _advice(tuned: Tuned, gain: Difference | None, right: NDArray[np.bool_], tested: bool, suspects: int) -> list[str]:
    found = []
    if tuned.winner == PROBE and tuned.gain is None:
        found.append("Only the linear probe was tried: give more minutes, to try methods inside the backbone.")
    elif tuned.winner == PROBE:
        text = f"{tuned.best} gains {_points(tuned.gain)} on validation images"
        found.append(f"No method is better than the probe by more than chance ({text}): keep the probe.")
    elif tuned.gain is not None:
        found.append(
            f"{tuned.winner} is better than the probe by more than chance: {_points(tuned.gain)} on validation."
        )
    if gain is not None and tested and gain.low <= 0:
        found.append(f"On test images the gain over the probe is {_points(gain)}, which may be chance.")
    if len(right) < 100:
        found.append(f"{len(right)} images are few to measure on: the interval is wide, label more.")
    if suspects:
        found.append(f"{suspects} labels may be wrong, or their classes look alike: look at them below.")
    return found


def _points(gain: Difference | None) -> str:
    if gain is None:
        return "nothing"
    return f"{100 * gain.value:+.1f} points (95 %: {100 * gain.low:+.1f} to {100 * gain.high:+.1f})"


def _tried(tuned: Tuned) -> Table:
    rows = []
    for row in tuned.tried:
        if "failed" in row:
            rows.append((row["name"], f"failed: {row['failed']}", "–", "–"))
        else:
            rows.append((row["name"], percent(row["val"]), str(row["epochs"]), f"{row['seconds']:.0f}"))
    note = "Accuracy (%) on validation images that were not trained on, epochs, and seconds of training."
    return Table("What was tried", note, ("method", "val", "epochs", "seconds"), rows, 1)


def _corrupted(result: RobustnessResult) -> Table:
    rows = [
        (row.set, percent(row.top1), f"{percent(row.low)} to {percent(row.high)}", str(row.n)) for row in result.rows
    ]
    note = "Accuracy (%) on test images, and on the same under corruptions at severity 3, with 95 % Wilson intervals."
    return Table("Under corruption", note, ("set", "top-1", "interval", "images"), rows, 1)


def _reliability(logits: Logits, labels: NDArray[np.int64]) -> Figure:
    from matplotlib.figure import Figure

    found = predictions(logits, labels)
    bins = equal_mass(found.confidence, found.correct, min(10, len(labels)))
    with style():
        figure = Figure(figsize=(4, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 100], [0, 100], color=NEUTRAL, linestyle="--", linewidth=0.8)
        axes.plot(100 * bins.confidence, 100 * bins.accuracy, marker="o", markersize=4)
        axes.set(xlabel="probability (%)", ylabel="right (%)", xlim=(-3, 103), ylim=(-3, 103))
        axes.set_title(f"calibration error {100 * bins.error:.1f} %", loc="left")
    return figure


def _confusions(logits: Logits, labels: NDArray[np.int64], split: ImageDataset, names: Sequence[str]) -> Iterator[str]:
    """The commonest confusions with images of each, the surest errors first."""
    probabilities = softmax(logits.astype(np.float64), axis=1)
    guess = logits.argmax(axis=1)
    wrong = np.flatnonzero(guess != labels).tolist()
    pairs, counts = np.unique(np.stack([labels[wrong], guess[wrong]]), axis=1, return_counts=True)
    if len(wrong):
        yield "<h2>Worst confusions</h2>"
    for place in np.argsort(-counts, kind="stable")[:_PAIRS]:
        true, said = pairs[:, place]
        rows = [row for row in wrong if (labels[row], guess[row]) == (true, said)]
        rows.sort(key=lambda row: -probabilities[row, said])
        yield f"<p>{escape(names[true])}, taken for {escape(names[said])}: {counts[place]}</p>"
        yield pictures(
            (_picture(split, row), f"{100 * probabilities[row, said]:.0f} % {names[said]}", str(split.paths[row]))
            for row in rows[:_EACH]
        )


def _picture(split: ImageDataset, row: int) -> Image.Image:
    return Image.fromarray(false_colours(split[int(row)]["image"].numpy()))


Suspect = tuple[str, int, str, str, str]
"""Split, position, path, label, and the class that it more likely is."""


def _suspects(tuned: Tuned, weights: str) -> list[Suspect]:
    """Labelled images that a probe of the others takes for another class, the least likely label first."""
    model = load_classifier(tuned.searched / PROBE / DELTA_FILE, weights)
    data, places, features, labels = tuned.data, list[tuple[str, int]](), [], []
    for name in ("train", "val"):
        split = data.split(name)
        places += [(name, row) for row in range(len(split))]
        features.append(batch_answers(model, split)[1])
        labels.append(np.asarray(split.labels))
    known = np.concatenate(labels)
    logits = out_of_fold(torch.from_numpy(np.concatenate(features)), torch.from_numpy(known), data.num_classes, _L2)
    probabilities = softmax(logits.double().numpy(), axis=1)
    if (probabilities.argmax(axis=1) == known).mean() < _TRUSTED:  # it errs more often than the labels
        return []
    found = []
    for row in suspicious(probabilities, known):
        name, position = places[row]
        likely = data.class_names[
            int(np.argmax(np.where(np.arange(data.num_classes) == known[row], -1, probabilities[row])))
        ]
        path = str(data.split(name).paths[position])
        found.append((name, position, path, data.class_names[known[row]], likely))
    return found


def _suspect_rows(tuned: Tuned, suspects: Sequence[Suspect]) -> Iterator[str]:
    if not suspects:
        return
    yield "<h2>Labels that may be wrong</h2>"
    yield f"<p>Confident learning on answers of a probe that had not seen them; {len(suspects):,} in all.</p>"
    yield pictures(
        (_picture(tuned.data.split(name), row), f"{label} → {likely}?", path)
        for name, row, path, label, likely in suspects[:_SUSPECTS]
    )
