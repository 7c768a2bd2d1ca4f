"""What a person sees while trials run: how many are left, which failed, and the best so far."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vpt.experiments.trial import Failure, Record, Trial

SHOWN = 8


class Board:
    """A live table on a terminal, a line for each trial elsewhere; both on stderr."""

    def __init__(self, total: int, found: Mapping[str, Record | Failure]) -> None:
        """Counts what was finished before.

        Args:
            total: How many trials there are.
            found: Those that are finished.
        """
        self._console = Console(stderr=True)
        self._total, self._before, self._done, self._failed = total, len(found), 0, 0
        self._last: list[tuple[str, Record | Failure]] = []
        self._best = max(((_val(record), name) for name, record in found.items()), default=(-1.0, ""))
        self._start = time.monotonic()
        self._live = Live(self._render(), console=self._console, refresh_per_second=1, transient=False)

    def __enter__(self) -> Board:
        if self._console.is_terminal and self._total > self._before:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live.is_started:
            self._live.update(self._render(), refresh=True)
            self._live.stop()

    def add(self, trial: Trial, result: Record | Failure) -> None:
        """Shows the end of a trial.

        Args:
            trial: The trial.
            result: Its record, or what went wrong.
        """
        self._done += 1
        self._failed += not isinstance(result, dict)
        self._last = [*self._last, (trial.name, result)][-SHOWN:]
        self._best = max(self._best, (_val(result), trial.name))
        if self._live.is_started:
            self._live.update(self._render())
        else:
            self._console.print(self._line(trial.name, result), highlight=False, soft_wrap=True)

    def _render(self) -> Group:
        table = Table("trial", "val", "test", "s", title="trials that ended last")
        for name, result in self._last:
            table.add_row(*_cells(name, result))
        return Group(table, Text(self._status()))

    def _status(self) -> str:
        finished = self._before + self._done
        left = self._total - finished
        pace = (time.monotonic() - self._start) / self._done if self._done else 0.0
        text = f"{finished} of {self._total} trials, {self._failed} failed"
        if left and pace:
            text += f", about {left * pace / 60:.0f} min to go"
        return f"{text}; best val {100 * self._best[0]:.1f} ({self._best[1]})" if self._best[0] >= 0 else text

    def _line(self, name: str, result: Record | Failure) -> str:
        return f"{self._before + self._done}/{self._total} " + "  ".join(cell for cell in _cells(name, result) if cell)


def _cells(name: str, result: Any) -> tuple[str, str, str, str]:
    if not isinstance(result, dict):
        return name, "failed", result.reason, ""
    metrics = result.get("metrics", {})
    val, test = (f"{100 * metrics[key]:.1f}" if key in metrics else "" for key in ("val/acc", "test/acc"))
    return name, val and f"val {val}", test and f"test {test}", f"{result.get('seconds', 0):.0f} s"


def _val(result: Any) -> float:
    return float(result["metrics"].get("val/acc", -1.0)) if isinstance(result, dict) else -1.0
