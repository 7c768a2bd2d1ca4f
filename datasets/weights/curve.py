"""The record of a distillation: one row a measurement in ``STUDENT.csv``, drawn as ``STUDENT.png``."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import pandas as pd

mpl.use("Agg")
import matplotlib.pyplot as plt


def draw(table: Path) -> None:
    """Draws ``table`` beside itself: loss, cosine similarity to the teacher, and probe accuracy over passes."""
    rows = pd.read_csv(table)
    figure, (loss, cosine, probe) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    loss.plot(rows["passes"], rows["train_loss"], label="training views, jittered")
    loss.plot(rows["passes"], rows["held_out_loss"], label="held-out sources")
    loss.set(title="distillation loss")
    cosine.plot(rows["passes"], rows["held_out_cosine"], color="C1", label="held-out sources")
    cosine.set(title="cosine similarity of features to the teacher's")
    for column in (name for name in rows if name.startswith("val200_")):
        probed = rows[rows[column].notna()]
        probe.plot(probed["passes"], probed[column], marker=".", label=column.removeprefix("val200_"))
    probe.set(title="linear probe: train800 → val200 (accuracy)")
    for axis in (loss, cosine, probe):
        axis.set_xlabel("passes over the training views")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(table.with_suffix(".png"), dpi=110)
    plt.close(figure)
