"""A robustness report as files: JSON, Markdown, and one page that needs nothing beside itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vpt.robustness.report import report
from vpt.robustness.report_tables import markdown, notes, tables, title
from vpt.visualize.html import document
from vpt.visualize.robustness import figures

_CAPTIONS = {
    "Accuracy in and out of distribution": "Logit axes; dashed: as accurate under shift as without. Along each line α "
    "goes from 0 (hollow) over 0.5 (grey) to 1 (filled, with the Wilson interval under shift).",
    "Accuracy at every α": "Bands: 95 % Wilson intervals. Steps: exact curves where only the head differs. The "
    "validation images may choose α, the others may not.",
    "Reliability": "Bins of equal width; larger marks hold more images. Below the dashed line a model is too sure.",
    "Accuracy under corruption": "This package's own corruptions of the clean set.",
}


def write_report(folders: Sequence[Path], out: Path) -> list[Path]:
    """Reports on evaluated models; nothing is classified again.

    Args:
        folders: Each of one `vpt.robustness.run`, all on the same data.
        out: Folder for ``report.json``, ``report.md`` and ``report.html``; it is made.

    Returns:
        The three paths.

    Raises:
        ConfigError: A folder is named twice, the models were evaluated on different data, or `out` is a file.
        DataError: An evaluation or a record is missing, unfinished or damaged.
    """
    values = report(folders)
    texts = {
        "report.json": json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "report.md": markdown(values),
        "report.html": page(values),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in texts]


def page(values: dict[str, Any]) -> str:
    """Writes a report as HTML.

    Args:
        values: From `vpt.robustness.report.report`.

    Returns:
        One page, its figures inline, without any reference to elsewhere.
    """
    return document(title(values), notes(values), tables(values), figures(values), _CAPTIONS)
