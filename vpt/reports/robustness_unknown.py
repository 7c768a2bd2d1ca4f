"""How well an evaluated model tells images of unknown classes from its test images, from records alone."""

from __future__ import annotations

from collections.abc import Iterator

from vpt.metrics.ood_detection import detection
from vpt.reports.page import Columns, Table, Values, percent, table_of
from vpt.robustness.evaluation_result import RobustnessResult
from vpt.robustness.unknown_images import SCORES


def detected(name: str, result: RobustnessResult) -> Iterator[Values]:
    """A row for each folder of unknown images, α and score (`SCORES`): `vpt.metrics.ood_detection.detection`.

    ``auroc`` and ``fpr95`` in [0, 1] with their intervals, and how many images are ``known`` and ``unknown``.
    """
    for row in result.unknown:
        record = result.unknown_record(row)
        for score in SCORES:
            found = detection(record.known[score], record.unknown[score])
            own: Values = {"model": name, "set": row.set, "alpha": row.alpha, "score": score}
            yield (
                own
                | {"known": row.known, "unknown": row.unknown}
                | {
                    "auroc": found.auroc,
                    "auroc_interval": list(found.auroc_interval),
                    "fpr95": found.fpr95,
                    "fpr95_interval": list(found.fpr95_interval),
                }
            )


def unknown_table(rows: list[Values]) -> Table:
    """The table of such rows."""

    def cell(row: Values, what: str) -> str:
        low, high = row[f"{what}_interval"]
        return f"{percent(row[what])} [{percent(low)}, {percent(high)}]"

    columns: Columns = {
        "unknown images": "set",
        "model": "model",
        "score": "score",
        "α": lambda row: f"{row['alpha']:g}",
        "known": "known",
        "unknown": "unknown",
        "AUROC (%)": lambda row: cell(row, "auroc"),
        "FPR95 (%)": lambda row: cell(row, "fpr95"),
    }
    note = (
        "Images of none of the classes against the clean test images. Max softmax and energy are of the classifier's "
        "own answers, the others distances of its features to those of training images. AUROC: how often an unknown "
        "image scores higher than a known one; FPR95: the share of unknown images that pass where 95 % of the known "
        "do. 95 % bootstrap intervals over both."
    )
    return table_of("Images of unknown classes", note, columns, rows, words=3)
