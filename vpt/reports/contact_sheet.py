"""A page of predicted images: the surest and least sure of each class, those declined, and those not read."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path

from PIL.Image import Image

from vpt.atomic_write import write_text
from vpt.data.channels import Channels
from vpt.data.images import to_be_seen
from vpt.errors import DataError
from vpt.models.prediction import Prediction
from vpt.reports.page import Table, document, pictures

SHOWN = 6
"""Images of each class that are surest, and as many that are least sure; of those declined four times as many."""
_Kept = list[tuple[float, int, Prediction]]


class ContactSheet:
    """Collects predictions one by one, and keeps no more of them than the page shows."""

    def __init__(self, class_names: Sequence[str], channels: Channels | None = None) -> None:
        """Of a model with these classes, whose images are RGB, or of channels (`Preset.channels`)."""
        self._channels = channels
        self._counts = dict.fromkeys(class_names, 0)
        self._sure: dict[str, _Kept] = {name: [] for name in class_names}
        self._unsure: dict[str, _Kept] = {name: [] for name in class_names}
        self._declined: dict[str, _Kept] = {"unknown": [], "unsure": []}
        self._faults: list[Prediction] = []
        self._number, self._damaged = 0, 0

    def add(self, found: Prediction) -> None:
        """Takes one prediction."""
        self._number += 1
        if found.fault:
            self._damaged += 1
            if len(self._faults) < 4 * SHOWN:
                self._faults.append(found)
        elif found.declined:
            strangeness = (found.distance or 0.0) if found.declined == "unknown" else -found.probability
            self._keep(self._declined[found.declined], strangeness, found, 4 * SHOWN)
        else:
            self._counts[found.label] += 1
            self._keep(self._sure[found.label], found.probability, found, SHOWN)
            self._keep(self._unsure[found.label], -found.probability, found, SHOWN)

    def _keep(self, kept: _Kept, value: float, found: Prediction, most: int) -> None:
        heapq.heappush(kept, (value, -self._number, found))  # of equal ones the first
        if len(kept) > most:
            heapq.heappop(kept)

    def write(self, folder: Path) -> Path:
        """Writes ``index.html``, with small copies of the images in it, and returns its path."""
        counts = [(name, str(count)) for name, count in self._counts.items() if count]
        declined = sum(map(len, self._declined.values()))
        note = f"{self._number:,} images, {self._damaged:,} of them could not be read."
        table = Table(
            "Answers",
            "How many images of each class there are, without those declined.",
            ("class", "images"),
            counts,
            1,
        )
        parts = []
        for name, count in self._counts.items():
            if count:
                shown = {id(each) for *_, each in self._sure[name]}
                rest = [item for item in self._unsure[name] if id(item[2]) not in shown]
                parts += [f"<h2>{escape(name)}</h2>", "<p>Surest:</p>", self._row(_ordered(self._sure[name]))]
                parts += ["<p>Least sure:</p>", self._row(_ordered(rest))] if rest else []
        for why, kept in self._declined.items():
            if kept:
                parts += [f"<h2>Declined: {why}</h2>", self._row(_ordered(kept))]
        if self._faults:
            items = "".join(f"<li>{escape(each.path)}: {escape(each.fault)}</li>" for each in self._faults)
            parts.append(f"<h2>Not read</h2><ul>{items}</ul>")
        notes = [note, *(["Of the images declined the clearest cases are shown."] if declined else [])]
        write_text(folder / "index.html", document("Predictions", notes, [table], {}, {}, "\n".join(parts)))
        return folder / "index.html"

    def _row(self, found: Iterable[Prediction]) -> str:
        return pictures(self._opened(found))

    def _opened(self, found: Iterable[Prediction]) -> Iterator[tuple[Image, str, str]]:
        for each in found:
            with suppress(DataError):  # it was there a moment ago
                image = to_be_seen(Path(each.path), self._channels)
                yield image, f"{each.label} {100 * each.probability:.1f} %", each.path


def _ordered(kept: _Kept) -> list[Prediction]:
    return [found for *_, found in sorted(kept, key=lambda item: item[:2], reverse=True)]
