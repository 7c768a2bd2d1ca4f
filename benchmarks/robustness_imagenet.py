"""Part (b): the classifier that the weights were published with, on photos, shapes, textures and corruptions."""

from __future__ import annotations

from benchmarks.robustness_photos import PRESET, Photos, own_head_file
from benchmarks.robustness_trials import Place, Trial, interval, measure

SEVERITIES = (1, 3, 5)
NAME = "imagenet-own-head"


def execute(place: Place) -> None:
    """Evaluates every set once."""
    place.kept(NAME, lambda: _measure(place))


def _measure(place: Place) -> Trial:
    photos = Photos(place, halves=False)
    head = own_head_file(place, photos)
    rows = measure(place, NAME, head, photos, severities=SEVERITIES, scored=photos.scored, bf16=False)
    return {"preset": PRESET, "rows": rows}


def table(place: Place) -> str:
    """What is there, as Markdown."""
    lines = [
        "ViT-Ti/16 AugReg with its own ImageNet-1k head, nothing trained, no seed (preset timm: crop 0.9), fp32. "
        "Photos and their corruptions among 1,000 classes; shape_texture16 among 16 by mean probability. "
        "Top-1 % with 95 % Wilson interval; ECE in % (15 bins of equal width).",
        "",
        "| set | severity | n | top-1 | ECE |",
        "|---|--:|--:|--:|--:|",
    ]
    trial = place.read(NAME)
    for row in [] if trial is None else trial["rows"]:
        name, severity = (row["set"], "–") if row["severity"] is None else (row["kind"], row["severity"])
        name = "flickr_in1k_1000" if name == "clean" else name
        lines.append(f"| {name} | {severity} | {row['n']:,} | {interval(row)} | {100 * row['ece']:.1f} |")
    return "\n".join(lines)
