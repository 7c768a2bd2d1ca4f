"""Any number again, from what its run left behind."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpt.errors import ConfigError
from vpt.experiments.trial import Config, Record, Trial, run_trial
from vpt.run_record import read_record

COMPARED = ("val/acc", "val/loss", "test/acc", "test/loss", "test/mean_per_class")


@dataclass(frozen=True)
class Comparison:
    """A run and its repetition.

    Attributes:
        numbers: By metric the stored value and the new one.
        differences: What else differs: versions, machine, data.
    """

    numbers: dict[str, tuple[float, float]]
    differences: list[str]

    @property
    def equal(self) -> bool:
        """Whether every number came out bit for bit."""
        return all(old == new for old, new in self.numbers.values())


def rerun(folder: Path, config: Config, out: Path | None = None) -> Comparison:
    """Repeats a run.

    Args:
        folder: Of the run, with its ``run.json``.
        config: What it was run with.
        out: Folder for the repetition; None for one that is gone afterwards.

    Returns:
        The comparison.

    Raises:
        ConfigError: The run has no numbers, or was not finished.
        VPTError: It cannot be repeated here.
    """
    stored = read_record(folder)
    if stored.get("status") != "finished" or not stored.get("metrics"):
        raise ConfigError(f"{folder} is no finished run (status {stored.get('status')}).")
    trial = Trial("again", config, test="test/acc" in stored["metrics"])
    with tempfile.TemporaryDirectory() as temporary:
        record = run_trial(trial, out or Path(temporary))
    both = [key for key in COMPARED if key in stored["metrics"] and key in record["metrics"]]
    numbers = {key: (stored["metrics"][key], record["metrics"][key]) for key in both}
    return Comparison(numbers, [*_differences(stored, record)])


def _differences(stored: Record, record: Record) -> list[str]:
    found = []
    for part in ("versions", "machine"):
        old, new = stored.get(part) or {}, record.get(part) or {}
        found += [_said(f"{part} {key}", old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys())]
    for key in ("fingerprint", "preset"):
        found.append(_said(f"data {key}", (stored["data"] or {}).get(key), (record["data"] or {}).get(key)))
    found.append(_said("weights", stored["backbone"]["fingerprint"], record["backbone"]["fingerprint"]))
    return [text for text in found if text]


def _said(what: str, old: Any, new: Any) -> str:
    return "" if old == new else f"{what}: {old} then, {new} now"
